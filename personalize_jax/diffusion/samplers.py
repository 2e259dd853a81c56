"""Samplers as step functions from z_t to z_s, s < t, under one loop.

A sampler sees a network only through x0_hat, so that prediction kind, guidance and thresholding are the caller's.
Every step to s = 0 returns x0_hat itself, without noise.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from personalize_jax.diffusion.prediction import to_x0_eps
from personalize_jax.diffusion.schedule import Schedule

Denoise = Callable[[Array, Array], Array]


class Sampler(NamedTuple):
    """A sampling method; t and s are scalars, the other arrays have the batch's shape.

    Attributes:
        init: x_T -> carry, what the method remembers between steps (a pytree).
        step: (carry, z_t, x0_hat, t, s, noise) -> (carry, z_s), with standard normal noise.
    """

    init: Callable[[Array], Any]
    step: Callable[[Any, Array, Array, Array, Array, Array], tuple[Any, Array]]


def posterior(schedule: Schedule, z_t: Array, x0: Array, t: Array, s: Array) -> tuple[Array, Array]:
    """Mean and variance of q(z_s | z_t, x0), s < t (Kingma et al. 2021, App. A; Ho et al. 2020, eq. 7).

    Args:
        schedule: the forward process.
        z_t: noisy pictures at time t.
        x0: clean pictures, of z_t's shape.
        t: time of z_t, scalar in (0, 1].
        s: earlier time, scalar in [0, t).

    Returns:
        The mean, of z_t's shape, and the scalar variance.
    """
    old, new = _noise_shares(schedule, t, s)
    mean = schedule.alpha(s) * (old / schedule.alpha(t) * z_t + new * x0)
    return mean, new * schedule.sigma(s) ** 2


def ancestral(schedule: Schedule, variance: Literal["small", "large"] = "small") -> Sampler:
    """The stochastic sampler of DDPM (Ho et al. 2020, algorithm 2; specification [0040]).

    Args:
        schedule: the forward process.
        variance: "small" is the posterior's, sigma_{t|s}^2 sigma_s^2 / sigma_t^2, right for data that is one point;
            "large" is the forward step's, sigma_{t|s}^2, right for data that is standard normal (ibid., section 3.2).

    Raises:
        ValueError: unknown variance.
    """
    if variance not in ("small", "large"):
        raise ValueError(f"variance is {variance!r}; give small or large.")

    def step(carry: None, z_t: Array, x0_hat: Array, t: Array, s: Array, noise: Array) -> tuple[None, Array]:
        mean, posterior_variance = posterior(schedule, z_t, x0_hat, t, s)
        _, new = _noise_shares(schedule, t, s)
        std = jnp.sqrt(posterior_variance if variance == "small" else new * schedule.sigma(t) ** 2)
        return carry, _clean_at_zero(s, mean + std * noise, x0_hat)

    return Sampler(lambda x_T: None, step)


def ddim(schedule: Schedule, eta: float = 0.0) -> Sampler:
    """DDIM (Song et al. 2021, eq. 12 and 16; specification [0040]).

    Args:
        schedule: the forward process.
        eta: 0 is the deterministic first-order solver of the probability-flow ODE, 1 the ancestral sampler.

    Raises:
        ValueError: eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; give a number from 0 (deterministic) to 1 (ancestral).")

    def step(carry: None, z_t: Array, x0_hat: Array, t: Array, s: Array, noise: Array) -> tuple[None, Array]:
        _, eps = to_x0_eps("x0", x0_hat, z_t, schedule.alpha(t), schedule.sigma(t))
        if eta > 0:  # otherwise the noise goes unused, and the compiler need not draw it
            old, new = _noise_shares(schedule, t, s)
            # The first root is that of 1 - eta^2 new, without its cancellation when almost all noise is new.
            eps = jnp.sqrt(1 - eta**2 + eta**2 * old) * eps + eta * jnp.sqrt(new) * noise
        return carry, _clean_at_zero(s, schedule.alpha(s) * x0_hat + schedule.sigma(s) * eps, x0_hat)

    return Sampler(lambda x_T: None, step)


