"""Samplers against data whose denoiser, marginals and probability-flow ODE are known in closed form.

Every pixel of the data is independent: a Gaussian N(MEAN, STD^2), or a mixture of narrow Gaussians.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import norm

from personalize_jax.diffusion.process import (
    cosine,
    discrete,
    linear,
    rectified_flow,
    rescale_zero_terminal_snr,
    scaled_linear_betas,
    squaredcos_betas,
)
from personalize_jax.diffusion.samplers import (
    Sampler,
    Spacing,
    ancestral,
    ddim,
    dpm_solver_pp,
    initial_noise,
    posterior,
    sample,
    timesteps,
)

MEAN, STD = 0.4, 0.3
CENTRES, SHARES, WIDTH = jnp.array([-0.8, 0.1, 0.9]), jnp.array([0.5, 0.2, 0.3]), 0.1
PROCESSES = {
    "cosine": cosine(),
    "linear": linear(),
    "squaredcos": discrete(squaredcos_betas()),
    "rectified_flow": rectified_flow(),
}
SAMPLERS = {
    "ancestral_small": ancestral,
    "ancestral_large": lambda process: ancestral(process, "large"),
    "ddim": ddim,
    "dpm_solver_pp": dpm_solver_pp,
}


def gaussian_denoiser(process, mean=MEAN, std=STD):
    """E[x | z_t] for x ~ N(mean, std^2)."""

    def denoise(z_t, t):
        alpha, sigma = process.alpha(t), process.sigma(t)
        return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (z_t - alpha * mean)

    return denoise


def mixture_denoiser(process):
    """E[x | z_t] for x ~ sum_k SHARES_k N(CENTRES_k, WIDTH^2)."""

    def denoise(z_t, t):
        alpha, sigma = process.alpha(t), process.sigma(t)
        variance = alpha**2 * WIDTH**2 + sigma**2
        distance = z_t[..., None] - alpha * CENTRES
        share = jax.nn.softmax(jnp.log(SHARES) - distance**2 / (2 * variance))
        return jnp.sum(share * (CENTRES + alpha * WIDTH**2 / variance * distance), -1)

    return denoise


def mixture_cdf(process, z_t, t):
    """P(z <= z_t) at time t; the ODE in one dimension carries every point along at its own quantile."""
    alpha, sigma = process.alpha(t), process.sigma(t)
    return jnp.sum(SHARES * norm.cdf(z_t[..., None], alpha * CENTRES, jnp.sqrt(alpha**2 * WIDTH**2 + sigma**2)), -1)


def draw(denoise, sampler, ts, pictures=256, shape=(8, 8, 1), seed=0):
    keys_B = jax.random.split(jax.random.key(seed), pictures)
    return jax.jit(lambda keys_B: sample(denoise, sampler, ts, keys_B, shape))(keys_B)


def solve(denoise, sampler, times, z):
    """What the sampler makes of z along each list of times, without noise; compiled once for all lengths."""

    @jax.jit
    def step(carry, z_t, t, s):
        return sampler.step(carry, z_t, denoise(z_t, t), t, s, jnp.zeros_like(z_t))

    results = []
    for ts in times:
        carry, z_t = sampler.init(z), z
        for t, s in zip(ts[:-1], ts[1:], strict=True):
            carry, z_t = step(carry, z_t, t, s)
        results.append(z_t)
    return results


def measured_orders(errors):
    """Orders of convergence from errors at doubled numbers of steps."""
    return np.log2(np.divide(errors[:-1], errors[1:]))


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize(("t", "s"), [(1.0, 0.9), (0.7, 0.3), (0.2, 0.01)])
def test_posterior_composes_to_the_forward_process(process, t, s):
    x0, z_t = jnp.array([0.3]), jnp.array([0.3 * process.alpha(t)])
    mean, variance = posterior(process, z_t, x0, t, s)
    np.testing.assert_allclose(mean, process.alpha(s) * x0, rtol=1e-5)  # E[z_s | x]
    slope = (posterior(process, z_t + 1, x0, t, s)[0] - mean)[0]
    sigma_t, sigma_s = process.sigma(t), process.sigma(s)
    np.testing.assert_allclose(slope**2 * sigma_t**2 + variance, sigma_s**2, rtol=1e-4)  # Var[z_s | x]
    covariance = process.alpha(t) / process.alpha(s) * sigma_s**2  # as z_t = alpha_{t|s} z_s + new noise
    np.testing.assert_allclose(slope * sigma_t**2, covariance, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("sampler", "process"),
    [
        *((sampler, "cosine") for sampler in SAMPLERS),
        *((sampler, "rectified_flow") for sampler in SAMPLERS),
        ("ancestral_small", "linear"),
        ("ancestral_small", "squaredcos"),
        ("dpm_solver_pp", "linear"),
        ("dpm_solver_pp", "squaredcos"),
    ],
)
def test_gaussian_data_is_recovered(sampler, process):
    process = PROCESSES[process]
    x = draw(gaussian_denoiser(process), SAMPLERS[sampler](process), timesteps(400))
    assert x.mean() == pytest.approx(MEAN, abs=0.01)
    assert x.std() == pytest.approx(STD, rel=0.04)


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_mixture_data_is_recovered(make):
    process = cosine()
    x = draw(mixture_denoiser(process), make(process), timesteps(100))
    nearest = np.abs(np.asarray(x)[..., None] - CENTRES).argmin(-1)
    shares = [(nearest == k).mean() for k in range(len(CENTRES))]
    np.testing.assert_allclose(shares, SHARES, atol=0.02)
    np.testing.assert_allclose([x[nearest == k].mean() for k in range(len(CENTRES))], CENTRES, atol=0.02)


@pytest.mark.parametrize("process", [cosine(), rectified_flow()], ids=["cosine", "rectified_flow"])
def test_ancestral_variances_bracket_the_truth(process):
    """The posterior's variance is a lower bound on the reverse step's, that of standard normal data an upper bound."""
    small, large = (
        draw(gaussian_denoiser(process), ancestral(process, variance), timesteps(20)).std()
        for variance in ("small", "large")
    )
    assert small < STD < large


@pytest.mark.parametrize(("variance", "std"), [("small", 0.0), ("large", 1.0)])
@pytest.mark.parametrize("process", [cosine(), rectified_flow(3.0)], ids=["cosine", "rectified_flow"])
def test_each_ancestral_variance_is_exact_for_its_own_data(process, variance, std):
    t, s = jnp.float32(0.8), jnp.float32(0.3)
    z_t = jnp.linspace(-2, 2, 5)[None]
    x0_hat = gaussian_denoiser(process, 0.0, std)(z_t, t)
    step = ancestral(process, variance).step
    _, middle = step(None, z_t, x0_hat, t, s, jnp.zeros_like(z_t))
    _, above = step(None, z_t, x0_hat, t, s, jnp.ones_like(z_t))
    marginal = [process.alpha(u) ** 2 * std**2 + process.sigma(u) ** 2 for u in (t, s)]
    slope = (middle[0, -1] - middle[0, 0]) / 4
    np.testing.assert_allclose(slope**2 * marginal[0] + (above - middle)[0, 0] ** 2, marginal[1], rtol=1e-5)


def learned(v):
    """A sampler of learned variance whose network always says v."""

    def make(process):
        init, step = ancestral(process, "learned_range")
        return Sampler(init, lambda carry, z_t, x0_hat, *rest: step(carry, z_t, (x0_hat, v), *rest))

    return make


@pytest.mark.parametrize(("v", "variance"), [(-1.0, "small"), (1.0, "large")])
@pytest.mark.parametrize(("t", "s"), [(1.0, 0.9), (0.3, 0.2), (0.1, 0.0)])
def test_learned_variances_reach_from_small_to_large(v, variance, t, s):
    z_t, x0_hat, noise = jax.random.normal(jax.random.key(3), (3, 2, 4, 4, 3))
    process, arguments = PROCESSES["squaredcos"], (None, z_t, x0_hat, jnp.float32(t), jnp.float32(s), noise)
    _, expected = ancestral(process, variance).step(*arguments)
    _, z_s = learned(jnp.full_like(z_t, v))(process).step(*arguments)
    np.testing.assert_allclose(z_s, expected, atol=1e-5)


def test_a_network_may_answer_with_its_variance():
    process = cosine()
    denoise = mixture_denoiser(process)
    plain = draw(denoise, ancestral(process), timesteps(4), pictures=2)
    paired = draw(
        lambda z_t, t: (denoise(z_t, t), jnp.full_like(z_t, -1)),
        ancestral(process, "learned_range"),
        timesteps(4),
        pictures=2,
    )
    np.testing.assert_allclose(paired, plain, atol=1e-5)


def test_a_learned_variance_is_of_its_pixel():
    z_t = jnp.zeros((1, 3))
    step = learned(jnp.array([[-1.0, 0.0, 1.0]]))(cosine()).step
    std = step(None, z_t, z_t, jnp.float32(0.5), jnp.float32(0.4), jnp.ones_like(z_t))[1][0]
    assert std[0] < std[1] < std[2]
    assert std[1] == pytest.approx(float(np.sqrt(std[0] * std[2])), rel=1e-5)  # halfway between the logarithms


@pytest.mark.parametrize("process", [cosine(), linear(), rectified_flow()], ids=["cosine", "linear", "rectified_flow"])
@pytest.mark.parametrize(("make", "order"), [(ddim, 1), (dpm_solver_pp, 2)], ids=["ddim", "dpm_solver_pp"])
def test_convergence_order_on_a_mixture(make, order, process):
    start, end = 0.7, 0.25
    z = jnp.linspace(-2, 2, 401)
    times = [np.linspace(start, end, steps + 1, dtype=np.float32) for steps in (16, 32, 64)]
    ends = solve(mixture_denoiser(process), make(process), times, z)
    errors = [jnp.abs(mixture_cdf(process, z_s, end) - mixture_cdf(process, z, start)).mean() for z_s in ends]
    np.testing.assert_allclose(measured_orders(errors), order, atol=0.3)


@pytest.mark.parametrize(("make", "order"), [(ddim, 1), (dpm_solver_pp, 2)], ids=["ddim", "dpm_solver_pp"])
def test_convergence_order_on_a_gaussian(make, order):
    process, start, end = cosine(), 0.8, 0.2
    spread = [jnp.sqrt(process.alpha(t) ** 2 * STD**2 + process.sigma(t) ** 2) for t in (start, end)]
    z = jnp.linspace(-2, 2, 9)
    exact = process.alpha(end) * MEAN + spread[1] / spread[0] * (z - process.alpha(start) * MEAN)
    times = [np.linspace(start, end, steps + 1, dtype=np.float32) for steps in (8, 16, 32, 64)]
    ends = solve(gaussian_denoiser(process), make(process), times, z)
    np.testing.assert_allclose(measured_orders([jnp.abs(z_s - exact).max() for z_s in ends]), order, atol=0.2)


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_the_step_to_zero_returns_the_prediction(make, process):
    z_t, x0_hat, noise = jax.random.normal(jax.random.key(3), (3, 2, 4, 4, 3))
    sampler = make(process)
    _, x = sampler.step(sampler.init(z_t), z_t, x0_hat, jnp.float32(0.1), jnp.float32(0.0), noise)
    np.testing.assert_array_equal(x, x0_hat)


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_any_number_of_steps_in_discrete_time(make):
    process = discrete(squaredcos_betas(10))
    times = [timesteps(steps) for steps in (1, 10, 25)]
    for x in solve(gaussian_denoiser(process), make(process), times, jnp.linspace(-2, 2, 9)):
        assert np.all(np.isfinite(x))


@pytest.mark.parametrize("make", [ancestral, dpm_solver_pp])
def test_a_picture_depends_on_its_own_key_only(make):
    process, keys_B = cosine(), jax.random.split(jax.random.key(5), 6)
    run = jax.jit(lambda keys_B: sample(mixture_denoiser(process), make(process), timesteps(8), keys_B, (4, 4, 3)))
    together = run(keys_B)
    np.testing.assert_array_equal(run(keys_B[::-1])[::-1], together)
    np.testing.assert_allclose(run(keys_B[2:3])[0], together[2], atol=1e-6)
    assert len({picture.tobytes() for picture in np.asarray(together)}) == 6


def test_every_draw_of_noise_is_independent():
    walk = Sampler(lambda x_T: None, lambda carry, z_t, x0_hat, t, s, noise: (carry, z_t + noise))
    x = draw(lambda z_t, t: z_t, walk, timesteps(15))
    assert x.var() == pytest.approx(16, rel=0.05)


def test_initial_noise_is_standard_normal():
    noise = initial_noise(jax.random.split(jax.random.key(0), 64), (16, 16, 3))
    assert noise.shape == (64, 16, 16, 3)
    assert noise.mean() == pytest.approx(0, abs=0.02) and noise.std() == pytest.approx(1, abs=0.02)


def test_timesteps_run_evenly_from_noise_to_clean():
    np.testing.assert_allclose(timesteps(4), [1, 0.75, 0.5, 0.25, 0], rtol=1e-6)
    np.testing.assert_array_equal(timesteps(1), [1, 0])


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_sampling_starts_from_pure_noise(make):
    """Where alpha is 0 nothing divides by it, and the picture comes from x0_hat alone."""
    process = discrete(rescale_zero_terminal_snr(scaled_linear_betas(n=20)))
    sampler, z_t = make(process), jnp.linspace(-2, 2, 9)
    arguments = (jnp.float32(1), jnp.float32(0.5), jnp.zeros(9))
    from_zero, from_mean = (
        sampler.step(sampler.init(z_t), z_t, jnp.full(9, x0_hat), *arguments)[1] for x0_hat in (0.0, MEAN)
    )
    np.testing.assert_allclose(from_mean - from_zero, process.alpha(0.5) * MEAN, rtol=1e-5)
    np.testing.assert_allclose(from_zero, from_zero[-1] * z_t / 2, atol=1e-6)
    (x,) = solve(gaussian_denoiser(process), sampler, [timesteps(20)], z_t)
    assert np.all(np.isfinite(x)) and x[4] == pytest.approx(MEAN, abs=1e-3)


@pytest.mark.parametrize(
    ("spacing", "indices"),
    [
        (Spacing("leading"), [6, 4, 2, 0]),
        (Spacing("leading", offset=1), [7, 5, 3, 1]),
        (Spacing("trailing"), [9, 7, 4, 1]),
        (Spacing("linspace"), [9, 6, 3, 0]),
    ],
)
@pytest.mark.parametrize("ends_clean", [True, False])
def test_spacings_visit_their_indices(spacing, indices, ends_clean):
    process = discrete([0.1] * 10)
    ts = timesteps(4, spacing._replace(ends_clean=ends_clean), 10)
    np.testing.assert_array_equal(process.network_time(ts[:-1]), indices)
    assert ts[-1] == (0 if ends_clean else np.float32(0.1))


@pytest.mark.parametrize("make", SAMPLERS.values(), ids=SAMPLERS)
def test_sampling_may_end_at_index_zero(make):
    """Then the last step leads from index 0 to itself and changes nothing."""
    process = discrete(squaredcos_betas(10))
    ts = timesteps(4, Spacing("leading", ends_clean=False), 10)
    early, late = solve(gaussian_denoiser(process), make(process), [ts[:-1], ts], jnp.linspace(-2, 2, 9))
    np.testing.assert_allclose(late, early, atol=1e-6)


def test_impossible_settings_are_refused():
    for call in (
        lambda: timesteps(0),
        lambda: timesteps(4, Spacing("leading")),
        lambda: timesteps(11, Spacing("trailing"), 10),
        lambda: timesteps(10, Spacing("leading", offset=1), 10),
        lambda: timesteps(4, Spacing("middle"), 10),
        lambda: ancestral(cosine(), "medium"),
    ):
        with pytest.raises(ValueError, match="give"):
            call()
