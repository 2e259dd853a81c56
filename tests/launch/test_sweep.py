"""Sweeps from end to end, on a tiny cascade that draws nothing in particular."""

import csv
import fcntl
import json
import sys
import threading

import numpy as np
import pytest

from configs import world
from experiments import study
from launch import sweep, sweep_engines
from launch.sweep_engines import Job, LocalEngine
from launch.sweep_points import point_name, prolonged, read_points
from personalize_jax.benchmark.loading import load_benchmark
from personalize_jax.evaluation.metric_registry import metric_versions
from personalize_jax.evaluation.scoring import encoder_names, write_rows
from personalize_jax.metrics.table import Row
from personalize_jax.pipeline import save_pipeline
from personalize_jax.runtime.errors import UserError
from personalize_jax.training.tracking import Destinations
from tests import processes, tiny, tiny_world

SMALLEST = {"channels": (64,), "down_blocks": (0,), "up_blocks": (0,), "attention": (True,)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny cascade whose pictures are large enough for the probe."""
    folder = tmp_path_factory.mktemp("sweeps")
    save_pipeline(tiny.pipeline(resolution=16, **SMALLEST), folder / "tiny")
    return folder


@pytest.fixture(scope="module")
def config(folder):
    changes = {"tune": ("base",), "training__steps_per_dispatch": 2, "training__optimizer__decay_steps": 0}
    changes |= {"evaluation__probe": True}
    return study.quick(tiny_world.get_config(folder / "tiny", **changes))


@pytest.fixture
def subjects():
    """One subject with two prompts."""
    subject = load_benchmark("world")[0]
    return [subject._replace(prompts=subject.prompts[:1] + subject.prompts[-1:])]


@pytest.fixture
def points_of(config, tmp_path):
    """Points of learning rates."""

    def points_of(*rates):
        file = tmp_path / "rates.py"
        file.write_text(
            f"def sweep(config):\n    for r in {rates}:\n        yield {{'training.optimizer.learning_rate': r}}\n"
        )
        return read_points(file, config)

    return points_of


@pytest.fixture
def runs(monkeypatch):
    """In place of runs: names of those that were begun, whose DINO is the learning rate. Those of `fails` end early."""

    class Runs:
        begun, fails, continued = [], {}, {}

    def scored_run(study, arm, subject, nouns, pretrained, encoders, workdir, destinations):
        Runs.begun.append(arm.name)
        Runs.continued[arm.name] = arm.continues
        if arm.name in Runs.fails:
            raise Runs.fails[arm.name]
        folder = workdir / arm.name / subject.name / "evaluation"
        folder.mkdir(parents=True)
        scores = {"DINO": arm.config.training.optimizer.learning_rate}
        write_rows([Row(subject.name, "subject", "a [V] dog", 0, "0.png", scores)], folder / "rows.jsonl")
        settings = arm.config.evaluation
        versions = metric_versions(encoder_names(settings))
        record = {"definitions": versions, "settings": json.loads(settings.to_json())}
        (folder / "evaluation.json").write_text(json.dumps(record))

    Runs.begun, Runs.fails, Runs.continued = [], {}, {}
    monkeypatch.setattr(sweep_engines, "scored_run", scored_run)
    return Runs


def run_points(points, subjects, workdir, **named):
    return sweep.run_points(points, subjects, LocalEngine(), workdir, "DINO", **named)


def test_a_changed_sweep_runs_only_what_is_missing(tmp_path, subjects, points_of, runs):
    first = run_points(points_of(1e-3, 1e-2), subjects, tmp_path)
    second = run_points(points_of(1e-4, 1e-2, 1e-3), subjects, tmp_path)
    assert [result.metrics["DINO"].mean for result in second] == [1e-4, 1e-2, 1e-3]
    assert [result.status for result in second] == ["done"] * 3
    assert second[1:] == first[::-1]
    assert runs.begun == [point.name for point in points_of(1e-3, 1e-2, 1e-4)]


def test_a_point_that_fails_stops_no_other_and_is_tried_again(tmp_path, subjects, points_of, runs):
    points = points_of(1e-3, 1e-2, 1e-1, 1.0)
    runs.fails = {
        points[1].name: UserError("The loss is not finite."),
        points[2].name: MemoryError("out of memory\nof which there was little"),
    }
    results = run_points(points, subjects, tmp_path)
    failures = ["failed: The loss is not finite.", "failed: MemoryError: out of memory"]
    assert [result.status for result in results] == ["done", *failures, "done"]
    assert [bool(result.metrics) for result in results] == [True, False, False, True]
    runs.fails = {}
    assert [result.status for result in run_points(points, subjects, tmp_path)] == ["done"] * 4
    assert runs.begun == [points[i].name for i in (0, 1, 2, 3, 1, 2)]


def test_an_interrupted_sweep_goes_on(tmp_path, subjects, points_of, runs):
    points = points_of(1e-3, 1e-2, 1e-1)
    runs.fails = {points[1].name: KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        run_points(points, subjects, tmp_path)
    runs.fails = {}
    assert [result.metrics["DINO"].mean for result in run_points(points, subjects, tmp_path)] == [1e-3, 1e-2, 1e-1]
    assert runs.begun == [points[i].name for i in (0, 1, 1, 2)]


def test_subjects_that_were_scored_are_not_run_again(tmp_path, subjects, points_of, runs):
    points = points_of(1e-3)
    run_points(points, subjects, tmp_path)
    both = [*subjects, subjects[0]._replace(name="another")]
    run_points(points, both, tmp_path)
    assert len(runs.begun) == 2


@pytest.mark.parametrize(
    ("metric", "keep", "steps"),
    [
        ("DINO", 0.5, [2, 2, 4, 8]),
        ("DINO", 0.01, [2, 2, 2, 8]),
        ("DINO", 0.6, [2, 4, 8, 8]),
        ("DINO", 1.0, [8, 8, 8, 8]),
        ("PRES", 0.5, [8, 4, 2, 2]),
    ],
)
def test_the_best_go_on(tmp_path, subjects, points_of, runs, monkeypatch, metric, keep, steps):
    """Their scores rise with their learning rates; a lower PRES is better."""
    monkeypatch.setattr(sweep, "summary", lambda rows: {"dog": {metric: rows[0].scores["DINO"]}})
    points = points_of(1e-4, 1e-3, 1e-2, 1e-1)
    results = sweep.run_points(points, subjects, LocalEngine(), tmp_path, metric, [2, 4, 8], keep)
    assert [result.point.config.training.num_steps for result in results] == steps
    assert [result.status for result in results] == ["done" if s == 8 else "stopped early" for s in steps]
    assert len(runs.begun) == sum([2, 4, 8].index(s) + 1 for s in steps)


def test_each_rung_goes_on_from_the_one_before(tmp_path, subjects, points_of, runs):
    points = points_of(1e-3, 1e-2)
    run_points(points, subjects, tmp_path, rungs=[2, 4, 8], keep=0.5)
    names = {rung: [prolonged(point, rung).name for point in points] for rung in (2, 4, 8)}
    best = {names[4][1]: names[2][1], names[8][1]: names[4][1]}
    assert runs.continued == dict.fromkeys(names[2]) | best


def test_a_point_that_failed_does_not_go_on(tmp_path, subjects, points_of, runs):
    points = points_of(1e-4, 1e-3, 1e-2)
    runs.fails = {prolonged(points[2], 2).name: UserError("The loss is not finite.")}
    results = run_points(points, subjects, tmp_path, rungs=[2, 4], keep=0.5)
    assert [result.status.partition(":")[0] for result in results] == ["stopped early", "done", "failed"]


def test_a_metric_that_no_point_has_is_named(tmp_path, subjects, points_of, runs):
    with pytest.raises(UserError, match="No point has 'PRES'; give --metric one of DINO"):
        sweep.run_points(points_of(1e-3), subjects, LocalEngine(), tmp_path, "PRES")


def test_the_best_keeps_its_weights(tmp_path, subjects, points_of, runs):
    points = points_of(1e-4, 1e-3, 1e-2)
    names = [prolonged(point, rung).name for rung in (2, 4) for point in points]
    for name in names:
        (tmp_path / name / subjects[0].name / "base" / "checkpoints").mkdir(parents=True)
    run_points(points, subjects, tmp_path, rungs=[2, 4], keep=0.5, delete_weights=True)
    with_weights = {name for name in names if (tmp_path / name / subjects[0].name / "base" / "checkpoints").exists()}
    assert with_weights & set(runs.begun) == {prolonged(points[2], 4).name}


@pytest.mark.slow
def test_a_point_that_goes_on_is_as_if_it_had_never_stopped(folder, subjects, points_of):
    points = points_of(1e-4, 1e-1)
    results = run_points(points, subjects, folder / "rungs", rungs=[2, 4], keep=0.5)
    steps = [result.point.config.training.num_steps for result in results]
    assert sorted(steps) == [2, 4]
    longest = prolonged(points[steps.index(4)], 4)
    (whole,) = run_points([longest], subjects, folder / "whole")
    assert whole.metrics == results[steps.index(4)].metrics
    file = f"{longest.name}/{subjects[0].name}/base/metrics.jsonl"
    losses = [
        [json.loads(line)["loss"] for line in (folder / name / file).read_text().splitlines()]
        for name in ("rungs", "whole")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 2


def test_a_point_that_another_command_is_running_comes_last(tmp_path, subjects, points_of, runs):
    points = points_of(1e-3, 1e-2)
    elsewhere = tmp_path / points[0].name
    elsewhere.mkdir()
    with (elsewhere / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended = LocalEngine().run([Job(point, None) for point in points], subjects, tmp_path)
        assert next(ended)[0].point.name == points[1].name
        threading.Timer(0.5, lambda: fcntl.flock(lock, fcntl.LOCK_UN)).start()
        job, rows = next(ended)
    assert job.point.name == points[0].name and len(rows) == 1


def test_runs_are_tracked_as_the_sweep_is_and_that_is_checked_first(tmp_path, subjects, points_of, monkeypatch):
    asked, points = [], points_of(1e-3)
    monkeypatch.setattr(sweep_engines, "scored_run", lambda *arguments: asked.append(arguments[-1]))
    monkeypatch.setattr(sweep_engines, "read_job", lambda *_: [])
    engine = LocalEngine(Destinations(wandb="dogs"))
    list(engine.run([Job(points[0], None)], subjects, tmp_path))
    assert asked == [Destinations(wandb="dogs")]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="--wandb=dogs needs Weights & Biases"):
        engine.check(points)


def test_the_models_of_all_points_are_checked_first(config, points_of):
    (point,) = points_of(1e-3)
    for key, value, sentence in [("pretrained", "nowhere", "No pipeline at"), ("tune", ("decoder",), "each once")]:
        wrong = point._replace(config=study.changed(config, **{key: value}))
        with pytest.raises(UserError, match=f"The point {point.name} cannot be run: .*{sentence}"):
            LocalEngine().check([point, wrong])


def test_the_folder_of_another_sweep_is_refused(config, subjects, tmp_path):
    sweep.record_sweep(config, subjects, tmp_path)
    sweep.record_sweep(config, subjects, tmp_path)
    darker = [subjects[0]._replace(photos=[photo // 2 for photo in subjects[0].photos])]
    for other in ((study.changed(config, seed=7), subjects), (config, darker)):
        with pytest.raises(UserError, match="begun with another configuration"):
            sweep.record_sweep(*other, tmp_path)


@pytest.mark.parametrize(
    ("rungs", "changes", "sentence"),
    [
        (["a"], {}, "give numbers of steps"),
        (["20", "10"], {}, "that increase"),
        (["0", "10"], {}, "that increase"),
        (["10", "15"], {"training__steps_per_dispatch": 10}, "has 15; give multiples of 10"),
        (["10", "20"], {"training__optimizer__decay_steps": 5}, "decay_steps=0"),
        (["10"], {"tune": ("super_resolution",)}, "leaves out"),
    ],
)
def test_rungs_that_cannot_be_climbed(points_of, rungs, changes, sentence):
    (point,) = points_of(1e-3)
    with pytest.raises(UserError, match=sentence):
        sweep.parse_rungs(rungs, 0.5, [point._replace(config=study.changed(point.config, **changes))])


def test_rungs_and_their_share(points_of):
    points = points_of(1e-3)
    assert sweep.parse_rungs(["2", "10"], 1.0, points) == [2, 10]
    assert sweep.parse_rungs([], 0.5, points) == []
    with pytest.raises(UserError, match="--rungs do, too"):
        sweep.parse_rungs(["2"], 0.5, [prolonged(points[0], 4)])
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(UserError, match="--keep"):
            sweep.parse_rungs(["2"], share, points)


def test_resources_are_amounts_by_name():
    assert sweep.parse_resources(["CPU=4", "TPU-v5litepod-8-head=1"]) == {"CPU": 4.0, "TPU-v5litepod-8-head": 1.0}
    for wrong in ("CPU", "=4", "CPU=many", "TPU=-1"):
        with pytest.raises(UserError, match="--resources"):
            sweep.parse_resources([wrong])


def test_metrics_are_those_of_the_evaluation():
    config = world.get_config()
    sweep.check_metric("diversity kept", config)
    sweep.check_metric("CLIP-T (large)", study.changed(config, evaluation__clips=("world", "models/large")))
    for metric, changes in [("FID", {}), ("leakage", {"evaluation__probe": False})]:
        with pytest.raises(UserError, match=f"--metric is '{metric}'; give one of DINO"):
            sweep.check_metric(metric, study.changed(config, **changes))


def command(folder, workdir, *flags):
    pretrained = folder / "tiny"
    given = [f"--config=tests/tiny_world.py:{pretrained}", f"--workdir={workdir}", *flags]
    return processes.command(folder, "launch.sweep", *given)


@pytest.mark.parametrize(
    ("text", "flags", "sentence"),
    [
        ("yield {'training.num_step': 4}", ["--benchmark=world"], "did you mean training.num_steps?"),
        ("yield {'training.num_steps': 4}", [], "Give either --images"),
        ("yield {'training.num_steps': 4}", ["--benchmark=nowhere"], "nowhere is no benchmark"),
        ("yield {'training.prior.form': 'none'}", ["--benchmark=world", "--num_subjects=1"], "prior.form is 'none'"),
    ],
)
def test_sweeps_that_cannot_be_run(folder, tmp_path, text, flags, sentence):
    (tmp_path / "sweep.py").write_text(f"def sweep(config):\n    {text}\n")
    finished = command(folder, tmp_path / "out", f"--sweep={tmp_path / 'sweep.py'}", *flags)
    assert finished.status == 2 and "Traceback" not in finished.error, finished
    assert sentence in finished.error.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_users_photos_are_swept(folder, photos, tmp_path):
    (tmp_path / "weight.py").write_text("def sweep(config):\n    yield {'training.prior.weight': 0}\n")
    (tmp_path / "prompts.txt").write_text("a [V] {} in the snow\n")
    finished = command(
        *(folder, tmp_path / "out", f"--sweep={tmp_path / 'weight.py'}", f"--images={photos}", "--class_noun=dog"),
        *("--config.tune=('base',)", f"--config.evaluation.prompts={tmp_path / 'prompts.txt'}"),
    )
    assert finished.status == 0, finished
    name = point_name({"training.prior.weight": 0.0})
    assert list(json.loads((tmp_path / "out" / "sweep.json").read_text())["points"]) == [name]
    (row,) = csv.DictReader((tmp_path / "out" / "table.csv").open())
    assert (row["point"], row["training.prior.weight"], row["status"]) == (name, "0.0", "done")
    assert np.isfinite(float(row["DINO"])) and np.isfinite(float(row["CLIP-T"]))
    assert (tmp_path / "out" / "table.md").read_text() in finished.output
    assert (tmp_path / "out" / "figure.png").exists()
    assert (tmp_path / "out" / name / "dog" / "base" / "trained.safetensors").is_file()
