import contextlib
import json
from functools import partial

import jax
import numpy as np
import pytest

from configs import pretrain_world
from personalize_jax import pretrain as command
from personalize_jax.method.configuration_keys import check_keys, rules_of_pretraining
from personalize_jax.pipeline import load_pipeline
from personalize_jax.pretrain import Pretraining, on_this_machine, pretrain, pretrain_cascade, section_of
from personalize_jax.runtime import manifest
from personalize_jax.runtime.errors import UserError
from personalize_jax.training import budget
from tests import processes, tiny_pretraining
from tests.tiny_pretraining import data

STAGES = ("base", "super_resolution")
MINUTES = 0.6


@pytest.fixture(scope="module", autouse=True)
def unsaved():
    """Whether programs are in the cache already is left out of account."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "compiling_saved", lambda: contextlib.nullcontext([]))
        yield


class Killed(Exception):
    pass


def config(stage, num_steps=4, **changes):
    small = tiny_pretraining.get_config(stage, num_steps, **changes).unlock()
    for section in [small[name] for name in STAGES] if stage == "all" else [small]:
        section.training.checkpoint_every = 5
    return small.lock()


def ticking():
    """A clock by which a second passes whenever it is read, as it is for each dispatch."""
    return iter(range(10**6)).__next__


def load(section):
    """The data of every stage."""
    return data()


def run(workdir, minutes=None, load=load, others=None, **changes):
    return pretrain_cascade(Pretraining(config("all", **changes), workdir, load, minutes, clock=ticking()), others)


def by_hand(folder, numbers=None):
    """The two stages, each by a call of its own, with the given numbers of steps; the folder of the cascade."""
    before = ""
    for stage in STAGES:
        one = config(stage, pretrained=str(before)).unlock()
        if numbers is not None:
            one.training.num_steps, one.training.optimizer.decay_steps = numbers[stage]
        pretrain(one.lock(), folder / stage, data())
        before = folder / stage / "pipeline"
    return before


def lengths(workdir):
    known = [json.loads((workdir / stage / "length.json").read_text()) for stage in STAGES]
    return {stage: (k["num_steps"], k["decay_steps"]) for stage, k in zip(STAGES, known, strict=True)}


def bytes_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    """A run directory after MINUTES by the ticking clock."""
    workdir = tmp_path_factory.mktemp("timed")
    run(workdir, MINUTES)
    return workdir


@pytest.mark.slow
def test_it_is_what_the_stages_are_by_hand(tmp_path):
    pipeline = run(tmp_path / "all")
    assert [stage.name for stage in pipeline.stages] == [*STAGES]
    assert bytes_of(tmp_path / "all" / "pipeline") == bytes_of(by_hand(tmp_path))
    recorded = manifest.read(tmp_path / "all")
    assert recorded["done"] and [*recorded["phases"]] == ["pretraining base", "pretraining super_resolution"]
    assert {*recorded["data"]} == {"start", "pictures of base", "pictures of super_resolution"}


@pytest.mark.slow
def test_within_a_budget_it_is_what_the_chosen_numbers_give_by_hand(timed, tmp_path):
    numbers = lengths(timed)
    assert bytes_of(timed / "pipeline") == bytes_of(by_hand(tmp_path, numbers))
    # A second for each step, and a few for starting.
    assert 40 * MINUTES < sum(num_steps for num_steps, _ in numbers.values()) <= 60 * MINUTES
    assert numbers["base"][0] / numbers["super_resolution"][0] == pytest.approx(0.58 / 0.42, rel=0.15)
    pictures = load_pipeline(timed / "pipeline").sample(["a dog"], [0], batch_size=1)
    assert [p.shape for p in pictures] == [(1, 8, 8, 3), (1, 16, 16, 3)]


def killed(*_):
    raise Killed


@pytest.mark.slow
@pytest.mark.parametrize(("death", "calls"), [("save_pipeline", 1), ("load", 1), ("load", 2), ("save_pipeline", 2)])
def test_killed_it_goes_on_to_the_same(timed, tmp_path, monkeypatch, death, calls):
    """Before a stage begins, and when all of its steps are done but its result is not saved."""
    work = {"load": load, "save_pipeline": command.save_pipeline}
    done = {name: [] for name in work}

    def recorded(name, dies, *args):
        done[name].append(args)
        return killed() if dies and len(done[name]) == calls else work[name](*args)

    def start(dies):
        patch.setattr(command, "save_pipeline", partial(recorded, "save_pipeline", dies and death == "save_pipeline"))
        run(tmp_path, MINUTES, partial(recorded, "load", dies and death == "load"))

    with monkeypatch.context() as patch:
        with pytest.raises(Killed):
            start(dies=True)
        assert not manifest.read(tmp_path)["done"]
        start(dies=False)
    # What was finished is not loaded again.
    assert len(done["load"]) == 3 and len(done["save_pipeline"]) == (3 if death == "save_pipeline" else 2)
    assert manifest.read(tmp_path)["done"] and lengths(tmp_path) == lengths(timed)
    assert bytes_of(tmp_path / "pipeline") == bytes_of(timed / "pipeline")


@pytest.mark.slow
def test_a_finished_run_is_left_as_it_is(timed):
    before = {file: file.stat().st_mtime_ns for file in timed.rglob("*.safetensors")}
    run(timed, MINUTES, killed)
    assert {file: file.stat().st_mtime_ns for file in timed.rglob("*.safetensors")} == before


@pytest.mark.slow
def test_other_networks_follow_once(timed):
    folders = []
    run(timed, MINUTES, killed, others={"probe": folders.append})
    run(timed, MINUTES, killed, others={"probe": killed, "encoders": folders.append})
    assert folders == [timed / "probe", timed / "encoders"]


@pytest.mark.slow
def test_all_stages_go_on_from_earlier_weights(timed, tmp_path):
    """One more step of next to no length of each."""
    folder = str(timed / "pipeline")
    more = config("all", num_steps=1, pretrained=folder).unlock()
    for stage in STAGES:
        more[stage].training.optimizer.learning_rate = 1e-9
    pipeline, given = pretrain_cascade(Pretraining(more.lock(), tmp_path, load)), load_pipeline(folder)
    for name in ("text_encoder", *STAGES):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), pipeline.params[name], given.params[name]
        )
    assert given.tokenizer.counts.sum() < pipeline.tokenizer.counts.sum()
    assert manifest.read(tmp_path)["data"]["start"] == given.fingerprint


@pytest.mark.slow
def test_one_stage_has_the_whole_budget(timed, tmp_path):
    """Here the second one, of a base model that is there already."""
    pipeline = run(tmp_path, 0.3, pretrained=str(timed / "base" / "pipeline"), train=STAGES[1:])
    assert [stage.name for stage in pipeline.stages] == [*STAGES]
    assert json.loads((tmp_path / STAGES[1] / "length.json").read_text())["num_steps"] > 10


def test_a_stage_is_configured_as_by_itself():
    both = pretrain_world.get_config("all")
    for stage in STAGES:
        alone = pretrain_world.get_config(stage)
        section = section_of(both, stage).to_dict()
        assert section.keys() - alone.keys() == {"share"}
        assert {key: section[key] for key in alone if key != "pretrained"} == {
            key: value for key, value in alone.to_dict().items() if key != "pretrained"
        }


def test_accelerators_have_values_of_their_own_but_for_those_that_are_given():
    both = pretrain_world.get_config("all")
    assert on_this_machine(both, "cpu", {}).to_dict() == both.to_dict()
    given = {"base.training.batch_size": 64, "decay_share": 0.25}
    for backend in ("gpu", "tpu"):
        changed = on_this_machine(both, backend, given)
        check_keys(changed, rules_of_pretraining(changed))
        assert changed.base.training.batch_size == 64
        for stage in STAGES:
            training = changed[stage].training
            assert training.steps_per_dispatch > 1 and training.num_steps % training.steps_per_dispatch == 0
            assert changed[stage].dataset.count > both[stage].dataset.count
    assert both.base.training.batch_size == pretrain_world.get_config("base").training.batch_size


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train": STAGES[::-1]}, "base after super_resolution, whose pictures have 16 pixels.*low_resolution is None"),
        ({"train": STAGES[:1] * 2}, "base after base"),
        ({"train": STAGES[1:]}, "begins with super_resolution, which brings no text encoder; give --config.pretrained"),
    ],
)
def test_stages_out_of_order_are_refused(tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        run(tmp_path / "run", load=killed, **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_another_budget_or_none_is_refused(timed):
    for minutes in (2 * MINUTES, None):
        with pytest.raises(UserError, match="begun with another configuration .different: budget_minutes"):
            run(timed, minutes, load=killed)


@pytest.mark.slow
def test_weights_of_another_network_are_refused_before_anything_is_trained(timed, tmp_path):
    other = config("all", pretrained=str(timed / "pipeline")).unlock()
    other.super_resolution.stage.network = {**tiny_pretraining.SMALLEST, "channels": (32,)}
    with pytest.raises(UserError, match="The super_resolution of .* has another network than config.stage"):
        pretrain_cascade(Pretraining(other.lock(), tmp_path / "run", killed))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            ["base", "--budget_minutes=9"],
            "--budget_minutes goes with all stages, --config=configs/pretrain_world.py:all",
        ),
        (["base", "--with_probe"], "--with_probe goes with all stages"),
        (["all", "--budget_minutes=0"], "--budget_minutes is 0.0; give a number above 0"),
        (["all", "--config.train=('decoder',)"], "give one or more of base, super_resolution, in the order"),
        (["all", "--config.base.share=0"], "config.base.share is 0.0; give a finite number above 0"),
    ],
)
def test_the_command_refuses_what_makes_no_sense(tmp_path, flags, sentence):
    flags = [f"--config=tests/tiny_pretraining.py:{flags[0]}", f"--workdir={tmp_path / 'run'}", *flags[1:]]
    finished = processes.command(tmp_path, "personalize_jax.pretrain", *flags, f"--data_dir={tmp_path / 'data'}")
    assert finished.status == 2 and sentence in finished.error.splitlines()[-1]
    assert not (tmp_path / "run").exists() and not (tmp_path / "data").exists()


@pytest.mark.slow
def test_the_command_renders_trains_and_saves(tmp_path):
    def start(name, *flags, before=None):
        given = (
            "--config=tests/tiny_pretraining.py:all",
            f"--data_dir={tmp_path / 'data'}",
            f"--workdir={tmp_path / name}",
        )
        return processes.command(tmp_path, "personalize_jax.pretrain", *given, *flags, before=before)

    finished = start("run", "--with_probe", before=tiny_pretraining.train_no_probe)
    assert finished.status == 0, finished.error
    assert (tmp_path / "run" / "probe" / "probe.json").exists() and not (tmp_path / "run" / "encoders").exists()
    assert manifest.read(tmp_path / "run")["done"]
    assert [stage.name for stage in load_pipeline(tmp_path / "run" / "pipeline").stages] == [*STAGES]
    finished = start("timed", "--budget_minutes=0.001")
    assert finished.status == 2 and "The time of base was over before it had its pictures" in finished.error
    finished = start("timed")
    assert finished.status == 2 and "another configuration (different: budget_minutes)" in finished.error
