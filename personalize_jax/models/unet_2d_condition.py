"""The U-Net of Stable Diffusion 1.x and 2.x and of both stages of DeepFloyd IF, as public checkpoints configure it.

Parameter paths are those of diffusers' `UNet2DConditionModel`: its `down_blocks.0.resnets.1.conv1.weight` is
`down_blocks_0/resnets_1/conv1/kernel` here.
"""

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, Self

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from personalize_jax.models.attention import Implementation, attend
from personalize_jax.models.convolution import Conv
from personalize_jax.models.normalization import GroupNorm
from personalize_jax.models.published_config import check_choices, check_groups, check_kinds, known_keys
from personalize_jax.models.unet_2d_blocks import (
    ACTIVATIONS,
    DOWN_BLOCKS,
    MID_BLOCKS,
    UP_BLOCKS,
    BlockType,
    CrossAttentionNorm,
    DownBlock,
    Downsample,
    MidBlock,
    Part,
    ResnetBlock,
    SimpleCrossAttention,
    Transformer,
    UpBlock,
    Upsample,
    layer_norm,
)
from personalize_jax.runtime.errors import UserError

_NOT_CONFIGURED = ("dtype", "remat", "attention", "parent", "name")  # the last two are every module's
_SUPPORTED = {
    "down_block_types": tuple(DOWN_BLOCKS),
    "mid_block_type": tuple(MID_BLOCKS),
    "up_block_types": tuple(UP_BLOCKS),
    "act_fn": tuple(ACTIVATIONS),
    "time_embedding_act_fn": (None, *ACTIVATIONS),
    "timestep_post_act": (None, *ACTIVATIONS),
    "class_embed_type": (None, "timestep"),
    "addition_embed_type": (None, "text"),
    "encoder_hid_dim_type": (None, "text_proj"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "cross_attention_norm": (None, "layer_norm", "group_norm"),
    "time_embedding_type": ("positional",),
    "attention_type": ("default",),
    "center_input_sample": (False,),
    "downsample_padding": (1,),
    "dropout": (0.0,),
    "dual_cross_attention": (False,),
    "num_attention_heads": (None,),
    "num_class_embeds": (None,),
    "class_embeddings_concat": (False,),
    "time_cond_proj_dim": (None,),
    "reverse_transformer_layers_per_block": (None,),
    "conv_in_kernel": (1, 3, 5, 7),
    "conv_out_kernel": (1, 3, 5, 7),
}
# The softmax is in float32 whatever `upcast_attention` says; the last two belong to embeddings that are not supported.
_IGNORED = ("sample_size", "upcast_attention", "addition_time_embed_dim", "projection_class_embeddings_input_dim")


def timestep_embedding(n_B: Array, dim: int, flip_sin_to_cos: bool, freq_shift: float) -> Array:
    """Embed indices of times, 0 to 999, as [B, dim] sines and cosines (Ho et al. 2020).

    Args:
        n_B: indices.
        dim: even.
        flip_sin_to_cos: whether cosines come first.
        freq_shift: 0 keeps the lowest frequency above 1 / 10000, 1 makes it that.
    """
    exponents = jnp.arange(dim // 2, dtype=jnp.float32) / (dim // 2 - freq_shift)
    frequencies = jnp.exp(-jnp.log(10_000.0) * exponents)
    angles = n_B[:, None].astype(jnp.float32) * frequencies
    parts = [jnp.cos(angles), jnp.sin(angles)] if flip_sin_to_cos else [jnp.sin(angles), jnp.cos(angles)]
    return jnp.concatenate(parts, axis=-1)


class TimestepEmbedding(nn.Module):
    """An MLP on sines and cosines."""

    width: int
    activation: str
    last_activation: str | None
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BD: Array) -> Array:
        """Return [B, width]."""
        h = ACTIVATIONS[self.activation](nn.Dense(self.width, dtype=self.dtype, name="linear_1")(x_BD))
        h = nn.Dense(self.width, dtype=self.dtype, name="linear_2")(h)
        return h if self.last_activation is None else ACTIVATIONS[self.last_activation](h)


class AttentionPooling(nn.Module):
    """The mean of a text, shifted by a learnt vector, attends to the text and to itself."""

    heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, text_BLD: Array) -> Array:
        """Return [B, D]."""
        B, _, D = text_BLD.shape
        shift = self.param("positional_embedding", nn.initializers.normal(D**-0.5), (1, D)).astype(text_BLD.dtype)
        query = text_BLD.mean(axis=1, keepdims=True) + shift
        context = jnp.concatenate([query, text_BLD], axis=1)

        def project(x: Array, name: str) -> Array:
            return nn.Dense(D, dtype=self.dtype, name=name)(x).reshape(B, x.shape[1], self.heads, -1)

        # One query a text: a kernel that saves memory would save nothing.
        return attend(project(query, "q_proj"), project(context, "k_proj"), project(context, "v_proj")).reshape(B, D)


