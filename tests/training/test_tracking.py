import dataclasses
import gzip
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from personalize_jax.families.world import read_stage
from personalize_jax.runtime.chips import peak_flops
from personalize_jax.runtime.errors import UserError
from personalize_jax.training import loop, tracking
from personalize_jax.training.program import stage_program
from personalize_jax.training.tracking import (
    JSONL_ONLY,
    NO_DESTINATIONS,
    Destinations,
    Tracking,
    TrainingLog,
    Work,
)
from personalize_jax.training.wandb_run import VERSION, WandbRun
from tests import event_files, tiny
from tests.logged import MEASURED, lines_of

ROOT = Path(__file__).parents[2]
STAGE = dataclasses.replace(read_stage(tiny.BASE), network=tiny.LinearNetwork())


class Died(Exception):
    """In place of a process that is killed."""


def train(directory, tracking=JSONL_ONLY, die_at=None, **changes):
    def progress(step, metrics):
        if step == die_at:
            raise Died

    examples = {group: tiny.examples(seed=i) for i, group in enumerate(("instance", "prior"))}
    config = tiny.training(prior__weight=0.5, **changes)
    return loop.train(program_of(examples, config), directory, progress, tracking)


def program_of(examples, config):
    return stage_program(STAGE, tiny.LinearFamily(), tiny.linear_params(), examples, config, 0)


# Rates.


def test_rates_are_what_was_done_by_the_time_it_took_without_compiling(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(tracking, "monotonic", lambda: now)
    log = TrainingLog(tmp_path, start_step=4)
    now += 100
    log.begin(Work(images=8, flops=6e12, peak_flops=24e12))
    now += 3
    log.write(6, {"loss": 1.0})
    now += 5
    log.write(16, {"loss": 0.5})
    first, second = lines_of(tmp_path)
    assert first["seconds"] == 103 and second["seconds"] == 5
    assert first["step_seconds"] == 1.5 and second["step_seconds"] == 0.5
    assert first["images_per_second"] == pytest.approx(8 / 1.5, rel=1e-5) and second["images_per_second"] == 16
    assert first["tflops_per_second"] == 4 and second["tflops_per_second"] == 12
    assert first["model_flops_utilization"] == pytest.approx(1 / 6, rel=1e-5)
    assert second["model_flops_utilization"] == 0.5
    assert set(first) == {"step", "loss", *MEASURED}


def test_a_training_logs_both_groups_and_the_memory_it_holds(tmp_path):
    held = np.ones((64, 2**20))  # 512 MiB
    train(tmp_path, num_steps=2)
    for line in lines_of(tmp_path):
        assert line["images_per_second"] * line["step_seconds"] == pytest.approx(2 * 4, rel=1e-4)
        assert held.nbytes / 2**30 < line["device_memory_gib"] < 64
        assert line["tflops_per_second"] > 0
        assert "model_flops_utilization" not in line  # a CPU's peak is not known


def test_operations_are_those_of_a_matrix_product():
    a, b = jnp.ones((64, 128)), jnp.ones((128, 32))
    program = jax.jit(jnp.matmul).lower(a, b).compile()
    assert Work.of_program(program, images=8, microbatches=1) == (8, 2 * 64 * 128 * 32, None)
    assert Work.of_program(program, images=8, microbatches=3).flops == 3 * 2 * 64 * 128 * 32


def test_operations_of_several_devices_are_those_of_all():
    script = """
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from personalize_jax.training.tracking import Work
mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
b = jax.device_put(jnp.ones((128, 32)), NamedSharding(mesh, P()))
for spec in (P("data"), P()):
    a = jax.device_put(jnp.ones((64, 128)), NamedSharding(mesh, spec))
    print(Work.of_program(jax.jit(jnp.matmul).lower(a, b).compile(), 8, 1).flops)
"""
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, check=True, capture_output=True, text=True)
    once = 2 * 64 * 128 * 32
    assert list(map(float, out.stdout.split())) == [once, 4 * once]  # shared, and done by each of them


@pytest.mark.parametrize("changes", [{"microbatches": 2}, {"steps_per_dispatch": 2}])
def test_operations_of_a_step_do_not_depend_on_how_it_is_dispatched(tmp_path, changes):
    counted = []
    for name, changed in (("one", {}), ("other", changes)):
        train(tmp_path / name, num_steps=2, **changed)
        line = lines_of(tmp_path / name)[-1]
        counted.append(line["tflops_per_second"] * line["step_seconds"])
    assert counted[1] == pytest.approx(counted[0], rel=0.15)


