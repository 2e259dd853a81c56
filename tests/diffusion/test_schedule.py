import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personalize_jax.diffusion.schedule import (
    cosine,
    discrete,
    linear,
    linear_betas,
    rescale_zero_terminal_snr,
    scaled_linear_betas,
    squaredcos_betas,
)

SCHEDULES = {
    "cosine": cosine(),
    "shifted": cosine(shift=2 * np.log(32 / 128)),
    "linear": linear(),
    "ddpm": discrete(linear_betas()),
    "latent": discrete(scaled_linear_betas()),
    "squaredcos": discrete(squaredcos_betas()),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_variance_is_preserved_and_noise_grows(name):
    schedule = SCHEDULES[name]
    t = jnp.linspace(0, 1, 101)
    np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1, rtol=1e-6)
    assert np.all(np.diff(schedule.logsnr(t)) < 0)
    np.testing.assert_allclose(
        2 * np.log(schedule.alpha(t[1:]) / schedule.sigma(t[1:])), schedule.logsnr(t[1:]), atol=1e-5
    )


def test_cosine_follows_its_angle():
    t = np.linspace(0.01, 0.99, 99)
    np.testing.assert_allclose(cosine().alpha(t), np.cos(np.pi * t / 2), atol=1e-3)
    np.testing.assert_allclose(cosine().sigma(t), np.sin(np.pi * t / 2), atol=1e-3)


def test_cosine_is_accurate_up_to_both_limits():
    t = np.array([0, 1e-4, 1e-3, 0.3, 0.999, 0.9999, 1], np.float32)
    first, last = np.arctan(np.exp(np.array([-6.0, 7.0])))
    expected = -2 * np.log(np.tan(first + t.astype(np.float64) * (last - first)))
    np.testing.assert_allclose(cosine(logsnr_min=-14, logsnr_max=12).logsnr(t), expected, atol=2e-4)
    np.testing.assert_allclose(cosine(logsnr_min=-14, logsnr_max=12).logsnr(t[[0, -1]]), [12, -14], rtol=1e-6)


def test_shift_moves_logsnr_everywhere():
    t = jnp.linspace(0, 1, 11)
    np.testing.assert_allclose(cosine(shift=-1.5).logsnr(t), cosine().logsnr(t) - 1.5, atol=1e-6)


def test_linear_is_the_continuous_form_of_linear_betas():
    t = jnp.linspace(0.01, 1, 100)
    np.testing.assert_allclose(linear().alpha(t), SCHEDULES["ddpm"].alpha(t), atol=0.01)


@pytest.mark.parametrize("betas", [linear_betas(), scaled_linear_betas(), squaredcos_betas(), [0.5, 0.1, 0.9]])
def test_discrete_alpha_is_the_product_over_betas(betas):
    n = len(betas)
    alpha2 = np.cumprod(1 - np.asarray(betas))
    t = np.arange(1, n + 1) / n
    np.testing.assert_allclose(discrete(betas).alpha(t) ** 2, alpha2, rtol=1e-5)
    np.testing.assert_allclose(discrete(betas).sigma(t) ** 2, 1 - alpha2, rtol=1e-5)


@pytest.mark.parametrize("name", ["ddpm", "latent", "squaredcos"])
def test_discrete_time_zero_is_clean(name):
    schedule = SCHEDULES[name]
    assert schedule.alpha(0.0) == 1 and schedule.sigma(0.0) == 0


@pytest.mark.parametrize("n", [1, 3, 250, 1000, 4000])
def test_network_time_counts_every_step_once(n):
    schedule = discrete(np.full(n, 0.01))
    for t in (np.arange(1, n + 1) / n, 1 - jnp.arange(n - 1, -1, -1) / n, jnp.linspace(0, 1, n + 1)[1:]):
        np.testing.assert_array_equal(schedule.network_time(jnp.asarray(t, jnp.float32)), np.arange(n))
    assert schedule.network_time(1.0).dtype == jnp.int32


def test_network_time_between_steps_is_the_noisier_index():
    np.testing.assert_array_equal(
        discrete([0.1] * 4).network_time(jnp.array([0.0, 0.1, 0.26, 0.74, 0.9])), [0, 0, 1, 2, 3]
    )


def test_network_time_is_t_in_continuous_time():
    t = jnp.array([0.0, 0.3, 1.0])
    np.testing.assert_array_equal(cosine().network_time(t), t)


def test_published_end_points():
    assert np.prod(1 - linear_betas()) == pytest.approx(4.0358e-5, rel=1e-4)  # Ho et al. 2020
    assert np.prod(1 - scaled_linear_betas()) == pytest.approx(4.66e-3, rel=1e-3)  # Stable Diffusion 1
    assert squaredcos_betas()[0] == pytest.approx(4.1284e-5, rel=1e-3)
    assert squaredcos_betas()[-1] == 0.999


def test_scaled_linear_betas_have_equally_spaced_roots():
    betas = scaled_linear_betas(0.01, 0.09, 5)
    np.testing.assert_allclose(np.sqrt(betas), [0.1, 0.15, 0.2, 0.25, 0.3])


def test_squaredcos_follows_the_cosine():
    t = np.arange(1, 991) / 1000
    offset_cos2 = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(SCHEDULES["squaredcos"].alpha(t) ** 2, offset_cos2, rtol=1e-4)


@pytest.mark.parametrize("betas", [linear_betas(), scaled_linear_betas(), squaredcos_betas(20)])
def test_zero_terminal_snr_keeps_the_first_alpha_and_scales_the_rest(betas):
    rescaled = rescale_zero_terminal_snr(betas)
    before, alpha = (np.sqrt(np.cumprod(1 - b)) for b in (betas, rescaled))
    assert alpha[0] == pytest.approx(before[0]) and alpha[-1] == 0
    np.testing.assert_allclose(alpha[:-1] / (before - before[-1])[:-1], alpha[0] / (before[0] - before[-1]))
    schedule = discrete(rescaled)
    assert schedule.logsnr(1.0) == -np.inf and schedule.alpha(1.0) == 0 and schedule.sigma(1.0) == 1


def test_schedules_are_static_arguments_by_value():
    traces = []

    def alpha(schedule, t):
        traces.append(schedule)
        return schedule.alpha(t)

    jitted = jax.jit(alpha, static_argnums=0)
    for schedule in (cosine(), cosine(shift=0.0), discrete([0.1, 0.2]), discrete(np.array([0.1, 0.2]))):
        jitted(schedule, 0.5)
    assert traces == [cosine(), discrete([0.1, 0.2])]


@pytest.mark.parametrize("betas", [[], [1.0, 0.1], [0.1, 1.1], [0.0, 0.1], [[0.1]], [float("nan")]])
def test_impossible_betas_are_refused(betas):
    with pytest.raises(ValueError, match="betas"):
        discrete(betas)


def test_reversed_limits_are_refused():
    with pytest.raises(ValueError, match="min < max"):
        cosine(logsnr_min=5, logsnr_max=-5)
