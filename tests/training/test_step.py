import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from diffusers.training_utils import EMAModel

from personalize_jax.families.batch import Batch
from personalize_jax.training.step import init_state, make_train_step, make_train_steps

FROZEN = {"offset": jnp.array(2.0)}
KEY = jax.random.key(4)


def quadratic(params, frozen_params, batch, rng):
    """Distance of w + offset from the batch's mean; offset is frozen."""
    error = params["w"] + params["offset"] - batch["instance"].x.mean()
    return jnp.sum(error**2), {"error": jnp.sum(error)}


def batch_of(value=1.0, tokens=((1, 2),)):
    return {"instance": Batch(jnp.full((1, 2, 2, 3), value), jnp.array(tokens), None, None, None)}


def test_only_trained_parameters_move_and_by_their_gradient():
    optimizer = optax.sgd(0.1)
    state = init_state({"w": jnp.array(3.0)}, optimizer, KEY)
    new, metrics = make_train_step(quadratic, optimizer, 0.0)(state, FROZEN, batch_of(), jax.random.key(0))
    assert set(new.params) == {"w"}
    assert new.params["w"] == pytest.approx(3.0 - 0.1 * 2 * 4.0)
    assert metrics["loss"] == 16.0 and metrics["gradient_norm"] == 8.0 and metrics["error"] == 4.0
    assert new.step == 1 and new.ema is None and new.token_counts is None


def test_average_follows_closely_at_first_and_slowly_later():
    """With the decay that diffusers' average has, from the second step on: its first one only copies."""
    theirs = EMAModel([torch.nn.Parameter(torch.zeros(1))], decay=0.5)
    optimizer = optax.sgd(0.1)
    step = jax.jit(make_train_step(quadratic, optimizer, 0.5))
    state = init_state({"w": jnp.array(3.0)}, optimizer, KEY, ema=True)
    decays = []
    for _ in range(12):
        before = state.ema["w"]
        state, _ = step(state, FROZEN, batch_of(), jax.random.key(0))
        decays.append(float((state.ema["w"] - state.params["w"]) / (before - state.params["w"])))
    assert decays[0] == pytest.approx(0.1, rel=1e-4)
    np.testing.assert_allclose(decays[1:], [theirs.get_decay(n + 1) for n in range(1, 12)], rtol=1e-3)
    assert decays[-1] == pytest.approx(0.5, rel=1e-3)


def test_tokens_of_all_groups_are_counted():
    optimizer = optax.sgd(0.1)
    state = init_state({"w": jnp.array(3.0)}, optimizer, KEY, vocabulary_size=6)
    batch = {**batch_of(tokens=((1, 2, 2), (5, 2, 0))), "prior": batch_of(tokens=((5, 0, 0),))["instance"]}
    step = make_train_step(quadratic, optimizer, 0.0)
    for _ in range(2):
        state, _ = step(state, FROZEN, batch, jax.random.key(0))
    np.testing.assert_array_equal(state.token_counts, 2 * np.array([3, 1, 3, 0, 0, 2]))


def noisy_steps(count):
    """Steps whose batch and loss both depend on their keys; the metrics tell what was drawn."""

    def loss(params, frozen_params, batch, rng):
        value, terms = quadratic(params, frozen_params, batch, rng)
        noise = jax.random.normal(rng)
        return value + params["w"] * noise, {**terms, "noise": noise, "drawn": batch["instance"].x.mean()}

    optimizer = optax.adam(0.1)
    train_step = make_train_step(loss, optimizer, 0.9)
    steps = make_train_steps(train_step, lambda e, key: batch_of(jax.random.normal(key)), count)
    return jax.jit(steps), init_state({"w": jnp.array(3.0)}, optimizer, KEY, ema=True, vocabulary_size=6)


def test_two_steps_in_one_dispatch_are_two_steps():
    one, state = noisy_steps(1)
    two, _ = noisy_steps(2)
    expected, metrics = state, []
    for _ in range(4):
        expected, m = one(expected, FROZEN, {})
        metrics.append(m)
    got, _ = two(state, FROZEN, {})
    got, mean = two(got, FROZEN, {})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), got, expected)
    for name, value in mean.items():
        assert value == pytest.approx(np.mean([float(metrics[i][name]) for i in (2, 3)]), rel=1e-4, abs=1e-5)


def test_every_step_has_keys_of_its_own_which_only_its_number_decides():
    steps, state = noisy_steps(1)
    drawn = []
    for n in range(5):
        _, metrics = steps(state._replace(step=jnp.asarray(n, jnp.int32)), FROZEN, {})
        drawn += [float(metrics["noise"]), float(metrics["drawn"])]
    assert len(set(drawn)) == len(drawn)
    _, again = steps(state._replace(step=jnp.asarray(3, jnp.int32)), FROZEN, {})
    assert float(again["noise"]) == drawn[6]


ROWS = 8


def rows_of(tokens_per_row=2):
    x = jnp.arange(float(ROWS * 3)).reshape(ROWS, 1, 1, 3) / 10
    tokens = jnp.arange(ROWS * tokens_per_row).reshape(ROWS, -1) % 6
    return {name: Batch(sign * x, tokens, None, None, None) for name, sign in (("instance", 1), ("prior", -2))}


def regression(params, frozen_params, batch, rng):
    """A mean over rows, with a gradient that differs between them and no randomness."""
    instance, prior = (jnp.tanh(params["w"] * batch[name].x + params["offset"]) for name in ("instance", "prior"))
    prior_loss = jnp.mean(jnp.square(prior - batch["prior"].x))
    return jnp.mean(jnp.square(instance - 1)) + prior_loss, {"prior_loss": prior_loss}


def test_microbatches_give_the_step_of_the_whole_batch():
    optimizer = optax.sgd(0.1)
    state = init_state({"w": normal_vector()}, optimizer, KEY, ema=True, vocabulary_size=6)
    whole, parts = (
        jax.jit(make_train_step(regression, optimizer, 0.9, k))(state, FROZEN, rows_of(), jax.random.key(0))
        for k in (1, 4)
    )
    assert parts[1].keys() == whole[1].keys()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), parts, whole)
    assert not np.allclose(whole[0].params["w"], state.params["w"], atol=1e-3)


def normal_vector():
    return jnp.array([0.3, -0.2, 0.5])


def test_the_parts_of_a_batch_are_all_of_it_each_with_its_own_key_in_one_trace():
    traces, seen = [], []

    def loss(params, frozen_params, batch, rng):
        traces.append(batch["instance"].x.shape)
        noise = jax.random.normal(rng)
        jax.debug.callback(lambda x, n: seen.append((x.ravel().tolist(), float(n))), batch["instance"].x[..., 0], noise)
        return jnp.sum(params["w"]) * noise, {}

    optimizer = optax.sgd(0.1)
    state = init_state({"w": normal_vector()}, optimizer, KEY)
    jax.block_until_ready(
        jax.jit(make_train_step(loss, optimizer, 0.0, 4))(state, FROZEN, rows_of(), jax.random.key(0))
    )
    jax.effects_barrier()
    assert set(traces) == {(ROWS // 4, 1, 1, 3)} and len(traces) < 4
    rows, noise = zip(*seen, strict=True)
    np.testing.assert_array_equal(sorted(sum(rows, [])), rows_of()["instance"].x[:, 0, 0, 0])
    assert len(set(noise)) == 4
