"""Noise schedules: how much of a picture and how much noise there is in z_t = alpha_t x + sigma_t eps.

Time runs from t = 0 (clean) to t = 1 (noise). Every schedule preserves variance, alpha^2 + sigma^2 = 1, so that one
function describes it: logsnr(t) = log(alpha_t^2 / sigma_t^2).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike


@dataclass(frozen=True)
class Schedule:
    """A noise schedule; compared and hashed by value, so that it can be a static argument of jit.

    Attributes:
        function: logsnr as a function of t and of `arguments`, decreasing in t.
        arguments: hashable constants of `function`.
        num_timesteps: N of a schedule defined at t = 1/N, 2/N, ..., 1 only, or None for continuous time.
    """

    function: Callable[..., Array]
    arguments: tuple = ()
    num_timesteps: int | None = None

    def logsnr(self, t: ArrayLike) -> Array:
        """Log signal-to-noise ratio, of t's shape; t in [0, 1].

        Discrete schedules give +inf at t = 0, and -inf at t = 1 where their last beta is 1.
        """
        return self.function(jnp.asarray(t), *self.arguments)

    def alpha(self, t: ArrayLike) -> Array:
        """Scale of the picture, in [0, 1], of t's shape."""
        return jnp.sqrt(jax.nn.sigmoid(self.logsnr(t)))

    def sigma(self, t: ArrayLike) -> Array:
        """Standard deviation of the noise, in [0, 1], of t's shape."""
        return jnp.sqrt(jax.nn.sigmoid(-self.logsnr(t)))

    def network_time(self, t: ArrayLike) -> Array:
        """What a network is told about t: t itself, or in discrete time the int32 index n in 0..N-1."""
        if self.num_timesteps is None:
            return jnp.asarray(t)
        return jnp.maximum(_position(jnp.asarray(t), self.num_timesteps) - 1, 0)


def cosine(shift: float = 0.0, logsnr_min: float = -15.0, logsnr_max: float = 15.0) -> Schedule:
    """Cosine schedule, logsnr = -2 log tan(pi t / 2) + shift (Nichol & Dhariwal 2021; Hoogeboom et al. 2023).

    Args:
        shift: added to logsnr after the limits; 2 log(64 / 256) moves a schedule made for 64 pixels to 256.
        logsnr_min: logsnr at t = 1, before the shift.
        logsnr_max: logsnr at t = 0, before the shift.

    Raises:
        ValueError: the limits are not in increasing order.
    """
    if logsnr_min >= logsnr_max:
        raise ValueError(f"logsnr_min is {logsnr_min} and logsnr_max {logsnr_max}; give limits with min < max.")
    return Schedule(_cosine_logsnr, (shift, logsnr_min, logsnr_max))


def linear() -> Schedule:
    """DDPM's linear betas in continuous time, logsnr = -log(expm1(1e-4 + 10 t^2)) (Kingma et al. 2021)."""
    return Schedule(_linear_logsnr)


def discrete(betas: Sequence[float] | np.ndarray) -> Schedule:
    """DDPM's schedule of N steps: alpha^2 at index n is prod_{i <= n} (1 - beta_i) (Ho et al. 2020, eq. 4).

    Index n is t = (n + 1) / N; a t in between counts as the next noisier index, and t = 0 is exactly clean.

    Args:
        betas: [N] variances in (0, 1); the last may be 1, so that nothing of the picture is left at t = 1.

    Raises:
        ValueError: betas are not a non-empty list of such numbers.
    """
    betas_N = np.asarray(betas, np.float64)
    within = (betas_N > 0) & (betas_N < 1)
    if betas_N.ndim != 1 or not betas_N.size or not within[:-1].all() or not (within[-1] or betas_N[-1] == 1):
        raise ValueError(
            f"betas of shape {betas_N.shape} were given; give a non-empty list of numbers in (0, 1), or 1 for the last."
        )
    with np.errstate(divide="ignore"):  # log 0 is meant
        log_alpha2_N = np.cumsum(np.log1p(-betas_N))
    logsnr_N = log_alpha2_N - np.log(-np.expm1(log_alpha2_N))
    return Schedule(_table_logsnr, (np.inf, *logsnr_N.tolist()), num_timesteps=betas_N.size)


def linear_betas(beta_start: float = 1e-4, beta_end: float = 0.02, n: int = 1000) -> np.ndarray:
    """[n] equally spaced betas (Ho et al. 2020, section 4)."""
    return np.linspace(beta_start, beta_end, n)


def scaled_linear_betas(beta_start: float = 0.00085, beta_end: float = 0.012, n: int = 1000) -> np.ndarray:
    """[n] betas with equally spaced square roots (latent diffusion, Rombach et al. 2022; Stable Diffusion)."""
    return np.linspace(beta_start**0.5, beta_end**0.5, n) ** 2


def squaredcos_betas(n: int = 1000) -> np.ndarray:
    """[n] betas of the discrete cosine schedule, at most 0.999 (Nichol & Dhariwal 2021, eq. 17; DeepFloyd IF)."""
    alpha2 = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha2[1:] / alpha2[:-1], 0.999)


def rescale_zero_terminal_snr(betas: Sequence[float] | np.ndarray) -> np.ndarray:
    """[N] betas whose last is 1: alpha is shifted to 0 at t = 1 and scaled to stay what it was at t = 1 / N.

    (Lin et al. 2023, algorithm 1.) A network then needs the prediction "v" or "x0": eps tells nothing at t = 1.

    Args:
        betas: [N] variances in (0, 1).
    """
    alpha_N = np.sqrt(np.cumprod(1 - np.asarray(betas, np.float64)))
    alpha_N = (alpha_N - alpha_N[-1]) * alpha_N[0] / (alpha_N[0] - alpha_N[-1])
    alpha2_N = alpha_N**2
    return 1 - alpha2_N / np.append(1.0, alpha2_N[:-1])


def _cosine_logsnr(t: Array, shift: float, logsnr_min: float, logsnr_max: float) -> Array:
    # tan(angle) = sigma / alpha. The angle's complement has its own sum: subtracting from pi/2 would lose the digits
    # on which logsnr near t = 1 rests.
    angle_min = np.arctan(np.exp(-logsnr_max / 2))
    complement_min = np.arctan(np.exp(logsnr_min / 2))
    width = np.pi / 2 - angle_min - complement_min
    angle = angle_min + width * t
    complement = complement_min + width * (1 - t)
    return 2 * (jnp.log(jnp.sin(complement)) - jnp.log(jnp.sin(angle))) + shift


def _linear_logsnr(t: Array) -> Array:
    return -jnp.log(jnp.expm1(1e-4 + 10 * t**2))


def _table_logsnr(t: Array, *table: float) -> Array:
    return jnp.asarray(table, t.dtype)[_position(t, len(table) - 1)]


def _position(t: Array, num_timesteps: int) -> Array:
    # The tolerance, far below one step, keeps t = (n + 1) / N on its index when rounding lifts t N above n + 1.
    return jnp.clip(jnp.ceil(t * num_timesteps - 1e-3), 0, num_timesteps).astype(jnp.int32)
