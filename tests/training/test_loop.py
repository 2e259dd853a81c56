import contextlib
import dataclasses
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from personalize_jax.families import targets
from personalize_jax.families.world import read_stage
from personalize_jax.runtime import interruption
from personalize_jax.runtime.errors import UserError
from personalize_jax.training import examples as training_examples
from personalize_jax.training import loop
from personalize_jax.training.checkpoint import Checkpoints
from personalize_jax.training.loop import train
from personalize_jax.training.program import stage_program
from personalize_jax.training.trained import latest_state, trained_of, trained_params
from tests import tiny
from tests.logged import metrics_of
from tests.training import worker

ROOT = Path(__file__).parents[2]
STAGE = dataclasses.replace(read_stage(tiny.BASE), network=tiny.LinearNetwork())
FAMILY = tiny.LinearFamily()
EVERYTHING = ((".*", True),)


def train_linear(directory, progress=lambda step, metrics: None, start=None, names=("instance",), seed=0, **changes):
    examples = {name: tiny.examples(seed=i) for i, name in enumerate(names)}
    config = tiny.training(**changes)
    program = stage_program(STAGE, FAMILY, start or tiny.linear_params(), examples, config, seed)
    return train(program, directory, progress)


def no_steps():
    """A progress that wants to hear where a training begins, and of nothing else."""
    told = []

    def progress(step, metrics):
        told.append(step)
        assert len(told) == 1, "a step was done"

    return progress


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    return worker.train(directory), metrics_of(directory)


@pytest.mark.slow
def test_killed_and_resumed_it_is_the_uninterrupted_run_bit_for_bit(uninterrupted, tmp_path):
    command = [sys.executable, "-m", "tests.training.worker", "be_killed", str(tmp_path)]
    assert subprocess.run(command, cwd=ROOT, env=os.environ, timeout=1800).returncode == -signal.SIGKILL
    assert [line["step"] for line in metrics_of(tmp_path)] == [1, 2, 3, 4, 5]
    done = []
    state = worker.train(tmp_path, lambda step, metrics: done.append(step))
    assert done == [3, 4, 5, 6]
    expected, metrics = uninterrupted
    assert_equal(state, expected)
    assert metrics_of(tmp_path) == metrics


@pytest.mark.slow
def test_asked_to_stop_it_saves_between_two_steps_and_goes_on_from_there(uninterrupted, tmp_path):
    def progress(step, metrics):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with interruption.on_signals():
        with pytest.raises(interruption.Stopped):
            worker.train(tmp_path, progress)
        with pytest.raises(interruption.Stopped):  # asked before it has begun
            worker.train(tmp_path, no_steps())
    assert int(latest_state(tmp_path).step) == 4
    state = worker.train(tmp_path)
    expected, metrics = uninterrupted
    assert_equal(state, expected)
    assert metrics_of(tmp_path) == metrics


def test_training_moves_everything_that_is_trained_and_the_average_behind_it(uninterrupted):
    state, metrics = uninterrupted
    moved, behind = (
        jax.tree.map(lambda a, b: float(abs(a - b).max()), tree, worker.start()) for tree in (state.params, state.ema)
    )
    assert min(jax.tree.leaves(moved)) > 0
    assert 0 < sum(jax.tree.leaves(behind)) < sum(jax.tree.leaves(moved))
    assert metrics[0].keys() == {"step", "loss", "instance_loss", "prior_loss", "gradient_norm"}
    for line in metrics:
        assert line["loss"] == pytest.approx(line["instance_loss"] + 0.7 * line["prior_loss"], rel=1e-5)


def test_checkpoints_are_no_further_apart_than_asked_for_where_dispatches_do_not_meet_them(tmp_path):
    class Killed(Exception):
        pass

    def progress(step, metrics):
        if step == 9:
            raise Killed

    with pytest.raises(Killed):
        train_linear(tmp_path, progress, num_steps=12, steps_per_dispatch=3, checkpoint_every=4)
    assert int(latest_state(tmp_path).step) == 6


def test_a_finished_training_is_not_continued(tmp_path):
    state = train_linear(tmp_path)
    again = train_linear(tmp_path, no_steps())
    assert_equal(again, state)


def test_a_checkpoint_of_a_version_that_kept_no_key_goes_on_as_that_would_have(tmp_path):
    expected = train_linear(tmp_path / "whole")
    train_linear(tmp_path / "before", num_steps=3)
    state, folder = latest_state(tmp_path / "before"), tmp_path / "before" / "checkpoints"
    shutil.rmtree(folder)
    earlier = {name: value for name, value in state._asdict().items() if name not in ("key", "token_ids")}
    with contextlib.closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save(3, earlier)
    assert_equal(train_linear(tmp_path / "before"), expected)


