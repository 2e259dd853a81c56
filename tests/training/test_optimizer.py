import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from personalize_jax.training.optimizer import make_optimizer
from tests import tiny


def path(num_steps, gradient=1.0, **changes):
    """Values of a parameter, from 0, under a constant gradient."""
    optimizer = make_optimizer(tiny.training(**changes).optimizer, num_steps)
    params, values = jnp.zeros(()), [0.0]
    state = optimizer.init(params)
    for _ in range(num_steps):
        updates, state = optimizer.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
        values.append(float(params))
    return np.array(values)


def test_learning_rate_rises_stays_and_falls_to_zero():
    """Adam moves by the learning rate itself under a constant gradient."""
    rates = -np.diff(path(10, optimizer__learning_rate=0.1, optimizer__warmup_steps=4, optimizer__decay_steps=4))
    expected = [0, 0.025, 0.05, 0.075, 0.1, 0.1, 0.1, 0.075, 0.05, 0.025]
    np.testing.assert_allclose(rates, expected, atol=1e-6)


def test_without_warmup_and_decay_the_rate_is_constant():
    np.testing.assert_allclose(-np.diff(path(5, optimizer__learning_rate=0.1)), 0.1, rtol=1e-5)


def test_more_steps_change_nothing_before_the_decay():
    changes = {"optimizer__learning_rate": 0.1, "optimizer__decay_steps": 2}
    np.testing.assert_array_equal(path(5, **changes)[:4], path(9, **changes)[:4])


def test_gradients_are_clipped_by_their_norm():
    optimizer = make_optimizer(tiny.training(optimizer__clip_norm=1.0).optimizer, 10)
    params = {"a": jnp.zeros(3), "b": jnp.zeros(4)}
    states = []
    for scale in (1.0, 1000.0):  # both beyond the norm: Adam's moments must come out the same
        gradient = {"a": jnp.full(3, 2.0 * scale), "b": jnp.full(4, -scale)}
        states.append(optimizer.update(gradient, optimizer.init(params), params)[1])
    first, second = (optax.tree_utils.tree_get(state, "mu") for state in states)
    np.testing.assert_allclose(first["a"], second["a"], rtol=1e-5)
    norm = optax.global_norm(first)
    assert norm == pytest.approx(0.1, rel=1e-4)  # (1 - b1) times a unit gradient


def fitted(moment_dtype, num_steps=300):
    """A line fitted to points by least squares from noisy gradients: parameters, and the optimiser's state."""
    config = tiny.training(
        optimizer__learning_rate=0.05, optimizer__decay_steps=200, optimizer__moment_dtype=moment_dtype
    )
    optimizer = make_optimizer(config.optimizer, num_steps)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(num_steps, 64, 8)), jnp.float32)
    y = x @ jnp.linspace(-1, 1, 8) + 0.1 * jnp.asarray(rng.normal(size=x.shape[:2]), jnp.float32)

    def step(carry, batch):
        params, state = carry
        gradient = jax.grad(lambda p: jnp.mean((batch[0] @ p["slope"] - batch[1]) ** 2))(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    params = {"slope": jnp.zeros(8)}
    return jax.lax.scan(step, (params, optimizer.init(params)), (x, y))[0]


def moments(state):
    return (optax.tree_utils.tree_get(state, name)["slope"] for name in ("mu", "nu"))


def test_a_first_moment_in_bfloat16_takes_half_the_bytes_and_fits_as_well():
    (exact, exact_state), (rounded, state) = fitted("float32"), fitted("bfloat16")
    (mu, nu), (exact_mu, exact_nu) = moments(state), moments(exact_state)
    assert mu.dtype == jnp.bfloat16 and nu.dtype == exact_mu.dtype == exact_nu.dtype == jnp.float32
    assert 2 * mu.nbytes == exact_mu.nbytes and nu.nbytes == exact_nu.nbytes
    for params in (exact, rounded):
        np.testing.assert_allclose(params["slope"], np.linspace(-1, 1, 8), atol=0.02)
    assert rounded["slope"].dtype == jnp.float32


def test_a_second_moment_in_bfloat16_would_stall():
    """Why it is not offered: what a step takes away is less than half of the least difference."""
    nu, b2 = jnp.asarray(1.0, jnp.bfloat16), 0.999
    assert (nu.astype(jnp.float32) * b2).astype(jnp.bfloat16) == nu
