"""An autoencoder whose latents are tokens: finite scalar quantisation (Mentzer et al. 2023).

Every position of the latents has a few numbers, each rounded to one of a few evenly spaced values in [-1, 1]. All
combinations of these values are the vocabulary: no codebook is learned, and none of its entries can fall out of use.
A picture's *codes* are these values; its *ids* number their combinations.
"""

import math
from collections.abc import Sequence

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from personalize_jax.models.convolution import Conv
from personalize_jax.models.probe import ResidualBlock


def quantize(z: Array, levels: Sequence[int]) -> Array:
    """Codes of real numbers; the gradient is that of the numbers themselves, bounded to [-1, 1].

    Args:
        z: [..., D] numbers.
        levels: number of values of each of the D dimensions, 2 or more.
    """
    steps = jnp.array(levels) - 1
    bounded = jnp.tanh(z)
    codes = 2 * jnp.round((bounded + 1) / 2 * steps) / steps - 1
    return bounded + jax.lax.stop_gradient(codes - bounded)


def ids_of(codes: Array, levels: Sequence[int]) -> Array:
    """Ids int32 [...] of codes [..., D]: the first dimension's value counts ones."""
    digits = jnp.round((codes + 1) / 2 * (jnp.array(levels) - 1)).astype(jnp.int32)
    return jnp.sum(digits * _bases(levels), axis=-1)


def codes_of(ids: Array, levels: Sequence[int]) -> Array:
    """Codes float32 [..., D] of ids [...]: the inverse of `ids_of`."""
    digits = ids[..., None] // _bases(levels) % np.array(levels)
    return 2 * digits / (jnp.array(levels) - 1) - 1


def values_of_tokens(levels: Sequence[int]) -> np.ndarray:
    """The values of each token's code, one-hot: float32 [V, sum of levels]."""
    digits_VD = np.arange(math.prod(levels))[:, None] // _bases(levels) % np.array(levels)
    return np.concatenate([np.eye(n, dtype=np.float32)[digits_VD[:, d]] for d, n in enumerate(levels)], axis=1)


def _bases(levels: Sequence[int]) -> np.ndarray:
    return np.cumprod([1, *levels[:-1]], dtype=np.int32)


def _norm(name: str) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=None, group_size=16, epsilon=1e-5, name=name)


class Encoder(nn.Module):
    """Pictures to numbers to quantise; see `PictureTokenizer` for the attributes."""

    channels: Sequence[int]
    patch: int
    blocks: int
    dimensions: int

    @nn.compact
    def __call__(self, x_BHWC: Array) -> Array:
        """Return [B, h, w, D]."""
        x = einops.rearrange(x_BHWC, "b (h p) (w q) c -> b h w (p q c)", p=self.patch, q=self.patch)
        x = Conv(self.channels[0], name="stem")(x)
        for level, channels in enumerate(self.channels):
            if level:
                x = Conv(channels, size=2, stride=2, padding=((0, 0), (0, 0)), name=f"downsample_{level}")(x)
            for i in range(self.blocks):
                x = ResidualBlock(name=f"block_{level}_{i}")(x)
        return nn.Dense(self.dimensions, name="head")(nn.silu(_norm("head_norm")(x)))


class Decoder(nn.Module):
    """Codes to pictures: the encoder's levels in reverse; see `PictureTokenizer` for the attributes."""

    channels: Sequence[int]
    patch: int
    blocks: int

    @nn.compact
    def __call__(self, codes_BHWD: Array) -> Array:
        """Return pictures [B, H, W, 3]."""
        x = Conv(self.channels[-1], name="stem")(codes_BHWD)
        for level in reversed(range(len(self.channels))):
            for i in range(self.blocks):
                x = ResidualBlock(name=f"block_{level}_{i}")(x)
            if level:
                x = nn.Dense(4 * self.channels[level - 1], name=f"upsample_{level}")(x)
                x = einops.rearrange(x, "b h w (p q c) -> b (h p) (w q) c", p=2, q=2)
        x = Conv(3 * self.patch**2, name="head")(nn.silu(_norm("head_norm")(x)))
        return einops.rearrange(x, "b h w (p q c) -> b (h p) (w q) c", p=self.patch, q=self.patch)


class PictureTokenizer(nn.Module):
    """The autoencoder.

    Attributes:
        channels: width of each level, finest first; each level has half the side of the one before it.
        patch: side of the patches of pixels that are the finest level's positions.
        blocks: residual blocks of each level, in the encoder and in the decoder.
        levels: number of values of each dimension of the codes.
    """

    channels: Sequence[int]
    patch: int
    blocks: int
    levels: Sequence[int]

    def setup(self) -> None:
        """Make encoder and decoder."""
        self.encoder = Encoder(self.channels, self.patch, self.blocks, len(self.levels))
        self.decoder = Decoder(self.channels, self.patch, self.blocks)

    def __call__(self, x_BHWC: Array) -> Array:
        """Pictures in [-1, 1] through the codes and back; of x's shape."""
        return self.decode(self.encode(x_BHWC))

    def encode(self, x_BHWC: Array) -> Array:
        """Codes [B, h, w, D] of pictures in [-1, 1]."""
        return quantize(self.encoder(x_BHWC), self.levels)

    def decode(self, codes_BHWD: Array) -> Array:
        """Pictures, about in [-1, 1], of codes."""
        return self.decoder(codes_BHWD)

    @property
    def factor(self) -> int:
        """Pixels along a side of a picture for one of its tokens."""
        return self.patch * 2 ** (len(self.channels) - 1)

    @property
    def vocab_size(self) -> int:
        """Number of tokens V."""
        return math.prod(self.levels)
