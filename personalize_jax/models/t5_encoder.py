"""The encoder of T5 v1.1, the text encoder of DeepFloyd IF.

Raffel et al. 2020 (Exploring the Limits of Transfer Learning), section 2.1; v1.1 gates its MLPs (Shazeer 2020, GLU
Variants Improve Transformer). Parameter paths are those of transformers' `T5EncoderModel` on disk.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike

from personalize_jax.models.attention import Implementation
from personalize_jax.models.published_config import check_kinds
from personalize_jax.runtime.errors import UserError

PAD_ID = 0  # in every vocabulary of T5
_FEED_FORWARDS = ("relu", "gated-gelu")
# Values of the keys that a config.json leaves out: transformers' `T5Config`.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
}


@dataclasses.dataclass(frozen=True)
class Spec:
    """Sizes and options of the transformer's blocks.

    Attributes:
        num_layers: number of blocks.
        num_heads: attention heads.
        head_dim: channels of a head; all heads together need not be as wide as the embeddings.
        mlp_width: hidden units of the MLPs.
        feed_forward: kind of the MLPs, "gated-gelu" (v1.1) or "relu".
        num_buckets: buckets of relative positions.
        max_distance: offsets from here on share the last bucket.
        epsilon: added to the mean square by norms.
        dtype: dtype of the computation; parameters are float32, and so is the bias of attention.
        remat: whether the backward pass computes a block again instead of storing its intermediate results.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    mlp_width: int
    feed_forward: str
    num_buckets: int
    max_distance: int
    epsilon: float
    dtype: DTypeLike = jnp.float32
    remat: bool = False

    def dense(self, features: int, name: str) -> nn.Dense:
        """Return a linear layer, which never has a bias here."""
        return nn.Dense(features, use_bias=False, dtype=self.dtype, name=name)

    def norm(self, name: str) -> nn.RMSNorm:
        """Return a root-mean-square norm (Zhang and Sennrich 2019)."""
        return nn.RMSNorm(self.epsilon, dtype=self.dtype, name=name)


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Number the offsets between positions: near ones one by one, far ones in logarithmically wider buckets.

    Args:
        length: L positions.
        num_buckets: half of them are for keys behind the query, half for keys ahead of it.
        max_distance: offsets from here on share the last bucket.

    Returns:
        int [L queries, L keys] in [0, num_buckets).
    """
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = num_buckets // 2
    exact = half // 2
    # float32 as in the public implementations: it decides on which side of a bucket's edge an offset falls.
    distance = np.maximum(np.abs(offset), 1).astype(np.float32)
    fraction = np.log(distance / np.float32(exact)) / np.float32(np.log(max_distance / exact))
    far = exact + (fraction * np.float32(half - exact)).astype(int)
    return np.where(offset > 0, half, 0) + np.where(abs(offset) < exact, abs(offset), np.minimum(far, half - 1))


class SelfAttention(nn.Module):
    """Attention in both directions, whose unscaled scores have a learned bias for each head and relative position."""

    spec: Spec

    @nn.compact
    def __call__(self, x_BLD: Array, mask_BL: Array, bias_1NLL: Array | None) -> tuple[Array, Array]:
        """Return [B, L, D] and the bias, which is None for the first layer: that one makes it for all."""
        B, L, D = x_BLD.shape
        s = self.spec
        if bias_1NLL is None:
            table = nn.Embed(s.num_buckets, s.num_heads, name="relative_attention_bias")
            bias_1NLL = table(relative_buckets(L, s.num_buckets, s.max_distance)).transpose(2, 0, 1)[None]

        def heads(name: str) -> Array:
            return s.dense(s.num_heads * s.head_dim, name)(x_BLD).reshape(B, L, s.num_heads, s.head_dim)

        # Not `attend`: the flash kernel takes a bias only in the size of the scores, which it is there to avoid.
        out = jax.nn.dot_product_attention(
            heads("q"), heads("k"), heads("v"), bias_1NLL, mask_BL[:, None, None, :], scale=1.0, implementation="xla"
        )
        return s.dense(D, "o")(out.reshape(B, L, -1)), bias_1NLL


class AttentionLayer(nn.Module):
    """Pre-norm residual attention."""

    spec: Spec

    @nn.compact
    def __call__(self, x_BLD: Array, mask_BL: Array, bias_1NLL: Array | None) -> tuple[Array, Array]:
        """Return [B, L, D] and the bias."""
        h = self.spec.norm("layer_norm")(x_BLD)
        h, bias_1NLL = SelfAttention(self.spec, name="SelfAttention")(h, mask_BL, bias_1NLL)
        return x_BLD + h, bias_1NLL


class FeedForward(nn.Module):
    """An MLP, gated in v1.1."""

    spec: Spec

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        """Return [B, L, D]."""
        width = self.spec.mlp_width
        if self.spec.feed_forward == "relu":
            h = jax.nn.relu(self.spec.dense(width, "wi")(x_BLD))
        else:
            h = jax.nn.gelu(self.spec.dense(width, "wi_0")(x_BLD), approximate=True)
            h *= self.spec.dense(width, "wi_1")(x_BLD)
        return self.spec.dense(x_BLD.shape[-1], "wo")(h)


class FeedForwardLayer(nn.Module):
    """Pre-norm residual MLP."""

    spec: Spec

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        """Return [B, L, D]."""
        return x_BLD + FeedForward(self.spec, name="DenseReluDense")(self.spec.norm("layer_norm")(x_BLD))


class Block(nn.Module):
    """Attention and MLP."""

    spec: Spec

    @nn.compact
    def __call__(self, x_BLD: Array, mask_BL: Array, bias_1NLL: Array | None) -> tuple[Array, Array]:
        """Return [B, L, D] and the bias."""
        x_BLD, bias_1NLL = AttentionLayer(self.spec, name="layer_0")(x_BLD, mask_BL, bias_1NLL)
        return FeedForwardLayer(self.spec, name="layer_1")(x_BLD), bias_1NLL


class Blocks(nn.Module):
    """The blocks in turn and a last norm."""

    spec: Spec

    @nn.compact
    def __call__(self, x_BLD: Array, mask_BL: Array) -> Array:
        """Return [B, L, D]."""
        block = nn.remat(Block) if self.spec.remat else Block
        bias_1NLL = None
        for i in range(self.spec.num_layers):
            x_BLD, bias_1NLL = block(self.spec, name=f"block_{i}")(x_BLD, mask_BL, bias_1NLL)
        return self.spec.norm("final_layer_norm")(x_BLD)


class T5Encoder(nn.Module):
    """Token ids to the embedding of every position, as the networks of IF attend to them.

    Dropout is never applied: the encoder stays frozen, as in Imagen and IF.

    Attributes:
        vocab_size: rows of the token embedding.
        width: width of the embeddings.
        spec: the blocks.
        max_length: tokens that texts are padded or cut to; the network itself, with relative positions, has no limit.
    """

    vocab_size: int
    width: int
    spec: Spec
    max_length: int = 77

    @classmethod
    def from_config(cls, config: Mapping[str, Any], attention: Implementation = "xla", **compute: Any) -> Self:
        """Build the encoder that a checkpoint's `config.json` describes, for texts of 77 tokens as in IF.

        Args:
            config: its content, as transformers writes it for a `T5EncoderModel`; missing keys have its defaults.
            attention: an option of every network, without effect here: the bias of attention leaves "xla" only.
            **compute: `dtype`, `remat`.

        Raises:
            UserError: a value that is not supported.
        """
        config = _DEFAULTS | dict(config)
        check_kinds(config, {key: type(value) for key, value in _DEFAULTS.items()}, "T5 encoder")
        feed_forward = config["feed_forward_proj"]
        if feed_forward not in _FEED_FORWARDS:
            raise UserError(
                f"feed_forward_proj is {feed_forward!r} in the text encoder's config.json; "
                f"supported are {', '.join(_FEED_FORWARDS)}."
            )
        spec = Spec(
            num_layers=config["num_layers"],
            num_heads=config["num_heads"],
            head_dim=config["d_kv"],
            mlp_width=config["d_ff"],
            feed_forward=feed_forward,
            num_buckets=config["relative_attention_num_buckets"],
            max_distance=config["relative_attention_max_distance"],
            epsilon=config["layer_norm_epsilon"],
            **compute,
        )
        return cls(config["vocab_size"], config["d_model"], spec)

    @nn.compact
    def __call__(self, tokens_BL: Array) -> tuple[Array, Array]:
        """Encode texts.

        Args:
            tokens_BL: int token ids; padding, `PAD_ID`, is attended to by no position.

        Returns:
            text_BLD, and mask_BL which is True everywhere: the public U-Nets attend to padding as well.
        """
        x_BLD = nn.Embed(self.vocab_size, self.width, dtype=self.spec.dtype, name="shared")(tokens_BL)
        text_BLD = Blocks(self.spec, name="encoder")(x_BLD, tokens_BL != PAD_ID)
        return text_BLD, jnp.ones(tokens_BL.shape, bool)
