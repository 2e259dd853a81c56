"""Forward processes: the shares alpha_t of a picture and sigma_t of noise in z_t = alpha_t x + sigma_t eps.

Time runs from t = 0 (clean) to t = 1 (noise, sampled as standard normal). alpha and sigma are independent functions of
it. A variance-preserving process, alpha^2 + sigma^2 = 1, follows from logsnr(t) = log(alpha_t^2 / sigma_t^2) alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import ndtri
from jax.typing import ArrayLike


@dataclass(frozen=True)
class Function:
    """A function of an array and of constants; compared and hashed by value, which `functools.partial` is not.

    Attributes:
        body: the function, called with the array and the constants.
        constants: hashable values.
    """

    body: Callable[..., Array]
    constants: tuple = ()

    def __call__(self, x: ArrayLike) -> Array:
        """The function's value, of x's shape."""
        return self.body(jnp.asarray(x), *self.constants)


def uniform() -> Function:
    """Times that are uniform in (0, 1), as their inverse CDF."""
    return Function(_identity)


def logit_normal(mean: float = 0.0, std: float = 1.0) -> Function:
    """Times whose logit is normal, as their inverse CDF (Esser et al. 2024, section 3.1).

    Args:
        mean: mean of log(t / (1 - t)); above 0 favours noisy times.
        std: standard deviation of log(t / (1 - t)), above 0.

    Raises:
        ValueError: std is not above 0.
    """
    if not std > 0:
        raise ValueError(f"std is {std}; give a number above 0, such as 1.")
    return Function(_logit_normal_quantile, (mean, std))


def shifted(shift: float) -> Function:
    """Times shift u / (1 + (shift - 1) u) of uniform u, as their inverse CDF (Esser et al. 2024, eq. 23).

    Args:
        shift: above 0; more than 1 favours noisy times.

    Raises:
        ValueError: shift is not above 0.
    """
    return Function(_shifted, (_checked_shift(shift),))


@dataclass(frozen=True)
class Process:
    """A forward process; compared and hashed by value, so that it can be a static argument of jit.

    Attributes:
        alpha: scale of the picture in z_t as a function of t in [0, 1].
        sigma: standard deviation of the noise in z_t as a function of t in [0, 1].
        network_time: the number that tells a network t, as a function of t.
        exact_logsnr: logsnr as a function of t where a form is known that keeps its digits at both ends of time; None
            takes it from alpha and sigma.
        times: inverse CDF of the times at which training noises pictures, see `uniform`.
        num_timesteps: N of a process that is defined at t = 1/N, 2/N, ..., 1 only, or None for continuous time.
    """

    alpha: Function
    sigma: Function
    network_time: Function
    exact_logsnr: Function | None = None
    times: Function = field(default_factory=uniform)
    num_timesteps: int | None = None

    def logsnr(self, t: ArrayLike) -> Array:
        """Log signal-to-noise ratio log(alpha^2 / sigma^2), of t's shape; t in [0, 1].

        +inf where nothing is noise, -inf where nothing is left of the picture.
        """
        if self.exact_logsnr is not None:
            return self.exact_logsnr(t)
        return 2 * (jnp.log(self.alpha(t)) - jnp.log(self.sigma(t)))

    def sample_times(self, key: Array, batch: int) -> Array:
        """[batch] float32 times for training, increasing, one from each of `batch` equally probable ranges.

        Such strata have the same expectation as independent times with less variance. One uniform number places all
        times in their ranges. A discrete process has times of its own; no time is t = 0, which is clean.
        """
        # Uniform numbers are multiples of 2^-23, 0 among them.
        u_B = (jnp.arange(batch) + jnp.maximum(jax.random.uniform(key, ()), 2.0**-24)) / batch
        t_B = self.times(u_B)
        if N := self.num_timesteps:
            t_B = jnp.minimum(jnp.floor(t_B * N) + 1, N) / N  # index n is met where t lies in [n / N, (n + 1) / N)
        return t_B


def marginal_variance(alpha: ArrayLike, sigma: ArrayLike) -> Array:
    """Variance of z_t for data of variance 1, alpha^2 + sigma^2; exactly 1 where a process preserves variance.

    Args:
        alpha: scale of the picture, of any shape.
        sigma: standard deviation of the noise, of alpha's shape.
    """
    variance = jnp.square(alpha) + jnp.square(sigma)
    # What separates the sum from 1 there is rounding: to divide by it would only add to that.
    return jnp.where(jnp.abs(variance - 1) < 1e-6, 1.0, variance)


def cosine(shift: float = 0.0, logsnr_min: float = -15.0, logsnr_max: float = 15.0) -> Process:
    """Variance-preserving, logsnr = -2 log tan(pi t / 2) + shift (Nichol & Dhariwal 2021; Hoogeboom et al. 2023).

    Args:
        shift: added to logsnr after the limits; 2 log(64 / 256) moves a process made for 64 pixels to 256.
        logsnr_min: logsnr at t = 1, before the shift.
        logsnr_max: logsnr at t = 0, before the shift.

    Raises:
        ValueError: the limits are not in increasing order.
    """
    if logsnr_min >= logsnr_max:
        raise ValueError(f"logsnr_min is {logsnr_min} and logsnr_max {logsnr_max}; give limits with min < max.")
    return _variance_preserving(Function(_cosine_logsnr, (shift, logsnr_min, logsnr_max)))


def linear() -> Process:
    """DDPM's linear betas in continuous time, logsnr = -log(expm1(1e-4 + 10 t^2)) (Kingma et al. 2021)."""
    return _variance_preserving(Function(_linear_logsnr))


