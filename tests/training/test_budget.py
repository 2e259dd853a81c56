import contextlib
import json
import os
import signal

import jax
import numpy as np
import pytest

from personalize_jax.runtime import interruption
from personalize_jax.runtime.errors import UserError
from personalize_jax.training import budget as timed_training
from personalize_jax.training.budget import (
    FILE,
    SAVED,
    Budget,
    Length,
    compiling_saved,
    of_length,
    train_until_length_is_known,
)
from personalize_jax.training.loop import train
from personalize_jax.training.trained import latest_state
from tests import processes
from tests.training.timed import STARTING, Machine, choose_together, linear_program
from tests.waiting import PATIENCE


@pytest.fixture(autouse=True)
def unsaved(monkeypatch):
    """Whether programs are in the cache already is left out of account."""
    monkeypatch.setattr(timed_training, "compiling_saved", lambda: contextlib.nullcontext([]))


def budget(seconds=100.0, decay_share=0.5, clock=None):
    return Budget(seconds, decay_share, clock or Machine())


def no_steps(step, metrics):
    raise AssertionError("a step was done")


def die_at(death, kind=RuntimeError):
    """A progress that dies after so many steps."""

    def progress(step, metrics):
        if step == death:
            raise kind

    return progress


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(("step_seconds", "dispatch"), [(1.0, 1), (0.25, 1), (0.5, 4)])
@pytest.mark.parametrize("decay_share", [0.25, 0.5])
def test_the_time_is_used_and_not_exceeded(tmp_path, step_seconds, dispatch, decay_share):
    program = linear_program(steps_per_dispatch=dispatch, num_steps=dispatch)
    machine = Machine(step_seconds, dispatch)
    length = train_until_length_is_known(program, tmp_path, budget(100, decay_share, machine))
    # Both programs, of the steps before and after the rate begins to fall, are compiled.
    assert 90 < 2 * STARTING + length.num_steps * step_seconds <= 100
    assert length.decay_steps / length.num_steps == pytest.approx(decay_share, abs=2 * dispatch / length.num_steps)
    assert length.num_steps % dispatch == length.decay_steps % dispatch == 0
    assert int(latest_state(tmp_path).step) == length.num_steps - length.decay_steps


def test_it_is_the_training_whose_length_was_given_bit_for_bit(tmp_path):
    program = linear_program(optimizer__warmup_steps=5, optimizer__learning_rate=0.01)
    length = train_until_length_is_known(program, tmp_path / "timed", budget())
    timed = train(of_length(program, length), tmp_path / "timed")
    given = linear_program(
        optimizer__warmup_steps=5,
        optimizer__learning_rate=0.01,
        optimizer__decay_steps=length.decay_steps,
        num_steps=length.num_steps,
    )
    expected = train(given, tmp_path / "given")
    assert_equal(timed, expected)
    constant = train(of_length(given, Length(length.num_steps, 1)), tmp_path / "constant")
    assert not np.array_equal(constant.params["denoiser"]["scale"], expected.params["denoiser"]["scale"])


@pytest.mark.parametrize("death", [2, *(pytest.param(step, marks=pytest.mark.slow) for step in (9, 20)), 37])
def test_killed_before_the_choice_it_chooses_the_same(tmp_path, death):
    """On a machine that is as fast, and compiles as long, and whatever time the second call would have."""
    program = linear_program()
    expected = train_until_length_is_known(program, tmp_path / "whole", budget())
    assert death < expected.num_steps - expected.decay_steps
    directory = tmp_path / "killed"
    with pytest.raises(RuntimeError):
        train_until_length_is_known(program, directory, budget(), die_at(death))
    assert train_until_length_is_known(program, directory, budget(seconds=1000.0)) == expected
    states = [train(of_length(program, expected), folder) for folder in (tmp_path / "whole", directory)]
    assert_equal(*states)


