"""Processes that do not preserve variance, rectified flow above all, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personalize_jax.diffusion.prediction import target, to_x0_eps
from personalize_jax.diffusion.process import Function, Process, rectified_flow
from personalize_jax.diffusion.samplers import (
    ancestral,
    ddim,
    dpm_solver_pp,
    posterior,
    step_variances,
    timesteps,
)

MEAN, STD = 0.4, 0.3
PROCESSES = {
    "straight": rectified_flow(),
    "shifted": rectified_flow(3.0),
    "of no name": Process(Function(lambda t: 2 - 1.9 * t), Function(lambda t: t**2 + t), Function(lambda t: t)),
}


def velocity_denoiser(process, velocity):
    """(z_t, t) -> x0_hat of a network whose output is that velocity."""

    def denoise(z_t, t):
        return to_x0_eps("velocity", velocity(z_t, t), z_t, process.alpha(t), process.sigma(t))[0]

    return denoise


def gaussian_velocity(process):
    """E[eps - x0 | z_t] for x0 ~ N(MEAN, STD^2): covariance over variance times what z_t is off its mean."""

    def velocity(z_t, t):
        alpha, sigma = process.alpha(t), process.sigma(t)
        slope = (sigma - alpha * STD**2) / (alpha**2 * STD**2 + sigma**2)
        return -MEAN + slope * (z_t - alpha * MEAN)

    return velocity


def path(denoise, sampler, ts, z):
    """All z along the times, without noise."""
    step = jax.jit(lambda carry, z_t, t, s: sampler.step(carry, z_t, denoise(z_t, t), t, s, jnp.zeros_like(z_t)))
    carry, found = sampler.init(z), [z]
    for t, s in zip(ts[:-1], ts[1:], strict=True):
        carry, z_s = step(carry, found[-1], t, s)
        found.append(z_s)
    return found


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("make", "atol"), [(ddim, 2e-2), (dpm_solver_pp, 2e-3)], ids=["ddim", "dpm_solver_pp"])
def test_noise_is_carried_by_the_exact_map_of_the_ode(make, atol, shift):
    """In one dimension each z_1 goes to the data's point of the same quantile, MEAN + STD z_1."""
    process, z = rectified_flow(shift), jnp.linspace(-3, 3, 13)
    denoise = velocity_denoiser(process, gaussian_velocity(process))
    np.testing.assert_allclose(path(denoise, make(process), timesteps(400), z)[-1], MEAN + STD * z, atol=atol)


@pytest.mark.parametrize("ts", [[1, 0], [1, 0.7, 0.2, 0]])
def test_paths_to_a_single_point_are_straight_and_one_step_is_enough(ts):
    process, z = rectified_flow(), jnp.linspace(-3, 3, 13)

    def velocity(z_t, t):  # eps - x0 where x0 is MEAN, and eps what it leaves of z_t
        return (z_t - process.alpha(t) * MEAN) / process.sigma(t) - MEAN

    found = path(velocity_denoiser(process, velocity), ddim(process), jnp.float32(ts), z)
    for t, z_t in zip(ts, found, strict=True):
        np.testing.assert_allclose(z_t, (1 - t) * MEAN + t * z, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_ddim_is_eulers_method(shift):
    process = rectified_flow(shift)
    ts = jnp.float32([1, 0.9, 0.55, 0.5, 0.02, 0])

    def velocity(z_t, t):
        return jnp.sin(3 * z_t) - t

    z = jnp.linspace(-3, 3, 101)
    found = path(velocity_denoiser(process, velocity), ddim(process), ts, z)
    for i in range(len(ts) - 1):
        step = process.sigma(ts[i + 1]) - process.sigma(ts[i])
        np.testing.assert_allclose(found[i + 1], found[i] + step * velocity(found[i], ts[i]), atol=2e-6)


def conditional(covariance, of, given):
    """Slopes and variance of one variable of a joint normal distribution given others."""
    within, between = covariance[np.ix_(given, given)], covariance[of, given]
    slopes = np.linalg.solve(within, between)
    return slopes, covariance[of, of] - slopes @ between


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize(("t", "s"), [(0.99, 0.9), (0.7, 0.3), (0.2, 0.01)])
def test_steps_are_the_conditionals_of_the_joint_distribution(process, t, s):
    """Of (x0, z_s, z_t) with x0 standard normal; z_t is z_s scaled, and new noise."""
    alpha_t, alpha_s, sigma_t, sigma_s = (float(f(u)) for f in (process.alpha, process.sigma) for u in (t, s))
    forward = alpha_t / alpha_s
    causes = np.array(  # of each variable: x0, the noise in z_s, the new noise
        [[1, 0, 0], [alpha_s, sigma_s, 0], [alpha_t, forward * sigma_s, np.sqrt(sigma_t**2 - (forward * sigma_s) ** 2)]]
    )
    covariance = causes @ causes.T
    (of_x0, of_z_t), small = conditional(covariance, 1, [0, 2])
    _, large = conditional(covariance, 1, [2])
    x0, z_t = jnp.array([[0.7], [-1.2]]), jnp.array([[0.1], [0.8]])
    mean, variance = posterior(process, z_t, x0, t, s)
    np.testing.assert_allclose(mean, of_x0 * x0 + of_z_t * z_t, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(variance, small, rtol=1e-3)
    np.testing.assert_allclose(step_variances(process, t, s), [small, large], rtol=1e-3)


@pytest.mark.parametrize(("make", "share"), [(ancestral, 0.0), (ddim, 0.75), (dpm_solver_pp, 0.75)])
def test_steps_from_pure_noise_keep_it_or_leave_it_behind(make, share):
    """Where alpha is 0 the ancestral step's mean has forgotten z_1, and the deterministic ones keep it as the noise."""
    process, x0, z = rectified_flow(), jnp.linspace(-1, 1, 5), jnp.linspace(2, -2, 5)
    denoise = velocity_denoiser(process, lambda z_t, t: target("velocity", x0, z, 0, 1))
    found = path(denoise, make(process), timesteps(4), z)
    np.testing.assert_allclose(found[1], 0.25 * x0 + share * z, atol=1e-6)
    assert np.all(np.isfinite(np.stack(found)))
