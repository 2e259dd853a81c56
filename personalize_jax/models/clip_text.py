"""The text transformer of CLIP, the text encoder of Stable Diffusion 1.x and 2.x; `clip` has both of CLIP's towers.

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
from personalize_jax.models.attention import Implementation, attend
from personalize_jax.models.published_config import check_kinds
from personalize_jax.runtime.errors import UserError

# What stands for a key of a text tower that its config.json leaves out: transformers' `CLIPTextConfig`.
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
    """The transformer's sizes and ways of computing; attributes of `ClipTextEncoder` but for `is_causal`.

    Attributes:
        is_causal: whether a position sees only itself and what precedes it, as in texts; in pictures all see all.
    """

    num_layers: int
    num_heads: int
    mlp_width: int
    activation: str
    epsilon: float
    skip_layers: int = 0
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    is_causal: bool = True

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **others: Any) -> Self:
        """The layers that a checkpoint's `config.json` describes.

        Args:
            config: as transformers writes it for a tower of CLIP, with its defaults.
            **others: what such a file does not tell.

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


_SHARED = tuple(field.name for field in dataclasses.fields(Spec) if field.name != "is_causal")


class SelfAttention(nn.Module):
    """Attention of every position to itself and to what it may see."""

    spec: Spec

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        """Return [B, L, D]."""
        B, L, D = x_BLD.shape

        def heads(name: str) -> Array:
            return nn.Dense(D, dtype=self.spec.dtype, name=name)(x_BLD).reshape(B, L, self.spec.num_heads, -1)

        out = attend(heads("q_proj"), heads("k_proj"), heads("v_proj"), is_causal=self.spec.is_causal)
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
    """The layers in turn; the output is that of the one `skip_layers` before the last."""

    spec: Spec

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        """Return [B, L, D]."""
        layer = nn.remat(Layer) if self.spec.remat else Layer
        outputs = []
        for i in range(self.spec.num_layers):
            x_BLD = layer(self.spec, name=f"layers_{i}")(x_BLD)
            outputs.append(x_BLD)
        # Skipped layers keep their parameters, so that a checkpoint goes in and out whole; compiled, they cost nothing.
        return outputs[-1 - self.spec.skip_layers]


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
        width: of the embeddings.
        max_length: tokens in a text, padding included, at most.
        num_layers: of the transformer.
        num_heads: attention heads; they divide the width.
        mlp_width: hidden units of the MLPs.
        activation: of the MLPs, "quick_gelu" or "gelu".
        epsilon: added to the variance by layer norms.
        skip_layers: how many last layers are left out before the last norm; 1 takes the penultimate layer's output.
        dtype: of the computation; parameters are float32.
        remat: whether the backward pass computes a layer again instead of storing what is in it.
        attention: taken as by every network and without effect: texts are short.
    """

    vocab_size: int
    width: int
    max_length: int
    num_layers: int
    num_heads: int
    mlp_width: int
    activation: str = "quick_gelu"
    epsilon: float = 1e-5
    skip_layers: int = 0
    dtype: DTypeLike = jnp.float32
    remat: bool = False
    attention: Implementation = "xla"

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], skip_layers: int = 0, attention: Implementation = "xla", **compute: Any
    ) -> Self:
        """Build the encoder that a checkpoint's `config.json` describes.

        Args:
            config: as transformers writes it for a `CLIPTextModel`; keys left out have its defaults.
            skip_layers: see the class. The encoder of Stable Diffusion 2.x was cut before it was published and takes 0.
            attention: see the class.
            **compute: `dtype`, `remat`.

        Raises:
            UserError: a value that is not supported, or no layer is left.
        """
        config = DEFAULTS | dict(config)
        spec = Spec.from_config(config, skip_layers=skip_layers, **compute)
        if not 0 <= skip_layers < spec.num_layers:
            raise UserError(
                f"skip_layers is {skip_layers}; give 0 to {spec.num_layers - 1}, as the encoder has {spec.num_layers}."
            )
        shared = {name: getattr(spec, name) for name in _SHARED}
        sizes = config["vocab_size"], config["hidden_size"], config["max_position_embeddings"]
        return cls(*sizes, **shared, attention=attention)

    @nn.compact
    def __call__(self, tokens_BL: Array) -> tuple[Array, Array]:
        """Encode texts.

        Args:
            tokens_BL: int token ids, at most `max_length` of them.

        Returns:
            text_BLD, and mask_BL which is True everywhere: the public U-Nets attend to padding as well.
        """
        spec = Spec(**{name: getattr(self, name) for name in _SHARED})
        text_BLD = TextModel(self.vocab_size, self.width, self.max_length, spec, name="text_model")(tokens_BL)
        return text_BLD, jnp.ones(tokens_BL.shape, bool)
