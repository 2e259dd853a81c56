import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from diffusers import FlowMatchEulerDiscreteScheduler

from personalize_jax.diffusion.process import (
    cosine,
    discrete,
    linear,
    linear_betas,
    logit_normal,
    marginal_variance,
    rectified_flow,
    rescale_zero_terminal_snr,
    resolution_shift,
    scaled_linear_betas,
    shifted,
    squaredcos_betas,
)
from personalize_jax.diffusion.samplers import timesteps

PROCESSES = {
    "cosine": cosine(),
    "shifted": cosine(shift=2 * np.log(32 / 128)),
    "linear": linear(),
    "ddpm": discrete(linear_betas()),
    "latent": discrete(scaled_linear_betas()),
    "squaredcos": discrete(squaredcos_betas()),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_variance_is_preserved_and_noise_grows(name):
    process = PROCESSES[name]
    t = jnp.linspace(0, 1, 101)
    np.testing.assert_allclose(process.alpha(t) ** 2 + process.sigma(t) ** 2, 1, rtol=1e-6)
    np.testing.assert_array_equal(marginal_variance(process.alpha(t), process.sigma(t)), 1)
    assert np.all(np.diff(process.logsnr(t)) < 0)
    np.testing.assert_allclose(
        2 * np.log(process.alpha(t[1:]) / process.sigma(t[1:])), process.logsnr(t[1:]), atol=1e-5
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
    np.testing.assert_allclose(linear().alpha(t), PROCESSES["ddpm"].alpha(t), atol=0.01)


@pytest.mark.parametrize("betas", [linear_betas(), scaled_linear_betas(), squaredcos_betas(), [0.5, 0.1, 0.9]])
def test_discrete_alpha_is_the_product_over_betas(betas):
    n = len(betas)
    alpha2 = np.cumprod(1 - np.asarray(betas))
    t = np.arange(1, n + 1) / n
    np.testing.assert_allclose(discrete(betas).alpha(t) ** 2, alpha2, rtol=1e-5)
    np.testing.assert_allclose(discrete(betas).sigma(t) ** 2, 1 - alpha2, rtol=1e-5)


@pytest.mark.parametrize("name", ["ddpm", "latent", "squaredcos"])
def test_discrete_time_zero_is_clean(name):
    process = PROCESSES[name]
    assert process.alpha(0.0) == 1 and process.sigma(0.0) == 0


@pytest.mark.parametrize("n", [1, 3, 250, 1000, 4000])
def test_network_time_counts_every_step_once(n):
    process = discrete(np.full(n, 0.01))
    for t in (np.arange(1, n + 1) / n, 1 - jnp.arange(n - 1, -1, -1) / n, jnp.linspace(0, 1, n + 1)[1:]):
        np.testing.assert_array_equal(process.network_time(jnp.asarray(t, jnp.float32)), np.arange(n))
    assert process.network_time(1.0).dtype == jnp.int32


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
    np.testing.assert_allclose(PROCESSES["squaredcos"].alpha(t) ** 2, offset_cos2, rtol=1e-4)


@pytest.mark.parametrize("betas", [linear_betas(), scaled_linear_betas(), squaredcos_betas(20)])
def test_zero_terminal_snr_keeps_the_first_alpha_and_scales_the_rest(betas):
    rescaled = rescale_zero_terminal_snr(betas)
    before, alpha = (np.sqrt(np.cumprod(1 - b)) for b in (betas, rescaled))
    assert alpha[0] == pytest.approx(before[0]) and alpha[-1] == 0
    np.testing.assert_allclose(alpha[:-1] / (before - before[-1])[:-1], alpha[0] / (before[0] - before[-1]))
    process = discrete(rescaled)
    assert process.logsnr(1.0) == -np.inf and process.alpha(1.0) == 0 and process.sigma(1.0) == 1


def test_processes_are_static_arguments_by_value():
    traces = []

    def alpha(process, t):
        traces.append(process)
        return process.alpha(t)

    jitted = jax.jit(alpha, static_argnums=0)
    for process in (
        *(cosine(), cosine(shift=0.0), discrete([0.1, 0.2]), discrete(np.array([0.1, 0.2]))),
        *(rectified_flow(3.0), rectified_flow(shift=3.0), dataclasses.replace(cosine(), times=logit_normal())),
    ):
        jitted(process, 0.5)
    assert traces == [
        cosine(),
        discrete([0.1, 0.2]),
        rectified_flow(3.0),
        dataclasses.replace(cosine(), times=logit_normal(0.0, 1.0)),
    ]


@pytest.mark.parametrize("betas", [[], [1.0, 0.1], [0.1, 1.1], [0.0, 0.1], [[0.1]], [float("nan")]])
def test_impossible_betas_are_refused(betas):
    with pytest.raises(ValueError, match="betas"):
        discrete(betas)


def test_reversed_limits_are_refused():
    with pytest.raises(ValueError, match="min < max"):
        cosine(logsnr_min=5, logsnr_max=-5)


@pytest.mark.parametrize("shift", [1.0, 0.5, 3.158])
def test_a_rectified_flow_mixes_picture_and_noise_in_straight_lines(shift):
    process, t = rectified_flow(shift), np.array([0, 1e-4, 0.1, 0.5, 0.9, 0.9999, 1], np.float32)
    sigma = shift * t.astype(float) / (1 + (shift - 1) * t.astype(float))
    np.testing.assert_allclose(process.sigma(t), sigma, rtol=3e-7)
    np.testing.assert_allclose(process.alpha(t), 1 - sigma, rtol=3e-7, atol=1e-15)
    np.testing.assert_allclose(process.logsnr(t)[1:-1], 2 * np.log(1 / sigma[1:-1] - 1), atol=1e-5)
    np.testing.assert_array_equal(process.logsnr(t)[jnp.array([0, -1])], [np.inf, -np.inf])
    np.testing.assert_allclose(process.network_time(t), sigma, rtol=3e-7)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_shifted_flow_is_that_of_diffusers(shift):
    """Stable Diffusion 3's, whose network is told a thousand times the noise level."""
    theirs, n = FlowMatchEulerDiscreteScheduler(shift=shift), np.arange(1000, 0, -1)
    process = rectified_flow(shift, time_scale=1000)
    np.testing.assert_allclose(process.sigma(n / 1000), theirs.sigmas, rtol=1e-5)
    np.testing.assert_allclose(process.network_time(n / 1000), theirs.timesteps, rtol=1e-5)


@pytest.mark.parametrize(("tokens", "num_steps"), [(256, 1), (1024, 4), (4096, 28)])
def test_a_flow_shifted_by_resolution_visits_the_levels_of_diffusers(tokens, num_steps):
    theirs = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu = {256: 0.5, 1024: 0.63, 4096: 1.15}[tokens]  # linear between the ends that FLUX names
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps), mu=mu)
    assert np.log(resolution_shift(tokens)) == pytest.approx(mu)
    process = rectified_flow(resolution_shift(tokens))
    np.testing.assert_allclose(process.sigma(timesteps(num_steps)), theirs.sigmas, rtol=1e-5, atol=1e-7)