class TextTimeEmbedding(nn.Module):
    """A text pooled into one vector to be added to the time's embedding (Saharia et al. 2022, appendix F)."""

    width: int
    heads: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, text_BLD: Array) -> Array:
        """Return [B, width]."""
        h = AttentionPooling(self.heads, self.dtype, name="pool")(layer_norm(self.dtype, "norm1")(text_BLD))
        return layer_norm(self.dtype, "norm2")(nn.Dense(self.width, dtype=self.dtype, name="proj")(h))


class UNet2DCondition(nn.Module):
    """A U-Net that sees a noisy picture, a time and a text, and for super-resolution a low-resolution picture as well.

    Attributes and their defaults are those of diffusers' `UNet2DConditionModel`. What may differ between levels is one
    value for all or a tuple, finest level first.

    Attributes:
        in_channels: channels of the noisy picture and, for super-resolution, the low-resolution picture behind it.
        out_channels: channels of the output; with learned variances twice the noisy picture's.
        flip_sin_to_cos: whether the time's cosines come before its sines.
        freq_shift: see `timestep_embedding`.
        down_block_types: keys of `DOWN_BLOCKS`, finest level first.
        mid_block_type: key of `MID_BLOCKS`.
        up_block_types: keys of `UP_BLOCKS`, coarsest level first.
        only_cross_attention: whether pixels attend to the text alone.
        block_out_channels: channels of each level.
        layers_per_block: resnets of a level on the way down; there is one more on the way up.
        mid_block_scale_factor: divides the output of the mid block's resnets.
        act_fn: activation of resnets and time embeddings.
        norm_num_groups: groups of the group norms.
        norm_eps: epsilon of the resnets' group norms.
        cross_attention_dim: width of the text that the blocks see.
        transformer_layers_per_block: depth of a transformer.
        encoder_hid_dim: width of the text given, if it is to be projected.
        attention_head_dim: in "simple" blocks the channels of an attention head, in others, for the key was misnamed,
            the number of heads.
        use_linear_projection: whether transformers start and end with linear layers instead of 1x1 convolutions.
        class_embed_type: "timestep" if the noise level of the low-resolution picture is given.
        addition_embed_type: "text" if the pooled text is added to the time's embedding.
        resnet_time_scale_shift: "scale_shift" or "default", see `ResnetBlock.scale_shift`.
        resnet_skip_time_act: whether "simple" blocks leave the time's embedding as it is.
        resnet_out_scale_factor: divides the output of the resnets of "simple" blocks.
        time_embedding_dim: width of the time's embedding; None for four times the finest level's.
        time_embedding_act_fn: applied to the sum of all that is added to the time's embedding.
        timestep_post_act: applied to the time's embedding before anything is added.
        conv_in_kernel: side of the first convolution's kernel.
        conv_out_kernel: side of the last convolution's kernel.
        mid_block_only_cross_attention: `only_cross_attention` of a "simple" mid block; None for that of all levels.
        cross_attention_norm: norm of the text, in "simple" blocks.
        addition_embed_type_num_heads: heads that pool the text.
        dtype: dtype of the computation; parameters are float32.
        remat: whether the backward pass computes a resnet with its attention again instead of storing intermediate
            results.
        attention: implementation of attention, see `attention.attend`.
    """

    in_channels: int = 4
    out_channels: int = 4
    flip_sin_to_cos: bool = True
    freq_shift: float = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    mid_block_scale_factor: float = 1
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int | tuple[int, ...] = 1
    encoder_hid_dim: int | None = None
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    class_embed_type: str | None = None
    addition_embed_type: str | None = None
    resnet_time_scale_shift: str = "default"
    resnet_skip_time_act: bool = False
    resnet_out_scale_factor: float = 1.0
    time_embedding_dim: int | None = None
    time_embedding_act_fn: str | None = None
    timestep_post_act: str | None = None
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3
    mid_block_only_cross_attention: bool | None = None
    cross_attention_norm: CrossAttentionNorm = None
    addition_embed_type_num_heads: int = 64
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    attention: Implementation = "xla"

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **compute: Any) -> Self:
        """Build the network that a checkpoint's `config.json` describes.

        Args:
            config: its content, as diffusers writes it for a `UNet2DConditionModel`; keys left out have its
                defaults.
            **compute: `dtype`, `remat`, `attention`.

        Raises:
            UserError: a value that is not supported.
        """
        keys = cls.__dataclass_fields__.keys() - _NOT_CONFIGURED
        given = known_keys(config, keys | _SUPPORTED.keys() | set(_IGNORED), "U-Net")
        width = given.get("cross_attention_dim")
        if isinstance(width, tuple) and width == width[:1] * len(width) != ():
            given["cross_attention_dim"] = width[0]
        check_kinds(given, {key: cls.__annotations__[key] for key in keys}, "U-Net")
        check_choices(given, _SUPPORTED, "U-Net")
        _check_config(given, keys)
        network = cls(**{key: value for key, value in given.items() if key in keys}, **compute)
        check_groups(network.norm_num_groups, network.block_out_channels, "U-Net")
        return network

    @property
    def text_width(self) -> int:
        """Width of the text to be given."""
        return self.encoder_hid_dim or self.cross_attention_dim

    @nn.compact
    def __call__(
        self,
        z_BHWC: Array,
        n_B: Array,
        text_BLD: Array,
        mask_BL: Array,
        low_res_BHWC: Array | None = None,
        level_B: Array | None = None,
    ) -> Array:
        """Predict from the noisy picture.

        Args:
            z_BHWC: noisy picture; height and width are multiples of 2 to the number of levels less one.
            n_B: index of the time, 0 to 999.
            text_BLD: text embeddings.
            mask_BL: ignored: the public networks were trained to attend to padding as well.
            low_res_BHWC: upsampled and noised low-resolution picture (super-resolution only).
            level_B: index of its noise level, 0 to 999 (super-resolution only).

        Returns:
            [B, H, W, out_channels] in float32.

        Raises:
            UserError: inputs that do not fit the network.
        """
        x = z_BHWC if low_res_BHWC is None else jnp.concatenate([z_BHWC, low_res_BHWC], axis=-1)
        self._check(x, level_B)
        time_BD = self._time(n_B, text_BLD, level_B)
        text = text_BLD.astype(self.dtype)
        if self.encoder_hid_dim is not None:
            text = nn.Dense(self.cross_attention_dim, dtype=self.dtype, name="encoder_hid_proj")(text)
        x = Conv(self.block_out_channels[0], size=self.conv_in_kernel, dtype=self.dtype, name="conv_in")(x)
        skips = [x]
        for level in range(len(self.block_out_channels)):
            skips += self._down_block(level)(skips[-1], time_BD, text)
        x = self._mid_block()(skips[-1], time_BD, text)
        for level in reversed(range(len(self.block_out_channels))):
            count = _at(self.layers_per_block, level) + 1
            x = self._up_block(level)(x, skips[-count:], time_BD, text)
            del skips[-count:]
        x = GroupNorm(self.norm_num_groups, self.norm_eps, self.dtype, name="conv_norm_out")(x)
        x = ACTIVATIONS[self.act_fn](x)
        x = Conv(self.out_channels, size=self.conv_out_kernel, dtype=self.dtype, name="conv_out")(x)
        return x.astype(jnp.float32)

    def _check(self, x_BHWC: Array, level_B: Array | None) -> None:
        multiple = 2 ** (len(self.block_out_channels) - 1)
        if x_BHWC.shape[-1] != self.in_channels:
            raise UserError(
                f"the U-Net was given {x_BHWC.shape[-1]} channels and takes {self.in_channels}, "
                "the noisy picture's and, for super-resolution, the low-resolution picture's."
            )
        if x_BHWC.shape[1] % multiple or x_BHWC.shape[2] % multiple:
            raise UserError(
                f"the U-Net was given {x_BHWC.shape[1]} x {x_BHWC.shape[2]} pixels; give multiples of {multiple}."
            )
        if self.class_embed_type is not None and level_B is None:
            raise UserError("the U-Net was given no noise level of the low-resolution picture; give level_B.")

    def _time(self, n_B: Array, text_BLD: Array, level_B: Array | None) -> Array:
        """Time, noise level and pooled text in one vector."""
        width = self.time_embedding_dim or 4 * self.block_out_channels[0]

        def embed(n_B: Array, last_activation: str | None, name: str) -> Array:
            waves = timestep_embedding(n_B, self.block_out_channels[0], self.flip_sin_to_cos, self.freq_shift)
            return TimestepEmbedding(width, self.act_fn, last_activation, self.dtype, name=name)(waves)

        time_BD = embed(n_B, self.timestep_post_act, "time_embedding")
        if self.class_embed_type == "timestep":
            assert level_B is not None  # as _check has seen
            time_BD += embed(level_B, None, "class_embedding")
        if self.addition_embed_type == "text":
            heads = self.addition_embed_type_num_heads
            time_BD += TextTimeEmbedding(width, heads, self.dtype, name="add_embedding")(text_BLD)
        return time_BD if self.time_embedding_act_fn is None else ACTIVATIONS[self.time_embedding_act_fn](time_BD)

    def _down_block(self, level: int) -> DownBlock:
        kind = DOWN_BLOCKS[self.down_block_types[level]]
        resnet = self._resnet(kind, level)
        heads, only_cross_attention = _at(self.attention_head_dim, level), _at(self.only_cross_attention, level)
        attention = self._attention(kind, level, heads, only_cross_attention)
        last = None
        if level < len(self.block_out_channels) - 1:
            convolution = partial(Downsample, self.block_out_channels[level], self.dtype)
            last = partial(resnet, resample="down") if kind.simple else convolution
        layers = _at(self.layers_per_block, level)
        return DownBlock(resnet, attention, last, self.remat, layers, name=f"down_blocks_{level}")

    def _mid_block(self) -> MidBlock:
        kind = MID_BLOCKS[self.mid_block_type]
        resnet = partial(self._resnet(kind, -1), scale_factor=self.mid_block_scale_factor)
        only_cross_attention = self.mid_block_only_cross_attention
        if only_cross_attention is None:
            only_cross_attention = self.only_cross_attention is True
        attention = self._attention(kind, -1, _at(self.attention_head_dim, -1), kind.simple and only_cross_attention)
        return MidBlock(resnet, attention, resnet, self.remat, name="mid_block")

    def _up_block(self, level: int) -> UpBlock:
        i = len(self.block_out_channels) - 1 - level
        kind = UP_BLOCKS[self.up_block_types[i]]
        resnet = self._resnet(kind, level)
        # Diffusers does not reverse the head dimensions of "simple" blocks as it does the numbers of heads.
        heads = _at(self.attention_head_dim, i if kind.simple else level)
        attention = self._attention(kind, level, heads, _at(self.only_cross_attention, level))
        last = None
        if level > 0:
            convolution = partial(Upsample, self.block_out_channels[level], self.dtype)
            last = partial(resnet, resample="up") if kind.simple else convolution
        return UpBlock(resnet, attention, last, self.remat, name=f"up_blocks_{i}")

    def _resnet(self, kind: BlockType, level: int) -> Part:
        return partial(
            ResnetBlock,
            channels=self.block_out_channels[level],
            groups=self.norm_num_groups,
            epsilon=self.norm_eps,
            activation=self.act_fn,
            scale_shift=self.resnet_time_scale_shift == "scale_shift",
            skip_time_act=kind.simple and self.resnet_skip_time_act,
            scale_factor=self.resnet_out_scale_factor if kind.simple else 1.0,
            dtype=self.dtype,
        )

    def _attention(self, kind: BlockType, level: int, heads: int, only_cross_attention: bool) -> Part | None:
        if not kind.attention:
            return None
        shared: dict[str, Any] = {
            "groups": self.norm_num_groups,
            "only_cross_attention": only_cross_attention,
            "dtype": self.dtype,
            "implementation": self.attention,
        }
        if kind.simple:
            norm = self.cross_attention_norm
            return partial(SimpleCrossAttention, head_dim=heads, cross_attention_norm=norm, **shared)
        depth, linear = _at(self.transformer_layers_per_block, level), self.use_linear_projection
        return partial(Transformer, heads=heads, depth=depth, linear_projection=linear, **shared)


def _at(value: Any, level: int) -> Any:
    return value[level] if isinstance(value, tuple) else value


def _check_config(config: Mapping[str, Any], keys: Collection[str]) -> None:
    if config.get("encoder_hid_dim_type") is not None and config.get("encoder_hid_dim") is None:
        raise UserError("encoder_hid_dim is missing from the U-Net's config.json, which has an encoder_hid_dim_type.")
    levels = len(config.get("block_out_channels", UNet2DCondition.block_out_channels))
    for key in keys:
        value = config.get(key, getattr(UNet2DCondition, key))
        if isinstance(value, tuple) and len(value) != levels:
            raise UserError(f"{key} is {value} in the U-Net's config.json; expected {levels} values, one a level.")
