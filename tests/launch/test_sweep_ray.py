"""Sweeps on a real Ray cluster of two nodes, both on this machine."""

import json
import threading
import time
from pathlib import Path

import pytest

from configs import world
from experiments import study
from launch import sweep
from launch.sweep_engines import RayEngine
from launch.sweep_points import read_points
from personalize_jax.benchmark.loading import load_benchmark
from personalize_jax.runtime.errors import UserError

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def cluster(monkeypatch):
    """A head and a second node, of one processor each."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    cluster.second = cluster.add_node(**node)
    cluster.wait_for_nodes()
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def config():
    """The embedded cascade, with few steps and pictures."""
    changes = {"tune": ("base",), "training__num_steps": 20, "training__checkpoint_every": 5}
    return study.changed(study.quick(world.get_config()), **changes)


@pytest.fixture(scope="module")
def subjects():
    subject = load_benchmark("world")[0]
    return [subject._replace(prompts=subject.prompts[:1])]


def calls(workdir):
    """The statuses of every run's calls, by point."""
    files = workdir.glob("*/*/manifest.json")
    found = {f.parent.parent.name: json.loads(f.read_text()).get("calls", []) for f in files}
    return {name: [call["status"] for call in of_run] for name, of_run in found.items() if of_run}


def kill_halfway(cluster, workdir):
    """Kill the second node once two points are done and both nodes are tuning other ones."""
    while True:
        begun = {name: statuses[-1] for name, statuses in calls(workdir).items()}
        tuning = [name for name, status in begun.items() if status == "running" and any(workdir.glob(f"{name}/*/base"))]
        scoring = any(next(workdir.glob(f"{name}/*/evaluation"), None) for name in tuning)
        if len(begun) - len(tuning) >= 2 and len(tuning) == 2 and not scoring:
            break
        time.sleep(0.05)
    cluster.remove_node(cluster.second, allow_graceful=False)


@pytest.mark.slow
def test_a_node_dies_halfway_and_all_points_finish_and_none_twice(cluster, config, subjects, tmp_path):
    points = read_points(ROOT / "configs" / "sweeps" / "prior_weight.py", config)
    workdir = tmp_path / "sweep"
    engine = RayEngine(cluster.address, {"CPU": 1}, max_retries=2)
    engine.check(points)
    killing = threading.Thread(target=kill_halfway, args=(cluster, workdir), daemon=True)
    killing.start()
    results = sweep.run_points(points, subjects, engine, workdir, "DINO")
    assert not killing.is_alive() and len(cluster.list_all_nodes()) == 1
    assert [result.status for result in results] == ["done"] * 6
    of_points = calls(workdir)
    assert set(of_points) == {point.name for point in points}
    assert sorted(of_points.values()) == [["done"]] * 5 + [["killed", "done"]]
    (interrupted,) = (name for name, statuses in of_points.items() if len(statuses) == 2)
    log = workdir / interrupted / subjects[0].name / "base" / "metrics.jsonl"
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [5, 10, 15, 20]

    assert sweep.run_points(points, subjects, engine, workdir, "DINO") == results
    assert calls(workdir) == of_points


@pytest.mark.slow
def test_failures_come_back_in_words(cluster, config, subjects, tmp_path):
    file = tmp_path / "forms.py"
    file.write_text("def sweep(config):\n    yield {'training.prior.form': 'none'}\n")
    (point,) = read_points(file, config)
    engine = RayEngine(cluster.address, {"CPU": 1}, max_retries=0)
    with pytest.raises(
        UserError, match="The point training.prior.form=none cannot be run: .*prior.form is 'none'; give"
    ):
        engine.check([point])
    (result,) = sweep.run_points([point], subjects, engine, tmp_path, "DINO")
    assert result.status.startswith("failed: config.training.prior.form is 'none'; give one of")


def test_a_cluster_that_is_not_there(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(UserError, match="No Ray cluster at 'auto'.*ray start --head"):
        RayEngine("auto", {"CPU": 1}, 0)
    (tmp_path / "ray").mkdir(exist_ok=True)
    (tmp_path / "ray" / "ray_current_cluster").write_text("localhost:1")  # which one that was killed has left
    with pytest.raises(UserError, match="No Ray cluster at 'auto'.*refused"):
        RayEngine("auto", {"CPU": 1}, 0)
    monkeypatch.setenv("RAY_ADDRESS", "localhost:1")  # of one that is gone
    for address in ("auto", "localhost:1"):
        with pytest.raises(UserError, match=f"No Ray cluster at '{address}'.*refused"):
            RayEngine(address, {"CPU": 1}, 0)