TIMES = {  # by name: the process, and the CDF of its times
    "uniform": (cosine(), scipy.stats.uniform.cdf),
    "logit_normal": (
        dataclasses.replace(rectified_flow(), times=logit_normal(0.5, 0.8)),
        lambda t: scipy.stats.norm.cdf(np.log(t / (1 - t)), 0.5, 0.8),
    ),
    "shifted": (dataclasses.replace(rectified_flow(), times=shifted(3.0)), lambda t: t / (t + 3 * (1 - t))),
}


@pytest.mark.parametrize("name", TIMES)
@pytest.mark.parametrize("batch", [1, 8])
def test_times_are_one_from_each_stratum_of_their_distribution(name, batch):
    process, cdf = TIMES[name]
    keys = jax.random.split(jax.random.key(0), 400)
    t = np.asarray(jax.vmap(lambda key: process.sample_times(key, batch))(keys), np.float64)
    assert t.min() > 0 and t.max() <= 1
    shares = cdf(t)
    np.testing.assert_array_equal(np.floor(shares * batch + 1e-4), np.tile(np.arange(batch), (400, 1)))
    assert scipy.stats.kstest(shares[:, 0] * batch, "uniform").pvalue > 0.01
    np.testing.assert_allclose(np.ptp(shares * batch - np.arange(batch), axis=1), 0, atol=1e-3)  # one offset for all


def test_times_follow_the_quantiles_of_scipy():
    u = np.linspace(0.001, 0.999, 50)
    expected = scipy.stats.logistic.cdf(scipy.stats.norm.ppf(u, -0.3, 1.4))
    np.testing.assert_allclose(logit_normal(-0.3, 1.4)(u), expected, rtol=1e-5)
    np.testing.assert_allclose(shifted(1.0)(u), scipy.stats.uniform.ppf(u), rtol=1e-6)


def test_logit_normal_times_stay_within_their_bounds():
    t = logit_normal(0.0, 1.0)(jnp.array([2.0**-24, 1e-7, 0.5, 1 - 6e-8, 1.0], jnp.float32))
    assert t[0] > 0 and t[-1] <= 1 and np.all(np.diff(t) > 0)


@pytest.mark.parametrize("name", TIMES)
def test_no_time_is_zero_even_where_the_uniform_number_is(name, monkeypatch):
    process, cdf = TIMES[name]
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: jnp.zeros(shape))
    t = np.asarray(process.sample_times(jax.random.key(0), 64), np.float64)
    assert t.min() > 0
    np.testing.assert_allclose(cdf(t) * 64, np.arange(64), atol=1e-4)


def test_each_index_of_discrete_time_is_met_as_often_as_its_range_of_times():
    process = dataclasses.replace(discrete([0.1] * 5), times=logit_normal(0.0, 1.0))
    n = process.network_time(process.sample_times(jax.random.key(0), 10_000))
    edges = np.array([1e-9, 0.2, 0.4, 0.6, 0.8, 1 - 1e-9])
    expected = np.diff(scipy.stats.norm.cdf(np.log(edges / (1 - edges))))
    np.testing.assert_allclose(np.bincount(n, minlength=5) / 10_000, expected, atol=2e-4)


def test_impossible_flows_and_times_are_refused():
    for call in (
        lambda: rectified_flow(0.0),
        lambda: rectified_flow(float("nan")),
        lambda: resolution_shift(0),
        lambda: logit_normal(0.0, 0.0),
        lambda: shifted(-1.0),
    ):
        with pytest.raises(ValueError, match="give a number above 0|such as 4096"):
            call()
