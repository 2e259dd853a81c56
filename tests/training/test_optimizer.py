import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from personalize_jax.training.optimizer import make_optimizer, same_learning_rates
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


@pytest.mark.parametrize(
    ("decay", "num_done", "before", "after", "same"),
    [
        (0, 10, 10, 20, True),
        (4, 7, 10, 20, True),  # the first step of a decay still has the full rate
        (4, 8, 10, 20, False),
        (4, 10, 10, 20, False),
        (4, 7, 20, 10, True),
        (4, 8, 20, 10, False),
        (4, 10, 10, 10, True),
        (100, 1, 10, 20, False),  # a decay that is longer than the training
        (100, 0, 10, 20, True),
    ],
)
def test_steps_of_a_decay_that_is_put_off_would_have_had_other_rates(decay, num_done, before, after, same):
    config = tiny.training(optimizer__learning_rate=0.1, optimizer__warmup_steps=2, optimizer__decay_steps=decay)
    assert same_learning_rates(config.optimizer, num_done, before, after) == same


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


def test_moments_are_means_of_gradients_and_of_their_squares():
    optimizer = make_optimizer(tiny.training(optimizer__b1=0.7, optimizer__b2=0.9).optimizer, 10)
    gradient, params = {"a": jnp.array([0.3, -0.2])}, {"a": jnp.zeros(2)}
    state = optimizer.update(gradient, optimizer.init(params), params)[1]
    mu, nu = (optax.tree_utils.tree_get(state, name)["a"] for name in ("mu", "nu"))
    np.testing.assert_allclose(mu, 0.3 * gradient["a"], rtol=1e-5)
    np.testing.assert_allclose(nu, 0.1 * gradient["a"] ** 2, rtol=1e-5)


def test_weights_decay_by_their_share_of_the_learning_rate():
    changes = {"optimizer__learning_rate": 0.1, "optimizer__weight_decay": 0.5}
    optimizer = make_optimizer(tiny.training(**changes).optimizer, 10)
    params = {"a": jnp.array([2.0, -3.0])}
    updates, _ = optimizer.update({"a": jnp.zeros(2)}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["a"], -0.1 * 0.5 * params["a"], rtol=1e-6)


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


def test_the_second_moment_falls_again_where_the_first_is_rounded():
    """By b2 a step, which bfloat16 would round to nothing."""
    optimizer = make_optimizer(tiny.training(optimizer__moment_dtype="bfloat16", optimizer__b2=0.999).optimizer, 10)
    params = {"slope": jnp.zeros(1)}
    state = optimizer.init(params)
    for gradient in (1.0, 0.0, 0.0):
        _, state = optimizer.update({"slope": jnp.full(1, gradient)}, state, params)
    _, nu = moments(state)
    np.testing.assert_allclose(nu, (1 - 0.999) * 0.999**2, rtol=1e-4)
