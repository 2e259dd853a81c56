"""The kinds of prediction, and the only conversions between them: each becomes (x0, eps)."""

from typing import Literal, get_args

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from personalize_jax.diffusion.process import Process, marginal_variance

Prediction = Literal["eps", "v", "x0", "velocity"]
Weighting = Literal["none", "min_snr"]
MIN_SNR_GAMMA = 5.0  # the value that Hang et al. 2023 recommend


def per_picture(value: ArrayLike, x: Array) -> Array:
    """Give a [B] value trailing axes of length 1 to broadcast over x [B, ...]; a scalar is left as it is."""
    value = jnp.asarray(value)
    return value.reshape(value.shape + (1,) * (x.ndim - 1)) if value.ndim else value


def add_noise(x0: Array, eps: Array, alpha: ArrayLike, sigma: ArrayLike) -> Array:
    """A sample of q(z_t | x0): z_t = alpha x0 + sigma eps.

    Args:
        x0: [B, ...] clean pictures in [-1, 1].
        eps: standard normal noise of x0's shape.
        alpha: scale of the picture, scalar or [B].
        sigma: scale of the noise, scalar or [B].
    """
    return per_picture(alpha, x0) * x0 + per_picture(sigma, x0) * eps


def target(kind: Prediction, x0: Array, eps: Array, alpha: ArrayLike, sigma: ArrayLike) -> Array:
    """The right output of a network of this kind for the input alpha x0 + sigma eps.

    Args:
        kind: "eps"; "x0"; "v", alpha eps - sigma x0 (Salimans & Ho 2022, section 4); or "velocity", eps - x0, along
            which a rectified flow moves (Liu et al. 2022; Lipman et al. 2023).
        x0: [B, ...] clean pictures in [-1, 1].
        eps: the noise that was added, of x0's shape.
        alpha: scale of the picture, scalar or [B].
        sigma: scale of the noise, scalar or [B].

    Raises:
        ValueError: unknown kind.
    """
    _check_choice("prediction", kind, Prediction)
    if kind == "eps":
        return eps
    if kind == "x0":
        return x0
    if kind == "velocity":
        return eps - x0
    return per_picture(alpha, x0) * eps - per_picture(sigma, x0) * x0


def to_x0_eps(kind: Prediction, output: Array, z_t: Array, alpha: ArrayLike, sigma: ArrayLike) -> tuple[Array, Array]:
    """(x0_hat, eps_hat) from a network's output; alpha x0_hat + sigma eps_hat = z_t for every kind.

    Args:
        kind: kind of the output; "eps" needs alpha > 0, "x0" needs sigma > 0.
        output: [B, ...] the network's output.
        z_t: the noisy input, of the output's shape.
        alpha: scale of the picture in z_t, scalar or [B].
        sigma: scale of the noise in z_t, scalar or [B].

    Raises:
        ValueError: unknown kind.
    """
    _check_choice("prediction", kind, Prediction)
    alpha, sigma = per_picture(alpha, z_t), per_picture(sigma, z_t)
    if kind == "eps":
        return (z_t - sigma * output) / alpha, output
    if kind == "x0":
        return output, (z_t - alpha * output) / sigma
    # The output's definition and z_t's are two equations; this is their solution, by the determinant of both.
    if kind == "velocity":
        determinant = alpha + sigma
        return (z_t - sigma * output) / determinant, (z_t + alpha * output) / determinant
    determinant = marginal_variance(alpha, sigma)
    return (alpha * z_t - sigma * output) / determinant, (sigma * z_t + alpha * output) / determinant


def loss_weight(kind: Prediction, process: Process, t: ArrayLike, weighting: Weighting = "none") -> Array:
    """Weight of the squared error between a network's output at t and its `target`, of t's shape.

    "none" is 1 in the network's own space. "min_snr" is min(snr, 5) in x0's space (Hang et al. 2023): at a given z_t,
    squared errors in eps are snr times those in x0, in v (snr + 1) (alpha^2 + sigma^2) times, and in velocity
    (sqrt(snr) + 1)^2 times, hence the division.

    Args:
        kind: kind of the network's output.
        process: the forward process.
        t: times in [0, 1], of any shape.
        weighting: "none" or "min_snr".

    Raises:
        ValueError: unknown kind or weighting.
    """
    _check_choice("prediction", kind, Prediction)
    _check_choice("weighting", weighting, Weighting)
    snr = jnp.exp(process.logsnr(t))
    if weighting == "none":
        return jnp.ones_like(snr)
    if kind == "eps":
        return jnp.minimum(1.0, MIN_SNR_GAMMA / snr)  # the quotient below would be 0 / 0 where snr is 0
    errors: dict[str, Array | float] = {
        "x0": 1.0,
        "v": (snr + 1) * marginal_variance(process.alpha(t), process.sigma(t)),
        "velocity": jnp.square(jnp.sqrt(snr) + 1),
    }
    return jnp.minimum(snr, MIN_SNR_GAMMA) / errors[kind]


def _check_choice(what: str, given: str, choices: object) -> None:
    if given not in get_args(choices):
        raise ValueError(f"{what} is {given!r}; give one of {', '.join(get_args(choices))}.")
