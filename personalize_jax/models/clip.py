"""CLIP: pictures and texts in one space.

Radford et al. 2021 (Learning Transferable Visual Models From Natural Language Supervision), section 2.4. The layers are
those of `clip_text`, which knows only the embeddings of positions that Stable Diffusion attends to.
"""

from collections.abc import Mapping
from typing import Any, Self

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from personalize_jax.models.clip_text import DEFAULTS, Layers, Spec, TextModel
from personalize_jax.runtime.errors import UserError


class VisionEmbeddings(nn.Module):
    """A vector for each patch and one for the whole, plus a vector for its position."""

    width: int
    patch: int

    @nn.compact
    def __call__(self, x_BHWC: Array) -> Array:
        """Return [B, 1 + patches, width], row by row."""
        p, D = self.patch, self.width
        x = nn.Conv(D, (p, p), (p, p), "VALID", use_bias=False, name="patch_embedding")(x_BHWC)
        x = x.reshape(x.shape[0], -1, D)
        whole_D = self.param("class_embedding", nn.initializers.normal(D**-0.5), (D,))
        x = jnp.concatenate([jnp.broadcast_to(whole_D, (x.shape[0], 1, D)), x], axis=1)
        return x + nn.Embed(x.shape[1], D, name="position_embedding")(jnp.arange(x.shape[1]))


class VisionModel(nn.Module):
    """Embeddings, layers and the norms around them, under the names that they have in checkpoints."""

    width: int
    patch: int
    spec: Spec

    @nn.compact
    def __call__(self, x_BHWC: Array) -> Array:
        """Return [B, width], the normalised embedding of the whole picture."""
        x = VisionEmbeddings(self.width, self.patch, name="embeddings")(x_BHWC)
        x = Layers(self.spec, name="encoder")(self.spec.norm("pre_layrnorm")(x))  # misspelt in every checkpoint
        return self.spec.norm("post_layernorm")(x[:, 0])


class Clip(nn.Module):
    """Both towers, as transformers' `CLIPModel`; embeddings are of unit length.

    Attributes:
        vocab_size: rows of the token embedding.
        end: id of the token that ends a text; None if it is the highest that a text has, as the first files imply.
        text_width: width of the text tower.
        max_length: tokens in a text, padding included, at most.
        text: the text tower's layers.
        resolution: side of the pictures.
        patch: side of a patch; it divides the resolution.
        vision_width: width of the vision tower.
        vision: the vision tower's layers.
        width: width of the embeddings.
    """

    vocab_size: int
    end: int | None
    text_width: int
    max_length: int
    text: Spec
    resolution: int
    patch: int
    vision_width: int
    vision: Spec
    width: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build the network that a checkpoint's `config.json` describes.

        Args:
            config: its content, as transformers writes it for a `CLIPModel`, in full or without the defaults.

        Raises:
            UserError: the config is another model's, or has an activation that is not supported.
        """
        if config.get("model_type") != "clip":
            raise UserError(f"config.json describes a {config.get('model_type')!r}; give the folder of a CLIP model.")
        text = DEFAULTS | dict(config.get("text_config") or {})
        vision = _VISION_DEFAULTS | dict(config.get("vision_config") or {})
        return cls(
            vocab_size=text["vocab_size"],
            end=None if text["eos_token_id"] == _NO_END else text["eos_token_id"],
            text_width=text["hidden_size"],
            max_length=text["max_position_embeddings"],
            text=Spec.from_config(text, is_causal=True),
            resolution=vision["image_size"],
            patch=vision["patch_size"],
            vision_width=vision["hidden_size"],
            vision=Spec.from_config(vision, is_causal=False),
            width=config.get("projection_dim", 512),
        )

    def setup(self) -> None:
        """Make the towers."""
        self.text_model = TextModel(self.vocab_size, self.text_width, self.max_length, self.text)
        self.vision_model = VisionModel(self.vision_width, self.patch, self.vision)
        self.text_projection = nn.Dense(self.width, use_bias=False)
        self.visual_projection = nn.Dense(self.width, use_bias=False)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(jnp.log(1 / 0.07)), ())

    def encode_images(self, x_BHWC: Array) -> Array:
        """Embed pictures, float32 [B, resolution, resolution, 3] normalised as in training, as [B, width]."""
        return _unit(self.visual_projection(self.vision_model(x_BHWC)))

    def encode_texts(self, tokens_BL: Array) -> Array:
        """Embed texts, int token ids [B, L], as [B, width]: the output at the first end of the text, projected."""
        x_BLD = self.text_model(tokens_BL)
        end_B = jnp.argmax(tokens_BL if self.end is None else tokens_BL == self.end, axis=1)
        return _unit(self.text_projection(jnp.take_along_axis(x_BLD, end_B[:, None, None], axis=1)[:, 0]))

    def __call__(self, x_BHWC: Array, tokens_BL: Array) -> tuple[Array, Array]:
        """Embed both."""
        return self.encode_images(x_BHWC), self.encode_texts(tokens_BL)


_NO_END = 2  # eos_token_id in the first config.json files, whose texts end otherwise; transformers handles it too

# Values of the keys that a config.json leaves out: the base model's, such as openai/clip-vit-base-patch32.
_VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}


def _unit(x_BD: Array) -> Array:
    return x_BD / jnp.linalg.norm(x_BD, axis=-1, keepdims=True)
