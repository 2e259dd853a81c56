from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personalize_jax.diffusion.prediction import Prediction, add_noise, loss_weight, per_picture, target, to_x0_eps
from personalize_jax.diffusion.process import Function, Process, cosine, discrete, linear_betas, rectified_flow

KINDS = get_args(Prediction)
NOISE_ALONE_GROWS = Process(Function(jnp.ones_like), Function(lambda t: 4 * t), Function(lambda t: t))
PROCESSES = {"cosine": cosine(), "rectified_flow": rectified_flow(3.0), "noise_alone_grows": NOISE_ALONE_GROWS}


@pytest.fixture
def batch():
    x_key, eps_key = jax.random.split(jax.random.key(0))
    t = jnp.array([0.05, 0.3, 0.5, 0.9])
    shape = (4, 6, 5, 3)
    x0, eps = jax.random.uniform(x_key, shape, minval=-1), jax.random.normal(eps_key, shape)
    return x0, eps, cosine().alpha(t), cosine().sigma(t)


def test_noise_is_added_to_each_picture_at_its_own_level(batch):
    x0, eps, alpha, sigma = batch
    z_t = add_noise(x0, eps, alpha, sigma)
    for i in range(len(x0)):
        np.testing.assert_allclose(z_t[i], float(alpha[i]) * x0[i] + float(sigma[i]) * eps[i], atol=1e-6)


def test_noised_pictures_have_the_forward_marginal():
    eps = jax.random.normal(jax.random.key(1), (2, 200_000))
    z_t = add_noise(jnp.full_like(eps, 0.7), eps, jnp.array([0.6, 0.8]), jnp.array([0.8, 0.6]))
    np.testing.assert_allclose(z_t.mean(1), [0.42, 0.56], atol=0.01)
    np.testing.assert_allclose(z_t.std(1), [0.8, 0.6], atol=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_answer_gives_back_picture_and_noise(kind, batch):
    x0, eps, alpha, sigma = batch
    answer = target(kind, x0, eps, alpha, sigma)
    x0_hat, eps_hat = to_x0_eps(kind, answer, add_noise(x0, eps, alpha, sigma), alpha, sigma)
    np.testing.assert_allclose(x0_hat, x0, atol=1e-5)
    np.testing.assert_allclose(eps_hat, eps, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_pair_of_scales_is_undone(kind):
    """However picture and noise are scaled: no two scales here are those of a process that preserves variance."""
    x_key, eps_key, alpha_key, sigma_key = jax.random.split(jax.random.key(2), 4)
    x0, eps = jax.random.normal(x_key, (200, 7)), jax.random.normal(eps_key, (200, 7))
    alpha, sigma = (jax.random.uniform(key, (200,), minval=0.1, maxval=3) for key in (alpha_key, sigma_key))
    z_t, answer = add_noise(x0, eps, alpha, sigma), target(kind, x0, eps, alpha, sigma)
    x0_hat, eps_hat = to_x0_eps(kind, answer, z_t, alpha, sigma)
    np.testing.assert_allclose(x0_hat, x0, atol=1e-3)
    np.testing.assert_allclose(eps_hat, eps, atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "expected"), [("v", lambda z, o: -o), ("x0", lambda z, o: o), ("velocity", jnp.subtract)]
)
def test_pure_noise_is_all_eps(kind, expected, batch):
    z_t, output = batch[:2]
    x0_hat, eps_hat = to_x0_eps(kind, output, z_t, 0.0, 1.0)
    np.testing.assert_array_equal(x0_hat, expected(z_t, output))
    np.testing.assert_array_equal(eps_hat, z_t)


@pytest.mark.parametrize("kind", KINDS)
def test_any_answer_splits_the_input(kind, batch):
    x0, eps, alpha, sigma = batch
    z_t = add_noise(x0, eps, alpha, sigma)
    x0_hat, eps_hat = to_x0_eps(kind, jnp.cos(7 * z_t), z_t, alpha, sigma)
    np.testing.assert_allclose(add_noise(x0_hat, eps_hat, alpha, sigma), z_t, atol=1e-5)


def test_v_is_the_velocity_of_z_along_the_angle(batch):
    x0, eps, _, _ = batch
    angle, rate = jnp.float32(0.4), jnp.float32(1.0)

    def z(phi):
        return add_noise(x0, eps, jnp.cos(phi), jnp.sin(phi))

    _, velocity = jax.jvp(z, (angle,), (rate,))
    np.testing.assert_allclose(target("v", x0, eps, jnp.cos(angle), jnp.sin(angle)), velocity, atol=1e-6)


def test_velocity_is_that_of_z_along_a_rectified_flow(batch):
    x0, eps, _, _ = batch

    def z(t):
        return add_noise(x0, eps, rectified_flow().alpha(t), rectified_flow().sigma(t))

    _, velocity = jax.jvp(z, (jnp.float32(0.4),), (jnp.float32(1.0),))
    np.testing.assert_allclose(target("velocity", x0, eps, 0.6, 0.4), velocity, atol=1e-6)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_is_the_same_loss_whatever_is_predicted(kind, process, batch):
    (x0, eps, _, _), t = batch, jnp.array([0.05, 0.3, 0.5, 0.9])
    alpha, sigma = process.alpha(t), process.sigma(t)
    snr = (alpha / sigma) ** 2
    x0_hat = x0 + 0.1 * jnp.sin(9 * x0)
    eps_hat = (add_noise(x0, eps, alpha, sigma) - per_picture(alpha, x0) * x0_hat) / per_picture(sigma, x0)
    error = target(kind, x0_hat, eps_hat, alpha, sigma) - target(kind, x0, eps, alpha, sigma)
    loss = loss_weight(kind, process, t, "min_snr") * jnp.mean(error**2, (1, 2, 3))
    np.testing.assert_allclose(loss, np.minimum(snr, 5.0) * np.mean((x0_hat - x0) ** 2, (1, 2, 3)), rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_finite_at_the_ends_of_time(kind):
    ends = jnp.array([0.0, 1.0])
    for process in (*PROCESSES.values(), discrete(linear_betas())):
        assert np.all(np.isfinite(loss_weight(kind, process, ends, "min_snr")))
        np.testing.assert_array_equal(loss_weight(kind, process, ends, "none"), 1)


def test_scalars_and_one_value_a_picture_broadcast():
    x = jnp.ones((2, 3, 3, 1))
    assert per_picture(0.5, x).shape == ()
    assert per_picture(jnp.arange(2), x).shape == (2, 1, 1, 1)


def test_unknown_choices_are_refused():
    x = jnp.ones((1, 2))
    for call in (
        lambda: target("noise", x, x, 1, 0),
        lambda: to_x0_eps("noise", x, x, 1, 0),
        lambda: loss_weight("noise", cosine(), 0.5),
        lambda: loss_weight("v", cosine(), 0.5, "max_snr"),
    ):
        with pytest.raises(ValueError, match="give"):
            call()
