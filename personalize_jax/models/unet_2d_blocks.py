"""The blocks of the U-Nets of Stable Diffusion and DeepFloyd IF.

Two families share one skeleton. In the first (Rombach et al. 2022) pictures are resampled by convolutions, and a
transformer attends first to the pixels and then to the text. In the second, called "simple" in configurations
(Saharia et al. 2022), resnets resample, and one attention sees text and pixels in one softmax. Parameter paths are
those of diffusers' `UNet2DConditionModel`.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from personalize_jax.models.activation import gelu
from personalize_jax.models.attention import SAVED, Implementation, attend
from personalize_jax.models.convolution import Conv
from personalize_jax.models.normalization import GroupNorm

Part = Callable[..., nn.Module]  # a module that still lacks its name
CrossAttentionNorm = Literal["layer_norm", "group_norm"] | None

ACTIVATIONS = {"silu": nn.silu, "swish": nn.silu, "gelu": gelu}


class BlockType(NamedTuple):
    """The kind of a block in a configuration.

    Attributes:
        attention: whether an attention follows each resnet.
        simple: whether it is of the second family.
    """

    attention: bool
    simple: bool


DOWN_BLOCKS = {
    "DownBlock2D": BlockType(attention=False, simple=False),
    "CrossAttnDownBlock2D": BlockType(attention=True, simple=False),
    "ResnetDownsampleBlock2D": BlockType(attention=False, simple=True),
    "SimpleCrossAttnDownBlock2D": BlockType(attention=True, simple=True),
}
MID_BLOCKS = {
    "UNetMidBlock2DCrossAttn": BlockType(attention=True, simple=False),
    "UNetMidBlock2DSimpleCrossAttn": BlockType(attention=True, simple=True),
}
UP_BLOCKS = {
    "UpBlock2D": BlockType(attention=False, simple=False),
    "CrossAttnUpBlock2D": BlockType(attention=True, simple=False),
    "ResnetUpsampleBlock2D": BlockType(attention=False, simple=True),
    "SimpleCrossAttnUpBlock2D": BlockType(attention=True, simple=True),
}


def _halve(x_BHWC: Array) -> Array:
    return einops.reduce(x_BHWC, "b (h p) (w q) c -> b h w c", "mean", p=2, q=2)


def _double(x_BHWC: Array) -> Array:
    return einops.repeat(x_BHWC, "b h w c -> b (h p) (w q) c", p=2, q=2)


_RESAMPLE = {"down": _halve, "up": _double}


def layer_norm(dtype: DTypeLike, name: str) -> nn.LayerNorm:
    """Layer norm over channels; statistics in float32."""
    return nn.LayerNorm(epsilon=1e-5, dtype=dtype, use_fast_variance=False, name=name)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions with the time's embedding between them, on top of the input.

    Attributes:
        channels: channels of the output.
        groups: groups of the group norms.
        epsilon: epsilon of the group norms.
        activation: key of `ACTIVATIONS`.
        scale_shift: whether the time scales and shifts; else it is added before the second norm.
        skip_time_act: whether the time's embedding has been activated already.
        scale_factor: divisor of the output.
        resample: "down" halves height and width by averaging, "up" doubles them by repetition.
        dtype: dtype of the computation.
    """

    channels: int
    groups: int
    epsilon: float
    activation: str
    scale_shift: bool
    skip_time_act: bool
    scale_factor: float
    resample: Literal["down", "up"] | None = None
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: Array, time_BD: Array) -> Array:
        """Return [B, H', W', channels]."""
        act = ACTIVATIONS[self.activation]
        h = act(GroupNorm(self.groups, self.epsilon, self.dtype, name="norm1")(x_BHWC))
        if self.resample is not None:
            h, x_BHWC = _RESAMPLE[self.resample](h), _RESAMPLE[self.resample](x_BHWC)
        h = Conv(self.channels, dtype=self.dtype, name="conv1")(h)
        width = 2 * self.channels if self.scale_shift else self.channels
        time_BD = time_BD if self.skip_time_act else act(time_BD)
        time = nn.Dense(width, dtype=self.dtype, name="time_emb_proj")(time_BD)[:, None, None, :]
        norm2 = GroupNorm(self.groups, self.epsilon, self.dtype, name="norm2")
        if self.scale_shift:
            scale, shift = jnp.split(time, 2, axis=-1)
            h = norm2(h) * (1 + scale) + shift
        else:
            h = norm2(h + time)
        h = Conv(self.channels, dtype=self.dtype, name="conv2")(act(h))
        if x_BHWC.shape[-1] != self.channels:
            x_BHWC = Conv(self.channels, size=1, dtype=self.dtype, name="conv_shortcut")(x_BHWC)
        return (x_BHWC + h) / self.scale_factor


class Downsample(nn.Module):
    """A convolution that halves height and width."""

    channels: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BHWC: Array, time_BD: Array) -> Array:
        """Return [B, H / 2, W / 2, channels]; the time has no effect."""
        return Conv(self.channels, stride=2, dtype=self.dtype, name="conv")(x_BHWC)


