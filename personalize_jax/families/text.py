"""What families have in common whose denoisers attend to the output sequence of one text encoder."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from personalize_jax.families.stage import Stage
from personalize_jax.formats.tokenizer import Tokenizer
from personalize_jax.models import adapters
from personalize_jax.models.adapters import Adapted, Network
from personalize_jax.models.params import Params


class Text(NamedTuple):
    """Conditioning of captions: embeddings [B, L, D] and mask [B, L], True at tokens."""

    embeddings: Array
    mask: Array


class TextEncoder(Network, Protocol):
    """A network from token ids [B, L] to the arrays of `Text`."""

    @property
    def vocab_size(self) -> int:
        """Rows of the table of embeddings."""

    @property
    def max_length(self) -> int:
        """Number of tokens L of every text, padding included."""


@dataclasses.dataclass(frozen=True)
class TextConditioned:
    """Captions, text encoder and denoisers of such a family.

    Attributes:
        tokenizer: the vocabulary, or None in a model for planning only.
        text_encoder: the text encoder, shared by all stages.
        stages: the denoisers in the order of sampling.
    """

    tokenizer: Tokenizer | None = dataclasses.field(compare=False)
    text_encoder: TextEncoder
    stages: tuple[Stage, ...]

    encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)

    @property
    def vocabulary_size(self) -> int:
        """Rows of the text encoder's table of embeddings."""
        return self.text_encoder.vocab_size

    def tokenize(self, captions: Sequence[str]) -> np.ndarray:
        """Token ids, int32 [B, L]."""
        assert self.tokenizer is not None  # a model for planning only meets no captions
        return self.tokenizer(captions)

    def token_shapes(self, count: int) -> jax.ShapeDtypeStruct:
        """Shape of the token ids of `count` captions."""
        return jax.ShapeDtypeStruct((count, self.text_encoder.max_length), jnp.int32)

    def condition(self, params: Params, tokens_BL: Array) -> Text:
        """The text encoder's embeddings and their mask; traceable."""
        return Text(*_encode(self.text_encoder, params["text_encoder"], tokens_BL))

    def network_shapes(self) -> dict[str, Params]:
        """Shapes of the text encoder's and the denoisers' parameters, float32."""
        key, tokens = jax.random.key(0), jnp.zeros(self.token_shapes(1).shape, jnp.int32)
        text_params = jax.eval_shape(self.text_encoder.init, key, tokens)["params"]
        text = jax.eval_shape(self.condition, {"text_encoder": text_params}, tokens)
        stages = {stage.name: jax.eval_shape(lambda s=stage: s.init_params(key, text)) for stage in self.stages}
        return {"text_encoder": text_params, **stages}


class PixelDenoising:
    """The part of a family whose denoisers work on pictures themselves."""

    def to_latents(self, params: Params, x_BHWC: Array) -> None:
        """None: pictures themselves are denoised."""

    def to_pictures(self, params: Params, z_BHWC: Array) -> Array:
        """The pictures that were denoised."""
        return z_BHWC


@functools.partial(jax.jit, static_argnums=0)
def _encode(text_encoder: TextEncoder, params: Params | Adapted, tokens_BL: Array) -> tuple[Array, Array]:
    return adapters.apply(text_encoder, params, tokens_BL)
