"""The text-conditional U-Net of the embedded cascade, for the base and for the super-resolution stage."""

from collections.abc import Sequence

import einops
import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from personalize_jax.models.convolution import Conv

_zeros = nn.initializers.zeros_init()


def sinusoidal_embedding(t_B: Array, dim: int) -> Array:
    """Embed times in [0, 1], scaled to the customary 0..1000, as [B, dim] sines and cosines."""
    frequencies = jnp.exp(-jnp.log(10_000.0) * jnp.arange(dim // 2) / (dim // 2))
    angles = 1000.0 * t_B[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def _norm(name: str) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=None, group_size=16, epsilon=1e-5, name=name)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions; the conditioning scales and shifts the activations between them.

    At first it leaves pixels as they are, unless their number of channels changes.
    """

    channels: int

    @nn.compact
    def __call__(self, x_BHWC: Array, condition_BD: Array) -> Array:
        """Return [B, H, W, channels]."""
        h = Conv(self.channels, name="conv_in")(nn.silu(_norm("norm_in")(x_BHWC)))
        scale, shift = jnp.split(nn.Dense(2 * self.channels, name="modulation")(condition_BD)[:, None, None, :], 2, -1)
        h = nn.silu(_norm("norm_out")(h) * (1 + scale) + shift)
        h = Conv(self.channels, kernel_init=_zeros, name="conv_out")(h)
        if x_BHWC.shape[-1] != self.channels:
            x_BHWC = nn.Dense(self.channels, name="shortcut")(x_BHWC)
        return x_BHWC + h


class TransformerBlock(nn.Module):
    """Self-attention over the pixels, cross-attention to the text, MLP; at first it leaves pixels as they are."""

    head_dim: int = 64

    @nn.compact
    def __call__(self, x_BHWC: Array, text_BLD: Array, mask_BL: Array) -> Array:
        """Return [B, H, W, C]."""
        _, H, W, C = x_BHWC.shape
        heads = C // self.head_dim
        x = einops.rearrange(x_BHWC, "b h w c -> b (h w) c")
        x += self.param("positions", _zeros, (H * W, C))
        h = nn.LayerNorm(name="self_norm")(x)
        x += nn.MultiHeadDotProductAttention(heads, out_kernel_init=_zeros, name="self_attention")(h)
        h = nn.LayerNorm(name="cross_norm")(x)
        x += nn.MultiHeadDotProductAttention(heads, qkv_features=C, out_kernel_init=_zeros, name="cross_attention")(
            h, text_BLD, mask=mask_BL[:, None, None, :]
        )
        h = nn.LayerNorm(name="mlp_norm")(x)
        h = nn.gelu(nn.Dense(4 * C, name="mlp_in")(h))
        x += nn.Dense(C, kernel_init=_zeros, name="mlp_out")(h)
        return einops.rearrange(x, "b (h w) c -> b h w c", h=H)


class UNet(nn.Module):
    """U-Net over patches of pixels.

    The picture is cut into `patch` x `patch` patches that become channels, so that no convolution runs at full
    resolution. A super-resolution stage also sees the upsampled low-resolution picture and its augmentation level
    (Imagen, appendix F).

    Attributes:
        channels: width of each level, finest first.
        patch: side of a patch.
        down_blocks: residual blocks of each level on the way down.
        up_blocks: the same on the way up.
        attention: whether each level has a transformer block.
        super_resolution: whether the network takes a low-resolution picture.
    """

    channels: Sequence[int]
    patch: int
    down_blocks: Sequence[int]
    up_blocks: Sequence[int]
    attention: Sequence[bool]
    super_resolution: bool = False

    @nn.compact
    def __call__(
        self,
        z_BHWC: Array,
        t_B: Array,
        text_BLD: Array,
        mask_BL: Array,
        low_res_BHWC: Array | None = None,
        level_B: Array | None = None,
    ) -> Array:
        """Predict from the noisy picture.

        Args:
            z_BHWC: noisy picture z_t.
            t_B: time in [0, 1].
            text_BLD: text embeddings.
            mask_BL: True at tokens.
            low_res_BHWC: upsampled and noised low-resolution picture (super-resolution only).
            level_B: its noise level, a time in [0, 1].

        Returns:
            The prediction, shaped as `z_BHWC`.
        """
        condition_BD = self._condition(t_B, text_BLD, mask_BL, level_B)
        x = z_BHWC if low_res_BHWC is None else jnp.concatenate([z_BHWC, low_res_BHWC], axis=-1)
        x = einops.rearrange(x, "b (h p) (w q) c -> b h w (p q c)", p=self.patch, q=self.patch)
        x = Conv(self.channels[0], name="stem")(x)
        skips = []
        for level, (channels, blocks) in enumerate(zip(self.channels, self.down_blocks, strict=True)):
            if level:
                x = Conv(channels, size=2, stride=2, padding=((0, 0), (0, 0)), name=f"downsample_{level}")(x)
            for i in range(blocks):
                x = ResidualBlock(channels, name=f"down_{level}_{i}")(x, condition_BD)
                skips.append(x)
            if self.attention[level]:
                x = TransformerBlock(name=f"down_{level}_transformer")(x, text_BLD, mask_BL)
        x = ResidualBlock(self.channels[-1], name="middle")(x, condition_BD)
        for level in reversed(range(len(self.channels))):
            for i in range(self.up_blocks[level]):
                if i < self.down_blocks[level]:
                    x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = ResidualBlock(self.channels[level], name=f"up_{level}_{i}")(x, condition_BD)
            if self.attention[level]:
                x = TransformerBlock(name=f"up_{level}_transformer")(x, text_BLD, mask_BL)
            if level:
                x = nn.Dense(4 * self.channels[level - 1], name=f"upsample_{level}")(x)
                x = einops.rearrange(x, "b h w (p q c) -> b (h p) (w q) c", p=2, q=2)
        x = nn.silu(_norm("head_norm")(x))
        # The network also weights the pictures that it is given, pixel by pixel, so that their noise, a part of what it
        # predicts, need not pass through the narrow levels.
        pictures = {"noisy": z_BHWC} if low_res_BHWC is None else {"noisy": z_BHWC, "low_res": low_res_BHWC}
        weighted = [self._to_pixels(x, f"{name}_weights") * picture for name, picture in pictures.items()]
        return sum(weighted, self._to_pixels(x, "head"))

    def _to_pixels(self, x: Array, name: str) -> Array:
        """Three values at every pixel, at first zero."""
        x = Conv(3 * self.patch**2, kernel_init=_zeros, name=name)(x)
        return einops.rearrange(x, "b h w (p q c) -> b (h p) (w q) c", p=self.patch, q=self.patch)

    def _condition(self, t_B: Array, text_BLD: Array, mask_BL: Array, level_B: Array | None) -> Array:
        """Time, pooled text and augmentation level in one vector (Imagen, appendix F)."""
        width = 4 * self.channels[0]
        condition = nn.Dense(width, name="time_in")(sinusoidal_embedding(t_B, width))
        weight = mask_BL / jnp.maximum(mask_BL.sum(-1, keepdims=True), 1)
        pooled_BD = jnp.einsum("bld,bl->bd", text_BLD, weight)
        condition += nn.Dense(width, name="pooled_text")(pooled_BD)
        if self.super_resolution:
            assert level_B is not None  # such a network is told the level
            condition += nn.Dense(width, name="augmentation_level")(sinusoidal_embedding(level_B, width))
        return nn.silu(nn.Dense(width, name="condition_out")(nn.silu(condition)))