class Upsample(nn.Module):
    """Repetition of pixels, then a convolution."""

    channels: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BHWC: Array, time_BD: Array) -> Array:
        """Return [B, 2 H, 2 W, channels]; the time has no effect."""
        return Conv(self.channels, dtype=self.dtype, name="conv")(_double(x_BHWC))


def _heads(x_BLC: Array, head_dim: int) -> Array:
    return einops.rearrange(x_BLC, "b l (n d) -> b l n d", d=head_dim)


def _merge(x_BLND: Array) -> Array:
    return einops.rearrange(x_BLND, "b l n d -> b l (n d)")


class SimpleCrossAttention(nn.Module):
    """Pixels attend to the text and, in the same softmax, to themselves, on top of the input (Saharia et al. 2022).

    Attributes:
        head_dim: channels of a head.
        groups: groups of the pixels' group norm.
        cross_attention_norm: norm of the text.
        only_cross_attention: whether pixels attend to the text alone.
        dtype: dtype of the computation.
        implementation: implementation of attention, see `attention.attend`.
    """

    head_dim: int
    groups: int
    cross_attention_norm: CrossAttentionNorm
    only_cross_attention: bool
    dtype: DTypeLike
    implementation: Implementation

    @nn.compact
    def __call__(self, x_BHWC: Array, text_BLD: Array) -> Array:
        """Return [B, H, W, C]."""
        C = x_BHWC.shape[-1]

        def project(x_BLC: Array, name: str) -> Array:
            return _heads(nn.Dense(C, dtype=self.dtype, name=name)(x_BLC), self.head_dim)

        if self.cross_attention_norm == "group_norm":
            # Over all positions, padding included.
            text_BLD = GroupNorm(32, 1e-5, self.dtype, name="norm_cross")(text_BLD)
        elif self.cross_attention_norm == "layer_norm":
            text_BLD = layer_norm(self.dtype, "norm_cross")(text_BLD)
        h = einops.rearrange(x_BHWC, "b h w c -> b (h w) c")
        h = GroupNorm(self.groups, 1e-5, self.dtype, name="group_norm")(h)
        q, k, v = project(h, "to_q"), project(text_BLD, "add_k_proj"), project(text_BLD, "add_v_proj")
        if not self.only_cross_attention:
            k = jnp.concatenate([k, project(h, "to_k")], axis=1)
            v = jnp.concatenate([v, project(h, "to_v")], axis=1)
        h = _merge(attend(q, k, v, self.implementation))
        return x_BHWC + nn.Dense(C, dtype=self.dtype, name="to_out_0")(h).reshape(x_BHWC.shape)


class Attention(nn.Module):
    """Multi-head attention of one sequence to another; the query's width is the output's.

    Attributes:
        heads: number of heads; they divide the width.
        dtype: dtype of the computation.
        implementation: implementation of attention, see `attention.attend`.
    """

    heads: int
    dtype: DTypeLike
    implementation: Implementation

    @nn.compact
    def __call__(self, x_BLC: Array, context_BSD: Array) -> Array:
        """Return [B, L, C]."""
        C = x_BLC.shape[-1]

        def project(x_BLC: Array, name: str) -> Array:
            return _heads(nn.Dense(C, use_bias=False, dtype=self.dtype, name=name)(x_BLC), C // self.heads)

        q, k, v = project(x_BLC, "to_q"), project(context_BSD, "to_k"), project(context_BSD, "to_v")
        return nn.Dense(C, dtype=self.dtype, name="to_out_0")(_merge(attend(q, k, v, self.implementation)))


class GatedGelu(nn.Module):
    """A linear layer times the GELU of another (Shazeer 2020, GEGLU)."""

    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BLC: Array) -> Array:
        """Return [B, L, features]."""
        h, gate = jnp.split(nn.Dense(2 * self.features, dtype=self.dtype, name="proj")(x_BLC), 2, axis=-1)
        return h * gelu(gate)


