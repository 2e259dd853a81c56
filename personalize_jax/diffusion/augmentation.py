"""The low-resolution picture that conditions a super-resolution network is enlarged and noised here."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from personalize_jax.diffusion.prediction import add_noise
from personalize_jax.diffusion.process import Process


def upsample(low_BHWC: Array, size: int, align_corners: bool = False) -> Array:
    """[B, size, size, C] pictures by bilinear interpolation.

    Args:
        low_BHWC: pictures.
        size: side of the larger pictures.
        align_corners: whether the centres of the corner pixels stay in the corners (PyTorch's align_corners=True, as in
            DeepFloyd IF). Otherwise pixels are areas, pixel i of n covers [i / n, (i + 1) / n], so that the picture
            does not shift, and the border's half pixel repeats the edge.

    Raises:
        ValueError: size is below the pictures' sides.
    """
    batch, height, width, channels = low_BHWC.shape
    if size < max(height, width):
        raise ValueError(f"Pictures of {height}x{width} cannot be enlarged to {size}x{size}; give a larger size.")
    if not align_corners:
        return jax.image.resize(low_BHWC, (batch, size, size, channels), "bilinear", antialias=False)
    rows, columns = _corner_weights(height, size), _corner_weights(width, size)
    return jnp.einsum("ih,bhwc,jw->bijc", rows, low_BHWC, columns, precision="highest")


def sample_levels(key: Array, batch: int, low: float, high: float) -> Array:
    """[batch] float32 noise levels, uniform in [low, high].

    Raises:
        ValueError: the range is not within [0, 1].
    """
    if not 0 <= low <= high <= 1:
        raise ValueError(f"The range of levels is [{low}, {high}]; give 0 <= low <= high <= 1.")
    return jax.random.uniform(key, (batch,), minval=low, maxval=high)


def augment(process: Process, low_BHWC: Array, level_B: ArrayLike, noise: Array) -> Array:
    """Noise-conditioning augmentation (Ho et al. 2022; Saharia et al. 2022, section 2.4; specification [0093]).

    Args:
        process: the forward process of the augmentation, apart from the network's own.
        low_BHWC: (upsampled) low-resolution pictures in [-1, 1].
        level_B: a time of the process in [0, 1], scalar or [B]; the network is told it too.
        noise: standard normal noise of low_BHWC's shape.

    Returns:
        alpha_level low + sigma_level noise.
    """
    return add_noise(low_BHWC, noise, process.alpha(level_B), process.sigma(level_B))


def _corner_weights(n: int, size: int) -> Array:
    """[size, n] weights that interpolate n points linearly at `size` points, the first and the last kept."""
    return jnp.maximum(1 - jnp.abs(jnp.linspace(0.0, n - 1.0, size)[:, None] - jnp.arange(n)), 0)
