"""Sweeps from end to end, on a tiny cascade that draws nothing in particular."""

import csv
import fcntl
import json
import threading

import numpy as np
import pytest

from configs import world
from experiments import study
from launch import sweep, sweep_engines
from launch.sweep_engines import Job, Local
from launch.sweep_points import name_of, prolonged, read_points
from personalize_jax.benchmark.loading import load_benchmark
from personalize_jax.errors import UserError
from personalize_jax.pipeline import save_pipeline
from tests import processes, tiny, tiny_world

SMALLEST = {"channels": (64,), "down_blocks": (0,), "up_blocks": (0,), "attention": (True,)}


@pytest.fixture(scope="module", autouse=True)
def quickly_compiled(lightly_compiled):
    """Every point compiles a train step of its own."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny cascade whose pictures are large enough for the probe."""
    folder = tmp_path_factory.mktemp("sweeps")
    save_pipeline(tiny.pipeline(resolution=16, **SMALLEST), folder / "tiny")
    return folder


@pytest.fixture(scope="module")
def config(folder):
    changes = {"tune": ("base",), "training__steps_per_dispatch": 2, "training__optimizer__decay_steps": 0}
    return study.quick(tiny_world.get_config(folder / "tiny", **changes))


@pytest.fixture(scope="module")
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


def conduct(points, subjects, workdir, **named):
    return sweep.conduct(points, subjects, Local(), workdir, "DINO", **named)


def calls(workdir, point, subject):
    return json.loads((workdir / point.name / subject.name / "manifest.json").read_text())["calls"]


def test_a_changed_sweep_runs_only_what_is_missing(folder, subjects, points_of):
    first = conduct(points_of(1e-3, 1e-2), subjects, folder / "changed")
    second = conduct(points_of(1e-4, 1e-2), subjects, folder / "changed")
    assert [result.status for result in (*first, *second)] == ["done"] * 4
    assert first[1].metrics == second[1].metrics and first[0].metrics != second[0].metrics
    for result in (*first, *second):
        assert [call["status"] for call in calls(folder / "changed", result.point, subjects[0])] == ["done"]


def test_what_was_scored_is_only_read(folder, subjects, points_of, monkeypatch):
    points = points_of(1e-3, 1e-2)
    first = conduct(points, subjects, folder / "changed")
    monkeypatch.setattr(sweep_engines, "scored_run", None)
    assert conduct(points, subjects, folder / "changed") == first


def test_a_point_that_fails_stops_no_other_and_is_tried_again(folder, subjects, points_of, monkeypatch):
    points, scored_run = points_of(1e-3, 1e-2, 1e-1), sweep_engines.scored_run

    def failing(study, arm, *arguments):
        if arm.name == points[1].name:
            raise UserError("The loss is not finite.")
        return scored_run(study, arm, *arguments)

    monkeypatch.setattr(sweep_engines, "scored_run", failing)
    results = conduct(points, subjects, folder / "failing")
    assert [result.status for result in results] == ["done", "failed: The loss is not finite.", "done"]
    assert not results[1].metrics and results[0].metrics
    monkeypatch.undo()
    assert [result.status for result in conduct(points, subjects, folder / "failing")] == ["done"] * 3
    statuses = [[call["status"] for call in calls(folder / "failing", point, subjects[0])] for point in points]
    assert statuses == [["done"], ["failed", "done"], ["done"]]