class FeedForward(nn.Module):
    """An MLP with four times the width inside."""

    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BLC: Array) -> Array:
        """Return [B, L, C]."""
        C = x_BLC.shape[-1]
        h = GatedGelu(4 * C, self.dtype, name="net_0")(x_BLC)
        return nn.Dense(C, dtype=self.dtype, name="net_2")(h)


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text and an MLP, each on top of its input.

    Attributes:
        attention: `Attention` without its name.
        only_cross_attention: whether the first attention is to the text as well.
        dtype: dtype of the computation.
    """

    attention: Part
    only_cross_attention: bool
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BLC: Array, text_BSD: Array) -> Array:
        """Return [B, L, C]."""
        h = layer_norm(self.dtype, "norm1")(x_BLC)
        x_BLC += self.attention(name="attn1")(h, text_BSD if self.only_cross_attention else h)
        x_BLC += self.attention(name="attn2")(layer_norm(self.dtype, "norm2")(x_BLC), text_BSD)
        return x_BLC + FeedForward(self.dtype, name="ff")(layer_norm(self.dtype, "norm3")(x_BLC))


class Transformer(nn.Module):
    """Transformer blocks over the pixels, between two projections, on top of the input (Rombach et al. 2022).

    Attributes:
        heads: attention heads; they divide the channels.
        depth: number of transformer blocks.
        groups: groups of the group norm.
        linear_projection: whether the projections are linear layers; else 1x1 convolutions, which do the same.
        only_cross_attention: whether the first attention is to the text as well.
        dtype: dtype of the computation.
        implementation: implementation of attention, see `attention.attend`.
    """

    heads: int
    depth: int
    groups: int
    linear_projection: bool
    only_cross_attention: bool
    dtype: DTypeLike
    implementation: Implementation

    @nn.compact
    def __call__(self, x_BHWC: Array, text_BLD: Array) -> Array:
        """Return [B, H, W, C]."""
        projection: Part = nn.Dense if self.linear_projection else partial(Conv, size=1)
        project = partial(projection, x_BHWC.shape[-1], dtype=self.dtype)
        attention = partial(Attention, self.heads, self.dtype, self.implementation)
        h = project(name="proj_in")(GroupNorm(self.groups, 1e-6, self.dtype, name="norm")(x_BHWC))
        h = einops.rearrange(h, "b h w c -> b (h w) c")
        for i in range(self.depth):
            block = TransformerBlock(attention, self.only_cross_attention, self.dtype, name=f"transformer_blocks_{i}")
            h = block(h, text_BLD)
        return x_BHWC + project(name="proj_out")(h.reshape(x_BHWC.shape))


class Block(nn.Module):
    """The parts that the blocks of a level share, each without its name.

    Attributes:
        resnet: `ResnetBlock`.
        attention: the module that follows a resnet, if any.
        last: the module at the block's end, which does not see the text, if any.
        remat: whether the backward pass computes a resnet with its attention again instead of storing intermediate
            results.
    """

    resnet: Part
    attention: Part | None
    last: Part | None
    remat: bool

    def layer(self, i: int, inputs: tuple[Array, ...], time_BD: Array, text_BLD: Array) -> Array:
        """Apply the i-th resnet to the inputs, joined on channels, and its attention."""

        def apply(block: Block, inputs: tuple[Array, ...], time_BD: Array, text_BLD: Array) -> Array:
            x = block.resnet(name=f"resnets_{i}")(jnp.concatenate(inputs, axis=-1), time_BD)
            return x if block.attention is None else block.attention(name=f"attentions_{i}")(x, text_BLD)

        return self.computed_again(apply)(self, inputs, time_BD, text_BLD)

    def finish(self, name: str, x_BHWC: Array, time_BD: Array) -> Array:
        """Apply the module at the block's end."""

        def apply(block: Block, x_BHWC: Array, time_BD: Array) -> Array:
            assert block.last is not None
            return block.last(name=name)(x_BHWC, time_BD)

        return self.computed_again(apply)(self, x_BHWC, time_BD)

    def computed_again(self, apply: Callable[..., Array]) -> Callable[..., Array]:
        """The function as the backward pass computes it again, except for what attention's kernel saves, if `remat`."""
        saved = jax.checkpoint_policies.save_only_these_names(SAVED)
        return nn.remat(apply, policy=saved) if self.remat else apply


class DownBlock(Block):
    """A level on the way down."""

    layers: int

    @nn.compact
    def __call__(self, x_BHWC: Array, time_BD: Array, text_BLD: Array) -> list[Array]:
        """Return the skips for the way up, the last of which is the output."""
        outputs = []
        for i in range(self.layers):
            x_BHWC = self.layer(i, (x_BHWC,), time_BD, text_BLD)
            outputs.append(x_BHWC)
        return outputs if self.last is None else [*outputs, self.finish("downsamplers_0", x_BHWC, time_BD)]


class MidBlock(Block):
    """A resnet, an attention and a resnet at the coarsest level."""

    @nn.compact
    def __call__(self, x_BHWC: Array, time_BD: Array, text_BLD: Array) -> Array:
        """Return [B, H, W, C]."""
        x_BHWC = self.layer(0, (x_BHWC,), time_BD, text_BLD)
        return self.finish("resnets_1", x_BHWC, time_BD)


class UpBlock(Block):
    """A level on the way up."""

    @nn.compact
    def __call__(self, x_BHWC: Array, skips: list[Array], time_BD: Array, text_BLD: Array) -> Array:
        """Return [B, 2 H, 2 W, C], or [B, H, W, C] at the finest level; the resnets take the skips from the last on."""
        for i, skip_BHWC in enumerate(reversed(skips)):
            x_BHWC = self.layer(i, (x_BHWC, skip_BHWC), time_BD, text_BLD)
        return x_BHWC if self.last is None else self.finish("upsamplers_0", x_BHWC, time_BD)
