"""The variational bound, by which a network learns the variance of its steps (Nichol & Dhariwal 2021, section 3.1)."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import log_ndtr

from personalize_jax.diffusion.prediction import per_picture
from personalize_jax.diffusion.process import Process
from personalize_jax.diffusion.samplers import learned_log_variance, posterior, step_variances


def variational_bound(process: Process, x0: Array, z_t: Array, x0_hat: Array, v: Array, t_B: Array) -> Array:
    """One term L_n of the bound L_vlb = sum_n L_n, per picture (Nichol & Dhariwal 2021, eq. 4-6).

    The term at index n is KL(q(z_s | z_t, x0) || p(z_s | z_t)) over one step of the process, and -log p(x0 | z_t) at
    n = 0. The mean's gradient is the caller's matter: the paper stops it and trains the mean with the simple loss.
    It weighs L_vlb with .001 (eq. 16), hence the mean of these terms over random times with .001 N.

    Args:
        process: a forward process of N discrete steps.
        x0: [B, ...] clean 8-bit pictures, scaled to [-1, 1].
        z_t: noisy pictures at t_B, of x0's shape.
        x0_hat: predicted pictures, of x0's shape, from which p has its mean.
        v: predicted place of p's variance between its bounds, about in [-1, 1], of x0's shape.
        t_B: times, [B].

    Returns:
        [B] terms in bits per dimension.

    Raises:
        ValueError: the process is in continuous time.
    """
    N = process.num_timesteps
    if N is None:
        raise ValueError("The process is in continuous time; give a discrete one to have terms of single steps.")
    n_B = process.network_time(t_B)
    t_B, s_B = (n_B + 1) / N, n_B / N
    q_mean, _ = posterior(process, z_t, x0, t_B, s_B)
    p_mean, _ = posterior(process, z_t, x0_hat, t_B, s_B)
    _, large_B = step_variances(process, t_B, s_B)
    # The first step's posterior has no variance: p's lower bound there is the second step's, as in the authors' code.
    small_B, _ = step_variances(process, jnp.maximum(t_B, 2 / N), jnp.maximum(s_B, 1 / N))
    small, large = per_picture(small_B, x0), per_picture(large_B, x0)
    p_log_variance = learned_log_variance(small, large, v)
    kl = _normal_kl(q_mean, jnp.log(small), p_mean, p_log_variance)
    nll = -discretized_log_likelihood(x0, p_mean, jnp.exp(p_log_variance / 2))
    nats = jnp.where(per_picture(n_B == 0, x0), nll, kl)
    return nats.mean(tuple(range(1, x0.ndim))) / np.log(2)


def discretized_log_likelihood(x: Array, mean: Array, std: Array) -> Array:
    """Log probability of 8-bit values under a normal distribution cut into 256 bins (Ho et al. 2020, eq. 13).

    Args:
        x: values level / 127.5 - 1; their bins reach halfway to the neighbours, the outermost to infinity.
        mean: mean of the distribution, of x's shape.
        std: standard deviation, of x's shape, above 0.

    Returns:
        Nats, of x's shape.
    """
    lower, upper = (x - 1 / 255 - mean) / std, (x + 1 / 255 - mean) / std
    # A bin above the mean is mirrored: far from the mean only the lower tail keeps its digits.
    near, far = jnp.where(x > mean, -lower, upper), jnp.where(x > mean, -upper, lower)
    log_near = log_ndtr(near)
    inside = log_near + jnp.log(-jnp.expm1(log_ndtr(far) - log_near))
    return jnp.where(x < -0.999, log_ndtr(upper), jnp.where(x > 0.999, log_ndtr(-lower), inside))


def _normal_kl(q_mean: Array, q_log_variance: Array, p_mean: Array, p_log_variance: Array) -> Array:
    ratio = q_log_variance - p_log_variance
    return (jnp.exp(ratio) - 1 - ratio + jnp.square(q_mean - p_mean) * jnp.exp(-p_log_variance)) / 2
