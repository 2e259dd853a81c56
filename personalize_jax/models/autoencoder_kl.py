"""The variational autoencoder of latent diffusion: pictures to latents, and back.

Rombach et al. 2022 (High-Resolution Image Synthesis with Latent Diffusion Models), section 3.1 and appendix G.
Parameter paths are those of diffusers' `AutoencoderKL`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from personalize_jax.models.attention import attend
from personalize_jax.models.convolution import Conv
from personalize_jax.models.normalization import GroupNorm
from personalize_jax.models.published_config import check_groups, check_kinds, known_keys
from personalize_jax.runtime.errors import UserError

LOGVAR_RANGE = (-30.0, 20.0)
_ONLY = {  # the one value that each key of the config may have; others describe another network
    "act_fn": "silu",
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}
_WITHOUT_EFFECT = ("sample_size", "force_upcast")
_NOT_OF_THE_CONFIG = {"dtype", "name", "parent"}


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """The options that all blocks of encoder and decoder share.

    Attributes:
        groups: groups of every group norm; they divide the channels.
        mid_attention: whether the middle block attends.
        dtype: dtype of the computation.
    """

    groups: int
    mid_attention: bool
    dtype: DTypeLike

    def norm(self, name: str) -> GroupNorm:
        """Return a group norm, computed in float32."""
        return GroupNorm(self.groups, 1e-6, name=name)

    def conv(self, features: int, name: str, **options: Any) -> Conv:
        """Return a convolution."""
        return Conv(features, dtype=self.dtype, name=name, **options)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each after norm and SiLU."""

    spec: BlockSpec
    channels: int

    @nn.compact
    def __call__(self, x_BHWC: Array) -> Array:
        """Return [B, H, W, channels]."""
        h = self.spec.conv(self.channels, "conv1")(nn.silu(self.spec.norm("norm1")(x_BHWC)))
        h = self.spec.conv(self.channels, "conv2")(nn.silu(self.spec.norm("norm2")(h)))
        if x_BHWC.shape[-1] != self.channels:
            x_BHWC = self.spec.conv(self.channels, "conv_shortcut", size=1)(x_BHWC)
        return x_BHWC + h


class PixelAttention(nn.Module):
    """Self-attention over the pixels, with one head."""

    spec: BlockSpec

    @nn.compact
    def __call__(self, x_BHWC: Array) -> Array:
        """Return [B, H, W, C]."""
        B, H, W, C = x_BHWC.shape
        h_BLC = self.spec.norm("group_norm")(x_BHWC).reshape(B, H * W, C)

        def head(name: str) -> Array:
            return nn.Dense(C, dtype=self.spec.dtype, name=name)(h_BLC)[:, :, None, :]

        # The head is as wide as the level, 512 in public autoencoders: more than fused kernels take.
        h_BLNC = attend(head("to_q"), head("to_k"), head("to_v"), "xla")
        h_BLC = nn.Dense(C, dtype=self.spec.dtype, name="to_out_0")(h_BLNC[:, :, 0])
        return x_BHWC + h_BLC.reshape(B, H, W, C)


class MidBlock(nn.Module):
    """Two residual blocks around attention."""

    spec: BlockSpec

    @nn.compact
    def __call__(self, x_BHWC: Array) -> Array:
        """Return [B, H, W, C]."""
        C = x_BHWC.shape[-1]
        x = ResidualBlock(self.spec, C, name="resnets_0")(x_BHWC)
        if self.spec.mid_attention:
            x = PixelAttention(self.spec, name="attentions_0")(x)
        return ResidualBlock(self.spec, C, name="resnets_1")(x)


class Downsample(nn.Module):
    """A convolution that halves height and width, padded at the bottom and on the right only."""

    spec: BlockSpec

    @nn.compact
    def __call__(self, x_BHWC: Array) -> Array:
        """Return [B, H / 2, W / 2, C]."""
        return self.spec.conv(x_BHWC.shape[-1], "conv", stride=2, padding=((0, 1), (0, 1)))(x_BHWC)


class Upsample(nn.Module):
    """Every pixel twice in both directions, then a convolution."""

    spec: BlockSpec

    @nn.compact
    def __call__(self, x_BHWC: Array) -> Array:
        """Return [B, 2 H, 2 W, C]."""
        x = jnp.repeat(jnp.repeat(x_BHWC, 2, axis=1), 2, axis=2)
        return self.spec.conv(x.shape[-1], "conv")(x)


class Level(nn.Module):
    """Residual blocks of one width, then perhaps a change of resolution, "down" or "up"."""

    spec: BlockSpec
    channels: int
    layers: int
    resample: str | None

    @nn.compact
    def __call__(self, x_BHWC: Array) -> Array:
        """Return [B, H', W', channels]."""
        x = x_BHWC
        for i in range(self.layers):
            x = ResidualBlock(self.spec, self.channels, name=f"resnets_{i}")(x)
        if self.resample == "down":
            x = Downsample(self.spec, name="downsamplers_0")(x)
        if self.resample == "up":
            x = Upsample(self.spec, name="upsamplers_0")(x)
        return x