def test_more_steps_prolong_a_finished_training(tmp_path):
    train_linear(tmp_path / "a", num_steps=4)
    prolonged = train_linear(tmp_path / "a", num_steps=8)
    assert_equal(prolonged, train_linear(tmp_path / "b", num_steps=8))


def test_fewer_steps_than_are_done_are_refused(tmp_path):
    state = train_linear(tmp_path)
    with pytest.raises(UserError, match=r"has done 6 steps already, more than num_steps=5; give num_steps=6 or more"):
        train_linear(tmp_path, no_steps(), num_steps=5)
    assert_equal(train_linear(tmp_path, no_steps()), state)


def test_a_length_is_refused_that_would_be_none_of_one_training(tmp_path):
    decayed = tiny.training(optimizer__decay_steps=4, num_steps=8)
    loop.check_length(tmp_path, decayed, 6)  # not yet begun
    train_linear(tmp_path)
    with pytest.raises(UserError, match=r"done 6 of 6 steps.*falls over the last 4: with num_steps=8.*num_steps=6"):
        loop.check_length(tmp_path, decayed, 6)
    loop.check_length(tmp_path, tiny.training(num_steps=8), 6)
    with pytest.raises(UserError, match="has done 6 steps already"):
        loop.check_length(tmp_path, tiny.training(num_steps=5), 6)


def test_a_rounded_first_moment_stays_rounded_over_a_resume(tmp_path):
    """Half of the steps in each of two calls."""
    rounded = {"optimizer__moment_dtype": "bfloat16", "optimizer__learning_rate": 0.1}
    expected = train_linear(tmp_path / "once", num_steps=6, **rounded)
    train_linear(tmp_path / "twice", num_steps=3, **rounded)
    state = train_linear(tmp_path / "twice", num_steps=6, **rounded)
    assert_equal(state, expected)
    for mu, nu in zip(*(jax.tree.leaves(optax.tree_utils.tree_get(state, name)) for name in ("mu", "nu")), strict=True):
        assert mu.dtype == jnp.bfloat16 and nu.dtype == jnp.float32


def test_metrics_are_logged_at_the_given_steps_and_the_last(tmp_path):
    train_linear(tmp_path, num_steps=8, log_every=3)
    assert [line["step"] for line in metrics_of(tmp_path)] == [3, 6, 8]


def test_a_line_cut_short_by_a_crash_is_dropped(tmp_path):
    train_linear(tmp_path)
    expected = metrics_of(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as f:
        f.write('{"step": 7, "lo')
    train_linear(tmp_path, num_steps=6)
    assert metrics_of(tmp_path) == expected


def test_two_steps_a_dispatch_give_the_same_parameters(tmp_path):
    one = train_linear(tmp_path / "one", ema_decay=0.9, trainable=EVERYTHING)
    two = train_linear(tmp_path / "two", ema_decay=0.9, trainable=EVERYTHING, steps_per_dispatch=2, log_every=3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), one, two)
    assert [line["step"] for line in metrics_of(tmp_path / "two")] == [4, 6]  # the dispatches that step 3 and 6 are in


def test_token_counts_are_those_of_the_sampled_captions_over_a_resume_too(tmp_path, monkeypatch):
    sampled = []
    sample_batch = training_examples.sample_batch

    def recording(*args):
        batch = sample_batch(*args)
        jax.debug.callback(lambda tokens: sampled.append(np.asarray(tokens)), batch.tokens)
        return batch

    monkeypatch.setattr(training_examples, "sample_batch", recording)
    for num_steps in (4, 7):
        state = train_linear(tmp_path, num_steps=num_steps, trainable=EVERYTHING, caption_dropout=0.3)
        jax.effects_barrier()
    assert len(sampled) == 7
    expected = np.bincount(np.concatenate(sampled).ravel(), minlength=FAMILY.vocabulary_size)
    np.testing.assert_array_equal(state.token_counts, expected)
    assert np.count_nonzero(expected) > 5


