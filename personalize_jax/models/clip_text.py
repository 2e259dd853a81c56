"""The text transformer of CLIP, the text encoder of Stable Diffusion 1.x and 2.x.

Radford et al. 2021 (Learning Transferable Visual Models From Natural Language Supervision), section 2.4. Parameter
paths are the names in public checkpoints, those of transformers' `CLIPTextModel` before its version 5.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from personalize_jax.models.activation import gelu
from personalize_jax.models.attention import Implementation
from personalize_jax.models.published_config import check_kinds
from personalize_jax.runtime.errors import UserError

# Values of the keys that the config.json of a text tower leaves out: transformers' `CLIPTextConfig`.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_KINDS = {key: type(value) for key, value in DEFAULTS.items() if key != "eos_token_id"}  # may be a list
_ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": gelu,
}


@dataclasses.dataclass(frozen=True)
class Spec:
    """Sizes and options of the transformer's layers.

    Attributes:
        num_layers: number of layers.
        num_heads: attention heads; they divide the width.
        mlp_width: hidden units of the MLPs.
        activation: activation of the MLPs, "quick_gelu" or "gelu".
        epsilon: added to the variance by layer norms.
        dtype: dtype of the computation; parameters are float32.
        remat: whether the backward pass computes a layer again instead of storing its intermediate results.
        is_causal: whether a position attends only to itself and those before it, as in texts; in pictures to all.
    """

    num_layers: int
    num_heads: int
    mlp_width: int
    activation: str
    epsilon: float
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    is_causal: bool = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **others: Any) -> Self:
        """The layers that a checkpoint's `config.json` describes.

        Args:
            config: its content, as transformers writes it for a tower of CLIP, with its defaults.
            **others: the attributes that such a file does not have.

        Raises:
            UserError: a value of another kind, or an activation that is not supported.
        """
        check_kinds(config, _KINDS, "CLIP")
        if config["hidden_size"] % config["num_attention_heads"]:
            raise UserError(
                f"num_attention_heads is {config['num_attention_heads']} in a CLIP's config.json; give a number that "
                f"divides its hidden_size of {config['hidden_size']}."
            )
        activation = config["hidden_act"]
        if activation not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise UserError(f"hidden_act is {activation!r} in the config.json of a CLIP; supported are {known}.")
        return cls(
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            mlp_width=config["intermediate_size"],
            activation=activation,
            epsilon=config["layer_norm_eps"],
            **others,
        )

    def norm(self, name: str) -> nn.LayerNorm:
        """Return a layer norm."""
        return nn.LayerNorm(self.epsilon, dtype=self.dtype, use_fast_variance=False, name=name)


class SelfAttention(nn.Module):
    """Attention of every position to those that it may see."""

    spec: Spec

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        """Return [B, L, D]."""
        B, L, D = x_BLD.shape

        def heads(name: str) -> Array:
            return nn.Dense(D, dtype=self.spec.dtype, name=name)(x_BLD).reshape(B, L, self.spec.num_heads, -1)

        q, k, v = heads("q_proj"), heads("k_proj"), heads("v_proj")
        # Not `attend`: texts are short, and its kernels would gain nothing.
        out = jax.nn.dot_product_attention(q, k, v, is_causal=self.spec.is_causal, implementation="xla")
        return nn.Dense(D, dtype=self.spec.dtype, name="out_proj")(out.reshape(B, L, D))


class Mlp(nn.Module):
    """Two linear layers."""

    spec: Spec

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        """Return [B, L, D]."""
        h = nn.Dense(self.spec.mlp_width, dtype=self.spec.dtype, name="fc1")(x_BLD)
        h = _ACTIVATIONS[self.spec.activation](h)
        return nn.Dense(x_BLD.shape[-1], dtype=self.spec.dtype, name="fc2")(h)


class Layer(nn.Module):
    """Pre-norm attention and MLP."""

    spec: Spec

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        """Return [B, L, D]."""
        x_BLD += SelfAttention(self.spec, name="self_attn")(self.spec.norm("layer_norm1")(x_BLD))
        return x_BLD + Mlp(self.spec, name="mlp")(self.spec.norm("layer_norm2")(x_BLD))


class Layers(nn.Module):
    """The layers in turn."""

    spec: Spec

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        """Return [B, L, D]."""
        layer = nn.remat(Layer) if self.spec.remat else Layer
        for i in range(self.spec.num_layers):
            x_BLD = layer(self.spec, name=f"layers_{i}")(x_BLD)
        return x_BLD


class Embeddings(nn.Module):
    """A vector for the token plus a vector for its position."""

    vocab_size: int
    width: int
    max_length: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, tokens_BL: Array) -> Array:
        """Return [B, L, D]."""
        positions = nn.Embed(self.max_length, self.width, dtype=self.dtype, name="position_embedding")
        positions_LD = positions(jnp.arange(self.max_length))[: tokens_BL.shape[1]]
        return nn.Embed(self.vocab_size, self.width, dtype=self.dtype, name="token_embedding")(tokens_BL) + positions_LD


class TextModel(nn.Module):
    """Embeddings, layers and a last layer norm, under the name that they have in checkpoints."""

    vocab_size: int
    width: int
    max_length: int
    spec: Spec

    @nn.compact
    def __call__(self, tokens_BL: Array) -> Array:
        """Return [B, L, D]."""
        embeddings = Embeddings(self.vocab_size, self.width, self.max_length, self.spec.dtype, name="embeddings")
        x_BLD = Layers(self.spec, name="encoder")(embeddings(tokens_BL))
        return self.spec.norm("final_layer_norm")(x_BLD)


class ClipTextEncoder(nn.Module):
    """Token ids to the embedding of every position, as the networks of Stable Diffusion attend to them.

    Dropout is never applied: public checkpoints have none.

    Attributes:
        vocab_size: rows of the token embedding.
        width: width of the embeddings.
        max_length: tokens in a text, padding included, at most.
        spec: the layers.
    """

    vocab_size: int
    width: int
    max_length: int
    spec: Spec

    @classmethod
    def from_config(cls, config: Mapping[str, Any], attention: Implementation = "xla", **compute: Any) -> Self:
        """Build the encoder that a checkpoint's `config.json` describes.

        Args:
            config: its content, as transformers writes it for a `CLIPTextModel`; missing keys have its defaults.
            attention: an option of every network, without effect here: texts are short.
            **compute: `dtype`, `remat`.

        Raises:
            UserError: a value that is not supported.
        """
        config = DEFAULTS | dict(config)
        sizes = config["vocab_size"], config["hidden_size"], config["max_position_embeddings"]
        return cls(*sizes, Spec.from_config(config, **compute))

    @nn.compact
    def __call__(self, tokens_BL: Array) -> tuple[Array, Array]:
        """Encode texts.

        Args:
            tokens_BL: int token ids, at most `max_length` of them.

        Returns:
            text_BLD, and mask_BL which is True everywhere: the public U-Nets attend to padding as well.
        """
        text_BLD = TextModel(self.vocab_size, self.width, self.max_length, self.spec, name="text_model")(tokens_BL)
        return text_BLD, jnp.ones(tokens_BL.shape, bool)
