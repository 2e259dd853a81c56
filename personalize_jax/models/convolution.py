"""The convolution of the public networks."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike


class Conv(nn.Module):
    """Convolution of pictures with a square kernel, as `nn.Conv`; a 1x1 kernel is a matrix product.

    Attributes:
        features: channels of the output.
        size: side of the kernel.
        stride: of the output's positions.
        padding: rows and columns of zeros added before and after height and width; None adds size // 2 everywhere.
        dtype: of the computation; parameters are float32.
        kernel_init: of the kernel [size, size, C, features].
    """

    features: int
    size: int = 3
    stride: int = 1
    padding: tuple[tuple[int, int], tuple[int, int]] | None = None
    dtype: DTypeLike = jnp.float32
    kernel_init: Callable = nn.linear.default_kernel_init

    @nn.compact
    def __call__(self, x_BHWC: Array) -> Array:
        """Return [B, H', W', features]."""
        k = self.size
        kernel = self.param("kernel", self.kernel_init, (k, k, x_BHWC.shape[-1], self.features)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,)).astype(self.dtype)
        x = x_BHWC.astype(self.dtype)
        if k == 1 and self.stride == 1 and self.padding is None:
            return x @ kernel[0, 0] + bias
        padding = self.padding or ((k // 2, k // 2),) * 2
        strides, order = (self.stride, self.stride), ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=order) + bias
