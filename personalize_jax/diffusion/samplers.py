"""Samplers as step functions from z_t to z_s, s < t, under one loop.

A sampler sees a network only through x0_hat, so that prediction kind, guidance and thresholding are the caller's.
Where variances are learned, the pair (x0_hat, v) takes the place of x0_hat: v of its shape, about in [-1, 1], tells
where the variance lies between its bounds. Every step to s = 0 returns x0_hat itself, without noise.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from personalize_jax.diffusion.prediction import per_picture, to_x0_eps
from personalize_jax.diffusion.process import Process, marginal_variance

Denoised = Array | tuple[Array, Array]  # x0_hat, or (x0_hat, v)
Denoise = Callable[[Array, Array], Denoised]
Variance = Literal["small", "large", "learned_range"]
SpacingKind = Literal["leading", "trailing", "linspace"]


class Sampler(NamedTuple):
    """A sampling method; t and s are scalars, the other arrays have the batch's shape.

    Attributes:
        init: x_T -> carry, a pytree that the method passes from step to step.
        step: (carry, z_t, x0_hat, t, s, noise) -> (carry, z_s), with standard normal noise; (x0_hat, v) takes the
            place of x0_hat for a method with learned variances.
    """

    init: Callable[[Array], Any]
    step: Callable[[Any, Array, Any, Array, Array, Array], tuple[Any, Array]]


class Spacing(NamedTuple):
    """The indices of a discrete process that sampling visits, in the terms of diffusers' scheduler files.

    (Lin et al. 2023, table 2.)

    Attributes:
        kind: "leading" counts up from `offset` in steps of N // num_steps, "trailing" down from N - 1 in steps of
            N / num_steps, "linspace" spreads indices evenly from 0 to N - 1.
        offset: the least index of "leading" (diffusers' `steps_offset`); the others ignore it.
        ends_clean: whether the last step leads to the clean picture or to index 0 (`set_alpha_to_one`).
    """

    kind: SpacingKind
    offset: int = 0
    ends_clean: bool = True


def posterior(process: Process, z_t: Array, x0: Array, t: Array, s: Array) -> tuple[Array, Array]:
    """Mean and variance of q(z_s | z_t, x0), s < t (Kingma et al. 2021, App. A; Ho et al. 2020, eq. 7).

    Args:
        process: the forward process.
        z_t: [B, ...] noisy pictures at time t.
        x0: clean pictures, of z_t's shape.
        t: time of z_t in (0, 1], scalar or [B].
        s: earlier time in [0, t), of t's shape.

    Returns:
        The mean, of z_t's shape, and the variance, of t's shape.
    """
    old, new = _noise_shares(process, t, s)
    # The square root and the noise scales stand for old alpha_s / alpha_t, which would be 0 / 0 where alpha_t is 0.
    of_z_t, of_x0 = jnp.sqrt(old) * process.sigma(s) / process.sigma(t), new * process.alpha(s)
    mean = per_picture(of_z_t, z_t) * z_t + per_picture(of_x0, z_t) * x0
    return mean, step_variances(process, t, s)[0]


def step_variances(process: Process, t: Array, s: Array) -> tuple[Array, Array]:
    """Variances of the step from t to s < t, each of t's shape (Ho et al. 2020, section 3.2).

    The small one is the posterior's, sigma_{t|s}^2 sigma_s^2 / sigma_t^2, right for data that is one point. The large
    one is right for data that is standard normal: the forward step's sigma_{t|s}^2, times z_s's variance over z_t's,
    which is 1 where variance is preserved. Other data lies between.
    """
    _, new = _noise_shares(process, t, s)
    variance_t, variance_s = (marginal_variance(process.alpha(u), process.sigma(u)) for u in (t, s))
    return new * process.sigma(s) ** 2, new * process.sigma(t) ** 2 * (variance_s / variance_t)


def learned_log_variance(small: Array, large: Array, v: Array) -> Array:
    """Log variance between two bounds, at the place v that a network predicts (Nichol & Dhariwal 2021, eq. 15).

    v = -1 is small and v = 1 large. A small variance of 0, as in a step to s = 0, counts as 1e-20.
    """
    share = (v + 1) / 2
    return share * jnp.log(large) + (1 - share) * jnp.log(jnp.maximum(small, 1e-20))


def ancestral(process: Process, variance: Variance = "small") -> Sampler:
    """The stochastic sampler of DDPM (Ho et al. 2020, algorithm 2; specification [0040]).

    Args:
        process: the forward process.
        variance: "small" or "large", see `step_variances`; or "learned_range", see `learned_log_variance`, whose steps
            take the pair (x0_hat, v) for x0_hat.

    Raises:
        ValueError: unknown variance.
    """
    if variance not in get_args(Variance):
        raise ValueError(f"variance is {variance!r}; give one of {', '.join(get_args(Variance))}.")

    def step(carry: None, z_t: Array, denoised: Denoised, t: Array, s: Array, noise: Array) -> tuple[None, Array]:
        small, large = step_variances(process, t, s)
        if variance == "learned_range":
            x0_hat, v = denoised
            std = jnp.exp(learned_log_variance(small, large, v) / 2)
        else:
            assert not isinstance(denoised, tuple)
            x0_hat = denoised
            std = jnp.sqrt(small if variance == "small" else large)
        mean, _ = posterior(process, z_t, x0_hat, t, s)
        return carry, _clean_at_zero(s, mean + std * noise, x0_hat)

    return Sampler(lambda x_T: None, step)


def ddim(process: Process) -> Sampler:
    """DDIM, the deterministic first-order solver of the probability-flow ODE (Song et al. 2021; specification [0040]).

    Its noise is the rest of z_t beside x0_hat, thresholded or not: diffusers' `use_clipped_model_output=True`.
    """

    def step(carry: None, z_t: Array, x0_hat: Array, t: Array, s: Array, noise: Array) -> tuple[None, Array]:
        _, eps = to_x0_eps("x0", x0_hat, z_t, process.alpha(t), process.sigma(t))
        return carry, _clean_at_zero(s, process.alpha(s) * x0_hat + process.sigma(s) * eps, x0_hat)

    return Sampler(lambda x_T: None, step)


def dpm_solver_pp(process: Process) -> Sampler:
    """DPM-Solver++(2M), deterministic and of second order (Lu et al. 2022, algorithm 2); first and last step of first.

    Carries the last x0_hat and the last step h in lambda = logsnr / 2.
    """

    def init(x_T: Array) -> tuple[Array, Array]:
        return jnp.zeros_like(x_T), jnp.zeros((), x_T.dtype)

    def step(
        carry: tuple[Array, Array], z_t: Array, x0_hat: Array, t: Array, s: Array, noise: Array
    ) -> tuple[tuple[Array, Array], Array]:
        x0_last, h_last = carry
        h = (process.logsnr(s) - process.logsnr(t)) / 2
        # h_last is 0 when there is no history to extrapolate from.
        slope = jnp.where(h_last > 0, h / (2 * jnp.where(h_last > 0, h_last, 1)), 0)
        x0 = x0_hat + slope * (x0_hat - x0_last)
        z_s = process.sigma(s) / process.sigma(t) * z_t - process.alpha(s) * jnp.expm1(-h) * x0
        return (x0_hat, h), _clean_at_zero(s, z_s, x0_hat)

    return Sampler(init, step)


def timesteps(num_steps: int, spacing: Spacing | None = None, num_timesteps: int | None = None) -> Array:
    """[num_steps + 1] float32 times: evenly from 1 to 0, or at the indices of a discrete process that a spacing takes.

    Each step leads from a time to the next in the list, as in diffusers' DDPM. Its DDIM goes N // num_steps indices
    down instead: the same for "leading", and for "trailing" where num_steps divides N.

    Args:
        num_steps: evaluations of the network.
        spacing: the indices n to visit; t = (n + 1) / N. A single step of "linspace" starts from N - 1.
        num_timesteps: N, needed with a spacing.

    Raises:
        ValueError: num_steps below 1 or more than the spacing has room for, N missing, or unknown kind.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; give at least 1.")
    if spacing is None:
        return jnp.linspace(1.0, 0.0, num_steps + 1)
    if num_timesteps is None:
        raise ValueError(f"The spacing {spacing.kind!r} is of discrete processes; give num_timesteps.")
    n = _indices(num_steps, spacing, num_timesteps)
    if num_steps > num_timesteps or n[0] >= num_timesteps:
        raise ValueError(f"{num_steps} steps of {spacing} do not fit {num_timesteps} timesteps; give fewer.")
    end = 0 if spacing.ends_clean else 1
    return jnp.asarray(np.append(n + 1, end) / num_timesteps, jnp.float32)


def initial_noise(keys_B: Array, shape: tuple[int, ...]) -> Array:
    """x_T: standard normal noise [B, *shape], picture i from keys_B[i] alone."""
    return _noise(keys_B, 0, shape)


def sample(denoise: Denoise, sampler: Sampler, ts: Array, keys_B: Array, shape: tuple[int, ...]) -> Array:
    """Sample a batch of pictures; a picture depends on its own key, not on its neighbours or the size of the batch.

    Args:
        denoise: (z_t [B, *shape], scalar t) -> x0_hat [B, *shape], float32 as z_t is; (x0_hat, v) for a sampler that
            takes learned variances.
        sampler: the method.
        ts: [steps + 1] decreasing times, as `timesteps` gives them; a discrete process of N needs steps <= N.
        keys_B: one random key a picture, used for nothing else.
        shape: shape of one picture, (H, W, C).

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


def _indices(num_steps: int, spacing: Spacing, num_timesteps: int) -> np.ndarray:
    """[num_steps] decreasing indices of a discrete process."""
    if spacing.kind == "leading":
        return num_timesteps // num_steps * np.arange(num_steps)[::-1] + spacing.offset
    if spacing.kind == "trailing":
        return np.round(np.arange(num_timesteps, 0, -num_timesteps / num_steps))[:num_steps] - 1
    if spacing.kind == "linspace":
        return np.round(np.linspace(0, num_timesteps - 1, max(num_steps, 2)))[::-1][:num_steps]
    raise ValueError(f"spacing is {spacing.kind!r}; give one of {', '.join(get_args(SpacingKind))}.")


def _noise_shares(process: Process, t: Array, s: Array) -> tuple[Array, Array]:
    """Shares of z_t's noise variance from before and after s < t; the second is sigma_{t|s}^2 / sigma_t^2."""
    change = process.logsnr(t) - process.logsnr(s)
    return jnp.exp(change), -jnp.expm1(change)  # each by itself: both may be far below 1


def _clean_at_zero(s: Array, z_s: Array, x0_hat: Array) -> Array:
    return jnp.where(s > 0, z_s, x0_hat)
