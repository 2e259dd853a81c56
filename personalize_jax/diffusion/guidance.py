"""Classifier-free guidance, and the thresholding that keeps guided predictions within the range of pictures."""

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from personalize_jax.diffusion.prediction import per_picture


def guide(cond: Array, uncond: Array, w: ArrayLike) -> Array:
    """Classifier-free guidance, uncond + w (cond - uncond): w = 0 is unconditional, w = 1 conditional, w > 1 guided.

    The weight of Ho & Salimans 2022 (eq. 6) is w - 1. Any prediction kind can be guided: given z_t they are affine in
    each other, and the two weights sum to 1.

    Args:
        cond: [B, ...] prediction with the prompt.
        uncond: prediction with the empty prompt, of cond's shape.
        w: guidance scale, scalar or [B].
    """
    return uncond + per_picture(w, cond) * (cond - uncond)


def dynamic_threshold(x0: Array, percentile: float = 0.995, max_value: float | None = None) -> Array:
    """Imagen's dynamic thresholding: x0 is clipped to [-s, s] and divided by s (Saharia et al. 2022, section 2.3).

    s is a quantile of |x0| over each picture, clamped to [1, max_value]: a picture within [-1, 1] stays as it is, and
    `max_value` = 1 is static thresholding, which clips to [-1, 1].

    Args:
        x0: [B, ...] pictures.
        percentile: the quantile as a fraction in (0, 1].
        max_value: largest s, at least 1; None for no limit.

    Returns:
        Pictures in [-1, 1].

    Raises:
        ValueError: percentile or max_value out of range.
    """
    if not 0 < percentile <= 1:
        raise ValueError(f"percentile is {percentile}; give a fraction in (0, 1], such as 0.995.")
    if max_value is not None and max_value < 1:
        raise ValueError(f"max_value is {max_value}; give at least 1, or None for no limit.")
    if max_value == 1:
        return jnp.clip(x0, -1, 1)  # without the sorting that the quantile takes
    s_B = jnp.clip(jnp.quantile(jnp.abs(x0), percentile, axis=tuple(range(1, x0.ndim))), 1, max_value)
    s = per_picture(s_B, x0)
    return jnp.clip(x0, -s, s) / s