def test_utilisation_is_of_the_peak_of_all_devices(monkeypatch):
    assert peak_flops("TPU v5 lite") == 197e12 and peak_flops("cpu") is None
    tpu = types.SimpleNamespace(device_kind="TPU v5 lite")
    monkeypatch.setattr(tracking.jax, "devices", lambda: [tpu] * 4)
    monkeypatch.setattr(tracking.jax, "device_count", lambda: 4)
    program = types.SimpleNamespace(cost_analysis=lambda: {"flops": 1e12})
    assert Work.of_program(program, 8, 1).rates(0.1)["model_flops_utilization"] == pytest.approx(1e12 / 0.1 / 197e12)


def test_memory_is_that_of_the_fullest_device(monkeypatch):
    devices = [types.SimpleNamespace(memory_stats=lambda n=n: {"peak_bytes_in_use": n}) for n in (1, 3, 2)]
    monkeypatch.setattr(tracking.jax, "local_devices", lambda: devices)
    assert tracking.peak_memory() == 3


def test_the_program_is_compiled_once_and_not_at_all_where_nothing_is_to_be_done(tmp_path):
    compiled = []

    def heard(event, seconds, **about):
        if event == "/jax/core/compile/backend_compile_duration" and "step" in str(about.get("fun_name")):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(heard)
    try:
        train(tmp_path, num_steps=4)
        assert len(compiled) == 1
        train(tmp_path, num_steps=4)
        assert len(compiled) == 1
    finally:
        jax.monitoring.unregister_event_duration_listener(heard)


def test_the_compiled_program_takes_the_place_of_the_state_and_of_nothing_else():
    program = program_of({"instance": tiny.examples()}, tiny.training())
    before = program.init()
    after, _ = program.lower().compile()(before, program.frozen_params, program.examples)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((after, program.frozen_params, program.examples)))


# TensorBoard.


def test_event_files_hold_what_the_lines_say_once_also_after_a_resume(tmp_path):
    tracked = Tracking(tensorboard=tmp_path / "tensorboard", part="base")
    folder = tmp_path / "tensorboard" / "base"
    with pytest.raises(Died):
        train(tmp_path / "base", tracked, die_at=5)
    assert set(event_files.read(folder)["loss"]) == {1, 2, 3, 4, 5}  # on the disk, though nothing was ended well
    train(tmp_path / "base", tracked)
    train(tmp_path / "base", tracked)
    assert len(list(folder.iterdir())) == 2  # none of a call that had nothing to do
    assert [step for step, tag, _ in event_files.read_all(folder) if tag == "loss"] == [1, 2, 3, 4, 5, 4, 5, 6]
    lines = lines_of(tmp_path / "base")
    expected = {tag: {line["step"]: np.float32(line[tag]) for line in lines} for tag in lines[0] if tag != "step"}
    assert event_files.read(folder) == expected


def test_pictures_drawn_anew_take_the_place_of_those_before(tmp_path):
    tracked = Tracking(tensorboard=tmp_path).for_part("pictures")
    drawn = np.random.default_rng(0).integers(0, 256, (3, 24, 40, 3), np.uint8)
    for step, pixels in ((6, drawn[0]), (6, drawn[1]), (8, drawn[2])):
        tracked.write(step, {"a [V] dog": pixels})
    found = event_files.read(tmp_path / "pictures")
    assert set(found) == {"a [V] dog"} and set(found["a [V] dog"]) == {6, 8}
    np.testing.assert_array_equal(found["a [V] dog"][6], drawn[1])
    np.testing.assert_array_equal(found["a [V] dog"][8], drawn[2])


def test_an_event_file_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    log = TrainingLog(tmp_path, 0, Tracking(tensorboard=tmp_path / "tensorboard"))
    log.begin(Work(8, None, None))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="tfevents") as raised:
        log.write(1, {"loss": 1.0})
    assert raised.value.filename is not None


# Weights & Biases.


class StubRun:
    def __init__(self, **arguments):
        self.arguments, self.rows, self.axes, self.exit_code = arguments, [], {}, None

    def define_metric(self, name, step_metric):
        self.axes[name] = step_metric

    def log(self, row):
        self.rows.append(row)

    def finish(self, exit_code=0):
        self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch):
    """In place of the package; `runs` are those that were begun."""
    stub = types.ModuleType("wandb")
    stub.runs, stub.Error = [], type("Error", (Exception,), {})
    stub.Image = lambda pixels, caption: (pixels.shape, caption)

    def init(**arguments):
        stub.runs.append(StubRun(**arguments))
        return stub.runs[-1]

    stub.init = init
    monkeypatch.setitem(sys.modules, "wandb", stub)
    return stub


