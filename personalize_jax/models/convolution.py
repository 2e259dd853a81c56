"""The convolution of the networks.

Gradients are written out, because XLA's CPU compiler has a fast convolution for one order of dimensions only, into
which it brings others outside of loops alone: a kernel's gradient that JAX derives takes sixty times as long in a loop
over microbatches or steps.
"""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

# Winograd's minimal filtering F(2x2, 3x3) (Lavin & Gray 2016, eq. 8 to 10): two by two outputs from tiles of four by
# four, in 16 products instead of 36.
_B = np.array([[1, 0, 0, 0], [0, 1, -1, 1], [-1, 1, 1, 0], [0, 0, 0, -1]])
_G = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
_A = np.array([[1, 0], [1, 1], [1, -1], [0, -1]])
# With fewer channels or pixels the sums around the products, and compiling them, take longer than they save.
_FEWEST_CHANNELS, _FEWEST_PIXELS = 128, 16 * 16

_ORDER = ("NHWC", "HWIO", "NHWC")
_Padding = tuple[tuple[int, int], tuple[int, int]]
_BORDER: _Padding = ((1, 1), (1, 1))
_Grid = Sequence[Sequence[Array]]


class Conv(nn.Module):
    """Convolution of pictures with a square kernel, as `nn.Conv`.

    A 1x1 kernel is a matrix product. In float32, with enough channels and pixels, a 3x3 kernel that keeps the size goes
    by `convolve_3x3`.

    Attributes:
        features: channels of the output.
        size: side of the kernel.
        stride: stride of the output's positions.
        padding: rows and columns of zeros added before and after height and width; None adds size // 2 everywhere.
        dtype: dtype of the computation; parameters are float32.
        kernel_init: initial values of the kernel.
    """

    features: int
    size: int = 3
    stride: int = 1
    padding: _Padding | None = None
    dtype: DTypeLike = jnp.float32
    kernel_init: nn.initializers.Initializer = nn.linear.default_kernel_init

    @nn.compact
    def __call__(self, x_BHWC: Array) -> Array:
        """Return [B, H', W', features]."""
        k, (_, H, W, C) = self.size, x_BHWC.shape
        kernel = self.param("kernel", self.kernel_init, (k, k, C, self.features)).astype(self.dtype)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,)).astype(self.dtype)
        x = x_BHWC.astype(self.dtype)
        keeps_size = self.stride == 1 and self.padding is None
        if k == 1 and keeps_size:
            return x @ kernel[0, 0] + bias
        large = min(C, self.features) >= _FEWEST_CHANNELS and H * W >= _FEWEST_PIXELS
        if k == 3 and keeps_size and large and x.dtype == jnp.float32:
            return convolve_3x3(x, kernel) + bias
        return convolve(x, kernel, self.stride, self.padding or ((k // 2, k // 2),) * 2) + bias


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def convolve(x_BHWC: Array, kernel_kkCK: Array, stride: int = 1, padding: _Padding = _BORDER) -> Array:
    """Convolve as XLA does, with gradients that are fast in loops, too.

    Args:
        x_BHWC: pictures.
        kernel_kkCK: the kernel.
        stride: stride of the output's positions.
        padding: rows and columns of zeros added before and after height and width.

    Returns:
        [B, H', W', K].
    """
    return _convolve(x_BHWC, kernel_kkCK, stride, padding)


def _forward_any(x: Array, kernel: Array, stride: int, padding: _Padding) -> tuple[Array, tuple[Array, Array]]:
    return _convolve(x, kernel, stride, padding), (x, kernel)


def _backward_any(stride: int, padding: _Padding, saved: tuple[Array, Array], d_y: Array) -> tuple[Array, Array]:
    in_order, derived = partial(_gradients_in_order, stride, padding), partial(_gradients, stride, padding)
    return lax.platform_dependent(*saved, d_y, cpu=in_order, default=derived)


convolve.defvjp(_forward_any, _backward_any)


def _gradients(stride: int, padding: _Padding, x: Array, kernel: Array, d_y: Array) -> tuple[Array, Array]:
    return _picture_gradient(kernel, d_y, x.shape, stride, padding), _kernel_gradient(
        x, d_y, kernel.shape, stride, padding
    )


def _gradients_in_order(stride: int, padding: _Padding, x: Array, kernel: Array, d_y: Array) -> tuple[Array, Array]:
    """Both gradients as convolutions of pictures [B, H, W, C] with kernels [k, k, C, K]."""
    k = kernel.shape[0]
    # Along each axis: the pixels between the first and the last that an output begins at, both included.
    spans = [(size - 1) * stride + 1 for size in d_y.shape[1:3]]
    sides = list(zip(x.shape[1:3], spans, (before for before, _ in padding), strict=True))
    around = [(k - 1 - before, size - span + before) for size, span, before in sides]
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    d_x = lax.conv_general_dilated(d_y, turned, (1, 1), around, lhs_dilation=(stride, stride), dimension_numbers=_ORDER)
    around = [(before, k - 1 - size - before + span) for size, span, before in sides]
    pictures, kernels = x.transpose(3, 1, 2, 0), d_y.transpose(1, 2, 0, 3)
    d_kernel = lax.conv_general_dilated(
        pictures, kernels, (1, 1), around, rhs_dilation=(stride, stride), dimension_numbers=_ORDER
    )
    return d_x, d_kernel.transpose(1, 2, 0, 3)


@jax.custom_vjp
def convolve_3x3(x_BHWC: Array, kernel_33CK: Array) -> Array:
    """Convolve with stride 1 and a border of zeros; on CPU by minimal filtering, elsewhere as XLA does.

    In float32 minimal filtering is as exact as XLA's own convolutions. The gradients go the same way.

    Args:
        x_BHWC: pictures.
        kernel_33CK: the kernel.

    Returns:
        [B, H, W, K].
    """
    return lax.platform_dependent(x_BHWC, kernel_33CK, cpu=_convolve_minimal, default=_convolve)


def _forward(x_BHWC: Array, kernel_33CK: Array) -> tuple[Array, tuple[Array, Array]]:
    return convolve_3x3(x_BHWC, kernel_33CK), (x_BHWC, kernel_33CK)


def _backward(saved: tuple[Array, Array], d_y_BHWK: Array) -> tuple[Array, Array]:
    # Without the barrier XLA may keep tiles of the forward pass, four times the size of x, for the backward pass.
    x, kernel = lax.optimization_barrier(saved)
    of_picture, of_kernel = partial(_picture_gradient, shape=x.shape), partial(_kernel_gradient, shape=kernel.shape)
    d_x = lax.platform_dependent(kernel, d_y_BHWK, cpu=_picture_gradient_minimal, default=of_picture)
    return d_x, lax.platform_dependent(x, d_y_BHWK, cpu=_kernel_gradient_minimal, default=of_kernel)


convolve_3x3.defvjp(_forward, _backward)


def _convolve(x: Array, kernel: Array, stride: int = 1, padding: _Padding = _BORDER) -> Array:
    return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=_ORDER)


def _picture_gradient(
    kernel: Array, d_y: Array, shape: Sequence[int], stride: int = 1, padding: _Padding = _BORDER
) -> Array:
    x = jax.ShapeDtypeStruct(shape, d_y.dtype)
    return jax.linear_transpose(lambda x: _convolve(x, kernel, stride, padding), x)(d_y)[0]


def _kernel_gradient(x: Array, d_y: Array, shape: Sequence[int], stride: int = 1, padding: _Padding = _BORDER) -> Array:
    kernel = jax.ShapeDtypeStruct(shape, x.dtype)
    return jax.linear_transpose(lambda kernel: _convolve(x, kernel, stride, padding), kernel)(d_y)[0]


def _convolve_minimal(x: Array, kernel: Array) -> Array:
    u_CK = _transform(_G, [[kernel[i, j] for j in range(3)] for i in range(3)])
    return _pictures(_products(_tiles(x), u_CK, (1, 0)), *x.shape[1:3])


def _picture_gradient_minimal(kernel: Array, d_y: Array) -> Array:
    """The convolution of d_y with the kernel turned by half a circle, without a copy with its channels swapped."""
    u_CK = _transform(_G, [[kernel[2 - i, 2 - j] for j in range(3)] for i in range(3)])
    return _pictures(_products(_tiles(d_y), u_CK, (1, 1)), *d_y.shape[1:3])


def _kernel_gradient_minimal(x: Array, d_y: Array) -> Array:
    d_m_TK = _transform(_A, _positions(_pad(d_y, 0), 2, ends=0))
    d_u_CK = _products(_tiles(x), d_m_TK, (0, 0))
    return jnp.stack([jnp.stack(row) for row in _transform(_G.T, d_u_CK)])


def _products(a: _Grid, b: _Grid, axes: tuple[int, int]) -> _Grid:
    """Sum over an axis of each element of one grid of matrices and an axis of its counterpart in the other."""
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    return [[lax.dot_general(*pair, dimensions) for pair in zip(*rows, strict=True)] for rows in zip(a, b, strict=True)]


def _pictures(m_TK: _Grid, H: int, W: int) -> Array:
    """Two by two pixels of every tile, A^T m A, put together to [B, H, W, K]."""
    top, bottom = _transform(_A.T, m_TK)
    # The barrier keeps sums, and what follows the convolution, out of the loop that interleaves, which has branches.
    y = jnp.stack(lax.optimization_barrier((*top, *bottom)), 1)
    h, w, K = -(-H // 2), -(-W // 2), y.shape[-1]
    return y.reshape(-1, h, w, 2, 2, K).swapaxes(2, 3).reshape(-1, 2 * h, 2 * w, K)[:, :H, :W]


def _tiles(x_BHWC: Array) -> _Grid:
    """B^T d B of every tile d of four by four pixels: four by four arrays [tiles, C]."""
    return _transform(_B.T, _positions(_pad(x_BHWC, 1), 4, ends=1))


def _pad(x_BHWC: Array, border: int) -> Array:
    """Add a border of zeros, and a row and a column more where height and width are odd."""
    H, W = x_BHWC.shape[1:3]
    return jnp.pad(x_BHWC, ((0, 0), (border, border + H % 2), (border, border + W % 2), (0, 0)))


def _positions(x_BHWC: Array, size: int, ends: int) -> _Grid:
    """The pixels at each position of the tiles, `size` x `size` arrays [tiles, C]; tiles begin at every other pixel.

    The last `ends` pairs of rows and columns begin no tile.
    """
    B, H, W, C = x_BHWC.shape
    x = x_BHWC.reshape(B, H // 2, 2, W // 2, 2, C)
    h, w = H // 2 - ends, W // 2 - ends

    def at(i: int, j: int) -> Array:
        return x[:, i // 2 : i // 2 + h, i % 2, j // 2 : j // 2 + w, j % 2].reshape(B * h * w, C)

    return [[at(i, j) for j in range(size)] for i in range(size)]


def _transform(matrix: np.ndarray, grid: _Grid) -> _Grid:
    """The matrix times the grid times the matrix' transpose; each element of the grid is an array."""
    columns = [_sums(matrix, column) for column in zip(*grid, strict=True)]
    return [_sums(matrix, row) for row in zip(*columns, strict=True)]


def _sums(matrix: np.ndarray, arrays: Sequence[Array]) -> list[Array]:
    """The matrix times a vector of arrays, written out, since half of its elements are zeros."""
    return [sum(factor * a for factor, a in zip(row.tolist(), arrays, strict=True) if factor) for row in matrix]
