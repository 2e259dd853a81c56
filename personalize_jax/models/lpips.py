"""LPIPS, the learned perceptual distance of two pictures.

Zhang et al. 2018 (The Unreasonable Effectiveness of Deep Features as a Perceptual Metric), version 0.1 of its authors'
package, whose names the parameters have; over AlexNet, which they advise for measuring.
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array


class Layer(NamedTuple):
    """A convolution with a ReLU behind it.

    Attributes:
        place: its place in torchvision's list of layers.
        channels: channels of the output.
        size: side of the kernel.
        stride: stride of the output's positions.
        padding: zeros on each side.
        pool: side of the maximum taken before it, with stride 2; 0 for none.
    """

    place: int
    channels: int
    size: int = 3
    stride: int = 1
    padding: int = 1
    pool: int = 0


# AlexNet's layers; the outputs of each are compared.
LAYERS = (
    Layer(0, 64, size=11, stride=4, padding=2),
    Layer(3, 192, size=5, padding=2, pool=3),
    Layer(6, 384, pool=3),
    Layer(8, 256),
    Layer(10, 256),
)
# ImageNet's mean and deviation, for pictures in [-1, 1].
_SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
_SCALE = np.array([0.458, 0.448, 0.450], np.float32)


class Features(nn.Module):
    """AlexNet's features."""

    @nn.compact
    def __call__(self, x_BHWC: Array) -> list[Array]:
        """Return [B, H', W', C'] of each layer."""
        outputs = []
        for number, layer in enumerate(LAYERS, start=1):
            if layer.pool:
                x_BHWC = nn.max_pool(x_BHWC, (layer.pool, layer.pool), (2, 2))
            kernel, strides = (layer.size, layer.size), (layer.stride, layer.stride)
            name = f"slice{number}_{layer.place}"
            x_BHWC = nn.relu(nn.Conv(layer.channels, kernel, strides, layer.padding, name=name)(x_BHWC))
            outputs.append(x_BHWC)
        return outputs


class Head(nn.Module):
    """Weights of a layer's channels."""

    @nn.compact
    def __call__(self, x_BHWC: Array) -> Array:
        """Return [B, H, W]."""
        return nn.Dense(1, use_bias=False, name="model_1")(x_BHWC)[..., 0]


class Lpips(nn.Module):
    """The distance of each picture to its counterpart."""

    @nn.compact
    def __call__(self, x_BHWC: Array, y_BHWC: Array) -> Array:
        """Compare pictures.

        Args:
            x_BHWC: float32 [B, H, W, 3] in [-1, 1], of 32 x 32 pixels or more.
            y_BHWC: the same.

        Returns:
            [B], 0 for the same pictures.
        """
        net = Features(name="net")
        pairs = zip(*(net((a - _SHIFT) / _SCALE) for a in (x_BHWC, y_BHWC)), strict=True)
        distance_B = jnp.zeros(x_BHWC.shape[0])
        for i, (x, y) in enumerate(pairs):
            distance_B += Head(name=f"lin{i}")(jnp.square(_unit(x) - _unit(y))).mean((1, 2))
        return distance_B


def _unit(x_BHWC: Array) -> Array:
    return x_BHWC / (jnp.linalg.norm(x_BHWC, axis=-1, keepdims=True) + 1e-10)