@pytest.mark.parametrize("form", ["sampled", "frozen_prediction"])
def test_frozen_parameters_stay_as_they_are_and_usable(tmp_path, form):
    start = tiny.linear_params()
    state = train_linear(
        tmp_path, start=start, names=("instance", "prior"), prior__weight=1.0, prior__form=form, num_steps=3
    )
    assert set(state.params) == {"denoiser"} and state.token_counts is None
    assert_equal(start, tiny.linear_params())
    assert not np.array_equal(state.params["denoiser"]["scale"], start["denoiser"]["scale"])
    assert_equal(trained_params(trained_of(state), start)["text_encoder"], start["text_encoder"])


def test_frozen_prediction_starts_without_prior_loss(tmp_path):
    both = {"names": ("instance", "prior"), "prior__weight": 1.0, "prior__form": "frozen_prediction"}
    train_linear(tmp_path, num_steps=3, optimizer__learning_rate=0.1, **both)
    prior = [line["prior_loss"] for line in metrics_of(tmp_path)]
    assert prior[0] < 1e-12 < 1e-4 < prior[1] < prior[2]  # 0 but for rounding in two programs


def test_another_form_of_the_prior_term_is_a_function_and_a_line_of_the_table(tmp_path, monkeypatch):
    def half_way(stage, batch, noisy, frozen_prediction):
        return (targets.picture(stage, batch, noisy, frozen_prediction) + frozen_prediction()) / 2

    monkeypatch.setitem(targets.PRIOR_FORMS, "half_way", targets.Target(half_way, needs_frozen=True))
    both = {"names": ("instance", "prior"), "prior__weight": 1.0, "num_steps": 2}
    for form in ("sampled", "half_way"):
        train_linear(tmp_path / form, prior__form=form, **both)
    sampled, blended = (metrics_of(tmp_path / form) for form in ("sampled", "half_way"))
    # Before the first step the frozen network is the one in training: half of the error is a quarter of its square.
    assert blended[0]["prior_loss"] == pytest.approx(sampled[0]["prior_loss"] / 4, rel=1e-5)
    assert blended[1]["loss"] != sampled[1]["loss"]


def test_samples_come_from_the_average_where_there_is_one(tmp_path):
    start = tiny.linear_params()
    averaged = train_linear(tmp_path / "a", ema_decay=0.9)
    last = train_linear(tmp_path / "b")
    assert_equal(trained_params(trained_of(averaged), start)["denoiser"], averaged.ema["denoiser"])
    assert_equal(trained_params(trained_of(last), start)["denoiser"], last.params["denoiser"])


def cut_checkpoint(directory, step):
    for file in (directory / "checkpoints" / str(step)).rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_a_damaged_checkpoint_costs_only_the_steps_since_the_one_before(tmp_path, caplog):
    state = train_linear(tmp_path)
    cut_checkpoint(tmp_path, 6)
    done = []
    with caplog.at_level(logging.WARNING):
        again = train_linear(tmp_path, lambda step, metrics: done.append(step))
    assert done == [3, 4, 5, 6] and "Checkpoint 6" in caplog.text
    assert_equal(again, state)
    assert_equal(train_linear(tmp_path), state)  # and the last step was saved anew


def test_with_no_readable_checkpoint_nothing_is_trained(tmp_path):
    train_linear(tmp_path)
    for step in (3, 6):
        cut_checkpoint(tmp_path, step)
    with pytest.raises(UserError, match="None of the checkpoints"):
        train_linear(tmp_path, no_steps())


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_diverged_training_stops_and_keeps_its_last_finite_checkpoint(tmp_path, log_every):
    train_linear(tmp_path, num_steps=2)
    with pytest.raises(UserError, match="learning_rate"):
        train_linear(tmp_path, num_steps=50, log_every=log_every, optimizer__learning_rate=1e30, checkpoint_every=1)
    state = train_linear(tmp_path, no_steps(), num_steps=3)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


def test_settings_that_do_not_fit_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="num_steps is 5 and steps_per_dispatch 2"):
        train_linear(tmp_path / "run", num_steps=5, steps_per_dispatch=2)
    for parts in (3, 0):
        with pytest.raises(UserError, match=f"batch_size is 4 and microbatches {parts}"):
            train_linear(tmp_path / "run", microbatches=parts)
    with pytest.raises(UserError, match=r"\(3, 1, 1\).*1 devices"):
        train_linear(tmp_path / "run", mesh=(3, 1, 1))
    with pytest.raises(UserError, match="no rule of config.training.trainable"):
        train_linear(tmp_path / "run", trainable=(("denoiser/", True),))
    with pytest.raises(UserError, match="no rule of config.sharding"):
        train_linear(tmp_path / "run", sharding=(("kernel", ("tensor",)),))
    assert not (tmp_path / "run").exists()
