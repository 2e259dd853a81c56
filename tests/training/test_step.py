import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from personalize_jax.training.examples import Batch
from personalize_jax.training.step import init_state, make_train_step, make_train_steps

FROZEN = {"offset": jnp.array(2.0)}


def quadratic(params, frozen_params, batch, rng):
    """Distance of w + offset from the batch's mean; offset is frozen."""
    error = params["w"] + params["offset"] - batch["instance"].x.mean()
    return jnp.sum(error**2), {"error": jnp.sum(error)}


def batch_of(value=1.0, tokens=((1, 2),)):
    return {"instance": Batch(jnp.full((1, 2, 2, 3), value), jnp.array(tokens), None, None, None)}


def test_only_trained_parameters_move_and_by_their_gradient():
    optimizer = optax.sgd(0.1)
    state = init_state({"w": jnp.array(3.0)}, optimizer, ema=False, vocabulary_size=None)
    new, metrics = make_train_step(quadratic, optimizer, 0.0)(state, FROZEN, batch_of(), jax.random.key(0))
    assert set(new.params) == {"w"}
    assert new.params["w"] == pytest.approx(3.0 - 0.1 * 2 * 4.0)
    assert metrics["loss"] == 16.0 and metrics["gradient_norm"] == 8.0 and metrics["error"] == 4.0
    assert new.step == 1 and new.ema is None and new.token_counts is None


def test_average_follows_closely_at_first_and_slowly_later():
    optimizer = optax.sgd(0.1)
    step = jax.jit(make_train_step(quadratic, optimizer, 0.5))
    state = init_state({"w": jnp.array(3.0)}, optimizer, ema=True, vocabulary_size=None)
    expected = 3.0
    for n in range(12):
        state, _ = step(state, FROZEN, batch_of(), jax.random.key(0))
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * float(state.params["w"])
        assert state.ema["w"] == pytest.approx(expected, rel=1e-5)


def test_tokens_of_both_halves_are_counted():
    optimizer = optax.sgd(0.1)
    state = init_state({"w": jnp.array(3.0)}, optimizer, ema=False, vocabulary_size=6)
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
    steps = make_train_steps(train_step, lambda e, key: batch_of(jax.random.normal(key)), jax.random.key(4), count)
    return jax.jit(steps), init_state({"w": jnp.array(3.0)}, optimizer, ema=True, vocabulary_size=6)


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