def dpm_solver_pp(schedule: Schedule) -> Sampler:
    """DPM-Solver++(2M), deterministic and of second order (Lu et al. 2022, algorithm 2); first and last step of first.

    Carries the last x0_hat and the last step h in lambda = logsnr / 2.
    """

    def init(x_T: Array) -> tuple[Array, Array]:
        return jnp.zeros_like(x_T), jnp.zeros((), x_T.dtype)

    def step(
        carry: tuple[Array, Array], z_t: Array, x0_hat: Array, t: Array, s: Array, noise: Array
    ) -> tuple[tuple[Array, Array], Array]:
        x0_last, h_last = carry
        h = (schedule.logsnr(s) - schedule.logsnr(t)) / 2
        # h_last is 0 when there is no history to extrapolate from.
        slope = jnp.where(h_last > 0, h / (2 * jnp.where(h_last > 0, h_last, 1)), 0)
        x0 = x0_hat + slope * (x0_hat - x0_last)
        z_s = schedule.sigma(s) / schedule.sigma(t) * z_t - schedule.alpha(s) * jnp.expm1(-h) * x0
        return (x0_hat, h), _clean_at_zero(s, z_s, x0_hat)

    return Sampler(init, step)


def timesteps(num_steps: int) -> Array:
    """[num_steps + 1] float32 times, evenly from 1 to 0.

    Raises:
        ValueError: num_steps below 1.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; give at least 1.")
    return jnp.linspace(1.0, 0.0, num_steps + 1)


def initial_noise(keys_B: Array, shape: tuple[int, ...]) -> Array:
    """x_T: standard normal noise [B, *shape], picture i from keys_B[i] alone."""
    return _noise(keys_B, 0, shape)


def sample(denoise: Denoise, sampler: Sampler, ts: Array, keys_B: Array, shape: tuple[int, ...]) -> Array:
    """Draws a batch of pictures; a picture depends on its own key, not on its neighbours or the size of the batch.

    Args:
        denoise: (z_t [B, *shape], scalar t) -> x0_hat [B, *shape], float32 as z_t is.
        sampler: the method.
        ts: [steps + 1] decreasing times, as `timesteps` gives them; a discrete schedule of N needs steps <= N.
        keys_B: one random key a picture, used for nothing else.
        shape: of one picture, (H, W, C).

    Returns:
        [B, *shape] pictures at ts[-1]: clean ones in about [-1, 1] if that is 0.
    """

    def body(state: tuple[Array, Any], time: tuple[Array, Array, Array]) -> tuple[tuple[Array, Any], None]:
        z_t, carry = state
        i, t, s = time
        carry, z_s = sampler.step(carry, z_t, denoise(z_t, t), t, s, _noise(keys_B, i, shape))
        return (z_s, carry), None

    x_T = initial_noise(keys_B, shape)
    steps = jnp.arange(1, len(ts)), ts[:-1], ts[1:]
    (x, _), _ = jax.lax.scan(body, (x_T, sampler.init(x_T)), steps)
    return x


def _noise(keys_B: Array, i: int | Array, shape: tuple[int, ...]) -> Array:
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), shape))(keys_B)


def _noise_shares(schedule: Schedule, t: Array, s: Array) -> tuple[Array, Array]:
    """Shares of z_t's noise variance from before and after s < t; the second is sigma_{t|s}^2 / sigma_t^2."""
    change = schedule.logsnr(t) - schedule.logsnr(s)
    return jnp.exp(change), -jnp.expm1(change)  # each by itself: both may be far below 1


def _clean_at_zero(s: Array, z_s: Array, x0_hat: Array) -> Array:
    return jnp.where(s > 0, z_s, x0_hat)