def test_what_is_chosen_stays(tmp_path):
    program = linear_program()
    length = train_until_length_is_known(program, tmp_path, budget())
    for death in (length.num_steps - 20, length.num_steps - 3):
        with pytest.raises(RuntimeError):
            train(of_length(program, length), tmp_path, die_at(death))
        slow = budget(clock=Machine(step_seconds=50.0))
        assert train_until_length_is_known(program, tmp_path, slow, no_steps) == length
    assert int(train(of_length(program, length), tmp_path).step) == length.num_steps
    assert train_until_length_is_known(program, tmp_path, budget(), no_steps) == length


def test_asked_to_stop_it_saves_and_goes_on(tmp_path):
    def ask(step, metrics):
        if step == 12:
            os.kill(os.getpid(), signal.SIGTERM)

    program = linear_program()
    with interruption.on_signals(), pytest.raises(interruption.Stopped):
        train_until_length_is_known(program, tmp_path, budget(), ask)
    assert int(latest_state(tmp_path).step) == 12
    done = []
    train_until_length_is_known(program, tmp_path, budget(), lambda step, metrics: done.append(step))
    assert done[:2] == [12, 13]


def test_slower_steps_make_a_shorter_training(tmp_path):
    """Even if they become slow only after a while."""

    class Slowing(Machine):
        def __call__(self):
            seconds = super().__call__()
            return seconds + 3 * max(0.0, seconds - 20.0)

    steady, slowing = (
        train_until_length_is_known(linear_program(), tmp_path / clock.__class__.__name__, budget(300.0, clock=clock))
        for clock in (Machine(), Slowing())
    )
    assert slowing.num_steps < 0.5 * steady.num_steps


def test_what_the_cache_saves_at_first_is_not_saved_again(tmp_path, monkeypatch):
    def save(step, metrics):
        if step == 0:
            jax.monitoring.record_event_duration_secs(SAVED, 40.0)

    cold = train_until_length_is_known(linear_program(), tmp_path / "cold", budget())
    monkeypatch.setattr(timed_training, "compiling_saved", compiling_saved)
    warm = train_until_length_is_known(linear_program(), tmp_path / "warm", budget(), save)
    assert 40 <= cold.num_steps - warm.num_steps < 55  # and what it really saved


@pytest.mark.slow
def test_two_processes_choose_by_the_clock_of_the_first(tmp_path):
    address = processes.free_address()
    together = [processes.start(choose_together, i, address, tmp_path) for i in range(2)]
    for process in together:
        process.join(PATIENCE)
        process.kill()
    assert [process.exitcode for process in together] == [0, 0]
    chosen = [json.loads((tmp_path / f"chosen_{i}").read_text()) for i in range(2)]
    assert chosen[0] == chosen[1] and chosen[0][0] > 50  # the other's clock allows 25


def test_too_little_time_is_told(tmp_path):
    with pytest.raises(UserError, match=r"time of base was over before it had its pictures.*larger --budget_minutes"):
        train_until_length_is_known(linear_program(), tmp_path / "base", budget(seconds=0.0), no_steps)
    assert not (tmp_path / "base").exists()
    with pytest.raises(UserError, match=r"has 15 seconds, which allow 0 steps, as starting takes 20 s and a step 1 s"):
        train_until_length_is_known(linear_program(), tmp_path / "compiling", budget(seconds=15.0))
    # What made the time short, rendering or compiling, need not be repeated: the next call has its own time.
    assert train_until_length_is_known(linear_program(), tmp_path / "compiling", budget()).num_steps == 77
    warming = linear_program(optimizer__warmup_steps=60)
    with pytest.raises(UserError, match=r"100 seconds, which allow 77 steps.*rises over 60; give a larger"):
        train_until_length_is_known(warming, tmp_path / "warming", budget())


def test_a_damaged_length_is_told(tmp_path):
    train_until_length_is_known(linear_program(), tmp_path, budget())
    assert json.loads((tmp_path / FILE).read_text())["seconds"] == 100
    (tmp_path / FILE).write_text('{"seconds": 100, "num')
    with pytest.raises(UserError, match=r"length.json is damaged"):
        train_until_length_is_known(linear_program(), tmp_path, budget(), no_steps)