def discrete(betas: Sequence[float] | np.ndarray) -> Process:
    """DDPM's process of N steps: alpha^2 at index n is prod_{i <= n} (1 - beta_i) (Ho et al. 2020, eq. 4).

    Index n is t = (n + 1) / N; a t in between counts as the next noisier index, and t = 0 is exactly clean. Networks
    are told the index, int32 in 0..N-1.

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
    with np.errstate(divide="ignore"):  # log 0 is -inf as it should be
        log_alpha2_N = np.cumsum(np.log1p(-betas_N))
    logsnr_N = log_alpha2_N - np.log(-np.expm1(log_alpha2_N))
    logsnr = Function(_table_logsnr, (np.inf, *logsnr_N.tolist()))
    return _variance_preserving(logsnr, Function(_index, (betas_N.size,)), betas_N.size)


def rectified_flow(shift: float = 1.0, time_scale: float = 1.0) -> Process:
    """Straight paths from picture to noise, z_t = (1 - sigma) x + sigma eps (Liu et al. 2022; Lipman et al. 2023).

    Args:
        shift: above 0, of sigma = shift t / (1 + (shift - 1) t); more than 1 gives more of time to noise, as larger
            pictures need (Esser et al. 2024, eq. 23; see `resolution_shift`).
        time_scale: networks are told time_scale sigma: 1000 in Stable Diffusion 3, 1 where they scale it themselves.

    Raises:
        ValueError: shift is not above 0.
    """
    shift = _checked_shift(shift)
    return Process(
        alpha=Function(_shifted_complement, (shift,)),
        sigma=Function(_shifted, (shift,)),
        network_time=Function(_scaled_shifted, (shift, time_scale)),
    )


def resolution_shift(tokens: int) -> float:
    """FLUX's shift of a rectified flow for pictures of a number of tokens.

    It is exp(mu), with mu linear in the number of tokens: 0.5 at 256 and 1.15 at 4096 (black-forest-labs/flux,
    sampling.py). A token covers 16 x 16 pixels: 4096 are a picture of 1024 x 1024.

    Args:
        tokens: number of the picture's tokens in the transformer, 1 or more.

    Raises:
        ValueError: tokens below 1.
    """
    if tokens < 1:
        raise ValueError(f"tokens is {tokens}; give the number of a picture's tokens, such as 4096.")
    return float(np.exp(0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)))


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
    """[N] betas whose last is 1: alpha is shifted to 0 at t = 1 and scaled to keep its value at t = 1 / N.

    (Lin et al. 2023, algorithm 1.) A network then needs the prediction "v" or "x0": eps tells nothing at t = 1.

    Args:
        betas: [N] variances in (0, 1).
    """
    alpha_N = np.sqrt(np.cumprod(1 - np.asarray(betas, np.float64)))
    alpha_N = (alpha_N - alpha_N[-1]) * alpha_N[0] / (alpha_N[0] - alpha_N[-1])
    alpha2_N = alpha_N**2
    return 1 - alpha2_N / np.append(1.0, alpha2_N[:-1])


def _variance_preserving(
    logsnr: Function, network_time: Function | None = None, num_timesteps: int | None = None
) -> Process:
    return Process(
        alpha=Function(_signal, (logsnr,)),
        sigma=Function(_noise, (logsnr,)),
        network_time=network_time or Function(_identity),
        exact_logsnr=logsnr,
        num_timesteps=num_timesteps,
    )


def _identity(x: Array) -> Array:
    return x


def _signal(t: Array, logsnr: Function) -> Array:
    return jnp.sqrt(jax.nn.sigmoid(logsnr(t)))


def _noise(t: Array, logsnr: Function) -> Array:
    return jnp.sqrt(jax.nn.sigmoid(-logsnr(t)))


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


def _index(t: Array, num_timesteps: int) -> Array:
    return jnp.maximum(_position(t, num_timesteps) - 1, 0)


def _position(t: Array, num_timesteps: int) -> Array:
    # The tolerance, far below one step, keeps t = (n + 1) / N on its index when rounding lifts t N above n + 1.
    return jnp.clip(jnp.ceil(t * num_timesteps - 1e-3), 0, num_timesteps).astype(jnp.int32)


def _shifted(t: Array, shift: float) -> Array:
    return shift * t / (1 + (shift - 1) * t)


def _shifted_complement(t: Array, shift: float) -> Array:
    # 1 - _shifted(t, shift), without that difference's loss of digits where almost all is noise.
    return (1 - t) / (1 + (shift - 1) * t)


def _scaled_shifted(t: Array, shift: float, scale: float) -> Array:
    return scale * _shifted(t, shift)


def _logit_normal_quantile(u: Array, mean: float, std: float) -> Array:
    return jax.nn.sigmoid(mean + std * ndtri(u))


def _checked_shift(shift: float) -> float:
    if not shift > 0:
        raise ValueError(f"shift is {shift}; give a number above 0, such as 3.")
    return shift