def test_an_interrupted_sweep_goes_on(folder, subjects, points_of, monkeypatch):
    """It is interrupted between tuning and scoring, and ends as one that was not."""
    points = points_of(1e-3, 1e-2)
    whole = conduct(points, subjects, folder / "changed")

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(study, "evaluate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        conduct(points, subjects, folder / "interrupted")
    monkeypatch.undo()
    assert conduct(points, subjects, folder / "interrupted") == whole


def test_the_best_go_on_as_if_they_had_never_stopped(folder, subjects, points_of):
    points = points_of(1e-4, 1e-3, 1e-2, 1e-1)
    results = conduct(points, subjects, folder / "rungs", rungs=[2, 4, 6], keep=0.5)
    steps = [result.point.config.training.num_steps for result in results]
    assert sorted(steps) == [2, 2, 4, 6]
    assert [result.status for result in results] == ["done" if s == 6 else "stopped early" for s in steps]

    def scores(names, rung):
        runs = [prolonged(point, rung) for point in points if point.name in names]
        of_runs = [sweep_engines.read_job(Job(run, None), subjects, folder / "rungs") for run in runs]
        return {r.name: sweep.estimates(sweep.summary(rows))["DINO"].mean for r, rows in zip(runs, of_runs, strict=True)}

    everyone = scores({point.name for point in points}, 2)
    went_on = {point.name for point, s in zip(points, steps, strict=True) if s > 2}
    assert min(scores(went_on, 2).values()) >= sorted(everyone.values())[-2]

    longest = points[steps.index(6)]
    (whole,) = conduct([prolonged(longest, 6)], subjects, folder / "whole")
    assert whole.metrics == results[points.index(longest)].metrics


def test_a_point_that_another_command_is_running_comes_last(folder, subjects, points_of):
    points = points_of(1e-3, 1e-2)
    elsewhere = folder / "busy" / points[0].name
    elsewhere.mkdir(parents=True)
    with (elsewhere / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended = Local().run([Job(point, None) for point in points], subjects, folder / "busy")
        assert next(ended)[0].point.name == points[1].name
        threading.Timer(0.5, lambda: fcntl.flock(lock, fcntl.LOCK_UN)).start()
        job, rows = next(ended)
    assert job.point.name == points[0].name and len(rows) == 5 + 2 * 2 + 2 * 4


def test_the_models_of_all_points_are_checked_first(config, points_of):
    (point,) = points_of(1e-3)
    for key, value, sentence in [("pretrained", "nowhere", "No pipeline at"), ("tune", ("decoder",), "each once")]:
        wrong = point._replace(config=study.changed(config, **{key: value}))
        with pytest.raises(UserError, match=f"The point {point.name} cannot be run: .*{sentence}"):
            Local().check([point, wrong])


def test_the_folder_of_another_sweep_is_refused(config, subjects, tmp_path):
    sweep.record(config, subjects, tmp_path)
    sweep.record(config, subjects, tmp_path)
    darker = [subjects[0]._replace(photos=[photo // 2 for photo in subjects[0].photos])]
    for other in ((study.changed(config, seed=7), subjects), (config, darker)):
        with pytest.raises(UserError, match="begun with another configuration"):
            sweep.record(*other, tmp_path)


@pytest.mark.parametrize(
    ("rungs", "changes", "sentence"),
    [
        (["a"], {}, "give numbers of steps"),
        (["20", "10"], {}, "that increase"),
        (["0", "10"], {}, "that increase"),
        (["10", "15"], {"training__steps_per_dispatch": 10}, "has 15; give multiples of 10"),
        (["10"], {"training__optimizer__decay_steps": 5}, "decay_steps=0"),
        (["10"], {"tune": ("super_resolution",)}, "leaves out"),
    ],
)
def test_rungs_that_cannot_be_climbed(points_of, rungs, changes, sentence):
    (point,) = points_of(1e-3)
    with pytest.raises(UserError, match=sentence):
        sweep.check_rungs(rungs, 0.5, [point._replace(config=study.changed(point.config, **changes))])


def test_rungs_and_their_share(points_of):
    points = points_of(1e-3)
    assert sweep.check_rungs(["2", "10"], 1.0, points) == [2, 10]
    assert sweep.check_rungs([], 0.5, points) == []
    with pytest.raises(UserError, match="--rungs do, too"):
        sweep.check_rungs(["2"], 0.5, [prolonged(points[0], 4)])
    for share in (0.0, 1.5, float("nan")):
        with pytest.raises(UserError, match="--keep"):
            sweep.check_rungs(["2"], share, points)


def test_resources_are_amounts_by_name():
    assert sweep.read_resources(["CPU=4", "TPU-v5litepod-8-head=1"]) == {"CPU": 4.0, "TPU-v5litepod-8-head": 1.0}
    for wrong in ("CPU", "=4", "CPU=many", "TPU=-1"):
        with pytest.raises(UserError, match="--resources"):
            sweep.read_resources([wrong])


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
        ("yield {'training.prior.form': 'none'}", ["--benchmark=world", "--num_subjects=1"], "form for base is 'none'"),
    ],
)
def test_sweeps_that_cannot_be_run(folder, tmp_path, text, flags, sentence):
    (tmp_path / "sweep.py").write_text(f"def sweep(config):\n    {text}\n")
    finished = command(folder, tmp_path / "out", f"--sweep={tmp_path / 'sweep.py'}", *flags)
    assert finished.status == 2 and "Traceback" not in finished.error, finished
    assert sentence in finished.error.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_the_users_photos_are_swept(folder, photos, tmp_path):
    (tmp_path / "weights.py").write_text(
        "def sweep(config):\n    for w in (0.0, 1.0):\n        yield {'training.prior.weight': w}\n"
    )
    (tmp_path / "prompts.txt").write_text("a [V] {} in the snow\n")
    finished = command(
        *(folder, tmp_path / "out", f"--sweep={tmp_path / 'weights.py'}", f"--images={photos}", "--class_noun=dog"),
        *("--config.tune=('base',)", f"--config.evaluation.prompts={tmp_path / 'prompts.txt'}"),
    )
    assert finished.status == 0, finished
    names = [name_of({"training.prior.weight": weight}) for weight in (0.0, 1.0)]
    assert list(json.loads((tmp_path / "out" / "sweep.json").read_text())["points"]) == names
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").open()))
    assert [(row["point"], row["training.prior.weight"], row["status"]) for row in rows] == [
        (names[0], "0.0", "done"),
        (names[1], "1.0", "done"),
    ]
    assert all(np.isfinite(float(row["DINO"])) for row in rows)
    assert (tmp_path / "out" / "table.md").read_text() in finished.output
    assert (tmp_path / "out" / "figure.png").exists()
    assert (tmp_path / "out" / names[0] / "dog" / "pipeline").is_dir()