def test_a_resumed_training_goes_on_in_its_wandb_run_and_sends_no_step_twice(wandb, tmp_path):
    def run(die_at=None):
        tracked = Tracking(wandb=WandbRun(tmp_path, "dogs"), part="base")
        with tracked.running(ConfigDict({"seed": 3})):
            train(tmp_path / "base", tracked, die_at)

    with pytest.raises(Died):
        run(die_at=5)
    before = lines_of(tmp_path / "base")
    run()
    first, second = wandb.runs
    assert first.arguments == second.arguments
    assert first.arguments["project"] == "dogs" and first.arguments["resume"] == "allow"
    assert first.arguments["config"] == {"seed": 3} and first.arguments["id"]
    assert (first.exit_code, second.exit_code) == (1, 0)
    assert first.axes == {"base/*": "base/step"}
    lines = [*before, *lines_of(tmp_path / "base")[5:]]  # 4 and 5 were sent before they were done again
    assert [*first.rows, *second.rows] == [{f"base/{name}": value for name, value in line.items()} for line in lines]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


def test_run_directories_and_projects_have_wandb_runs_of_their_own(wandb, tmp_path):
    for name, project in (("a", "dogs"), ("a", "cats"), ("b", "dogs"), ("a", "dogs")):
        (tmp_path / name).mkdir(exist_ok=True)
        with WandbRun(tmp_path / name, project).running({}):
            pass
    assert [run.arguments["name"] for run in wandb.runs] == ["a", "a", "b", "a"]
    ids = [run.arguments["id"] for run in wandb.runs]
    assert len(set(ids)) == 3 and ids[0] == ids[3]


def test_pictures_are_sent_once_a_step(wandb, tmp_path):
    tracked = Tracking(wandb=WandbRun(tmp_path, "dogs")).for_part("pictures")
    with tracked.running(ConfigDict()):
        for step in (6, 6, 8):
            tracked.write(step, {"a dog": np.zeros((2, 3, 3), np.uint8)})
    picture = {"pictures/a dog": ((2, 3, 3), "a dog")}
    assert wandb.runs[0].rows == [{"pictures/step": 6, **picture}, {"pictures/step": 8, **picture}]


def test_scores_go_wherever_the_command_line_says(wandb, tmp_path):
    tracked = Destinations(tensorboard=True, wandb="dogs").tracking(tmp_path, "lora/rex").for_part("scores")
    with tracked.running(ConfigDict()):
        for value in (0.5, 0.75):
            tracked.write(6, {"DINO": value})
    assert wandb.runs[0].arguments["name"] == "lora/rex"
    assert wandb.runs[0].rows == [{"scores/step": 6, "scores/DINO": 0.5}]  # which keeps what was sent first
    assert event_files.read(tmp_path / "tensorboard" / "scores") == {"DINO": {6: 0.75}}
    assert NO_DESTINATIONS.tracking(tmp_path) == JSONL_ONLY


def test_without_wandb_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=rf"--wandb=dogs needs .*pip install wandb=={VERSION}"):
        WandbRun(tmp_path / "run", "dogs")
    assert not (tmp_path / "run").exists()
    assert f"pip install wandb=={VERSION}" in (ROOT / "requirements.txt").read_text()


def test_a_refusal_by_wandb_is_passed_on_in_a_sentence(wandb, tmp_path):
    def init(**_):
        raise wandb.Error("api_key not configured\n(no-tty)")

    wandb.init = init
    with pytest.raises(UserError, match=r"api_key not configured \(no-tty\)"), WandbRun(tmp_path, "dogs").running({}):
        pass


# Traces, and all together.


def test_a_tracked_and_traced_training_is_bit_for_bit_the_plain_one(wandb, tmp_path):
    plain = train(tmp_path / "plain", num_steps=8)
    tracked = Tracking(tmp_path / "tensorboard", WandbRun(tmp_path, "dogs"), profile=True)
    with tracked.running(ConfigDict()):
        state = train(tmp_path / "tracked", tracked, num_steps=8)
    jax.tree.map(np.testing.assert_array_equal, state, plain)
    (trace,) = (tmp_path / "tracked" / "profile").rglob("*.xplane.pb")  # for TensorBoard and XProf
    assert trace.stat().st_size > 1000
    with gzip.open(trace.with_name("perfetto_trace.json.gz")) as file:
        traced = [event for event in json.load(file)["traceEvents"] if event.get("name") == "train"]
    assert [event["args"]["step_num"] for event in traced] == ["2", "3", "4"]
    assert not (tmp_path / "plain" / "profile").exists()


@pytest.mark.parametrize("num_steps", [1, 4])
def test_a_training_shorter_than_a_trace_ends_it(tmp_path, num_steps):
    train(tmp_path / "short", Tracking(profile=True), num_steps=num_steps)
    assert bool(list(tmp_path.rglob("*.xplane.pb"))) == (num_steps > tracking.WARM_UP)
    jax.profiler.start_trace(tmp_path / "another")  # which refuses where one goes on
    jax.profiler.stop_trace()