class Encoder(nn.Module):
    """Pictures to mean and log variance of a normal distribution of latents."""

    spec: BlockSpec
    channels: tuple[int, ...]
    layers: int
    out_channels: int

    @nn.compact
    def __call__(self, x_BHWC: Array) -> Array:
        """Return [B, h, w, out_channels]."""
        x = self.spec.conv(self.channels[0], "conv_in")(x_BHWC)
        for i, channels in enumerate(self.channels):
            resample = "down" if i < len(self.channels) - 1 else None
            x = Level(self.spec, channels, self.layers, resample, name=f"down_blocks_{i}")(x)
        x = MidBlock(self.spec, name="mid_block")(x)
        return self.spec.conv(self.out_channels, "conv_out")(nn.silu(self.spec.norm("conv_norm_out")(x)))


class Decoder(nn.Module):
    """Latents to pictures."""

    spec: BlockSpec
    channels: tuple[int, ...]
    layers: int
    out_channels: int

    @nn.compact
    def __call__(self, z_BHWC: Array) -> Array:
        """Return [B, H, W, out_channels]."""
        x = self.spec.conv(self.channels[-1], "conv_in")(z_BHWC)
        x = MidBlock(self.spec, name="mid_block")(x)
        for i, channels in enumerate(reversed(self.channels)):
            resample = "up" if i < len(self.channels) - 1 else None
            x = Level(self.spec, channels, self.layers, resample, name=f"up_blocks_{i}")(x)
        return self.spec.conv(self.out_channels, "conv_out")(nn.silu(self.spec.norm("conv_norm_out")(x)))


class AutoencoderKL(nn.Module):
    """Encoder to a normal distribution of latents, and decoder; `apply(variables, x, method="encode")`.

    Pictures are in [-1, 1]. Latents here are as the autoencoder makes them: a U-Net sees them times `scaling_factor`.
    Attributes have the names and defaults of the config of diffusers.

    Attributes:
        block_out_channels: width of each level, finest first.
        layers_per_block: residual blocks of a level of the encoder; one of the decoder has one more.
        in_channels: channels of a picture to encode.
        out_channels: channels of a decoded picture.
        latent_channels: channels of a latent.
        norm_num_groups: groups of every group norm.
        scaling_factor: factor that gives latents about unit variance.
        use_quant_conv: whether a 1x1 convolution follows the encoder.
        use_post_quant_conv: whether a 1x1 convolution precedes the decoder.
        mid_block_add_attention: whether the middle blocks attend.
        dtype: dtype of the computation; parameters, norms and outputs are float32.
    """

    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    dtype: DTypeLike = jnp.float32

    @classmethod
    def from_config(cls, config: Mapping[str, Any], dtype: DTypeLike = jnp.float32) -> Self:
        """Build the network that a `config.json` of diffusers describes.

        Args:
            config: the content of the file; keys left out have diffusers' defaults.
            dtype: dtype of the computation.

        Raises:
            UserError: the config describes a network that is not supported.
        """
        keys = cls.__dataclass_fields__.keys() - _NOT_OF_THE_CONFIG
        blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
        config = known_keys(config, {*keys, *blocks, *_ONLY, *_WITHOUT_EFFECT}, "autoencoder")
        check_kinds(config, {key: cls.__annotations__[key] for key in keys}, "autoencoder")
        levels = len(config.get("block_out_channels", cls.block_out_channels))
        for key, only in (_ONLY | {key: levels * names for key, names in blocks.items()}).items():
            if (value := config.get(key, blocks.get(key, only))) != only:
                raise UserError(
                    f"The autoencoder has {key} = {value} where only {only} can be used: give another model."
                )
        network = cls(**{key: value for key, value in config.items() if key in keys}, dtype=dtype)
        check_groups(network.norm_num_groups, network.block_out_channels, "autoencoder")
        return network

    @property
    def factor(self) -> int:
        """Pixels along a side of a picture for one of its latents."""
        return 2 ** (len(self.block_out_channels) - 1)

    def setup(self) -> None:
        """Make the networks."""
        spec = BlockSpec(self.norm_num_groups, self.mid_block_add_attention, self.dtype)
        shared = (spec, self.block_out_channels)
        self.encoder = Encoder(*shared, self.layers_per_block, 2 * self.latent_channels)
        self.decoder = Decoder(*shared, self.layers_per_block + 1, self.out_channels)
        if self.use_quant_conv:
            self.quant_conv = Conv(2 * self.latent_channels, size=1, dtype=self.dtype)
        if self.use_post_quant_conv:
            self.post_quant_conv = Conv(self.latent_channels, size=1, dtype=self.dtype)

    def encode(self, x_BHWC: Array) -> tuple[Array, Array]:
        """Return mean and standard deviation of the latents of pictures, both [B, H / factor, W / factor, channels].

        Args:
            x_BHWC: pictures in [-1, 1]; height and width are multiples of `factor`.
        """
        moments = self.encoder(x_BHWC)
        if self.use_quant_conv:
            moments = self.quant_conv(moments)
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.exp(0.5 * jnp.clip(logvar, *LOGVAR_RANGE))

    def decode(self, z_BHWC: Array) -> Array:
        """Return the pictures [B, H * factor, W * factor, out_channels] of latents, about in [-1, 1].

        Args:
            z_BHWC: latents, not scaled.
        """
        if self.use_post_quant_conv:
            z_BHWC = self.post_quant_conv(z_BHWC)
        return self.decoder(z_BHWC).astype(jnp.float32)

    def __call__(self, x_BHWC: Array) -> Array:
        """Return the pictures that the means of their latents decode to; initialisation reaches all parameters."""
        return self.decode(self.encode(x_BHWC)[0])
