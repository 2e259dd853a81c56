"""The vision transformer of DINO.

Dosovitskiy et al. 2021 (An Image is Worth 16x16 Words) in the form of Caron et al. 2021 (Emerging Properties in
Self-Supervised Vision Transformers), whose ViT-S/16 the paper measures subjects with.
"""

from collections.abc import Mapping
from typing import Any, Self

import einops
import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from personalize_jax.models.activation import gelu
from personalize_jax.models.attention import attend
from personalize_jax.runtime.errors import UserError

# Attributes by their keys in a checkpoint's config.json.
_KEYS = {
    "image_size": "resolution",
    "patch_size": "patch",
    "hidden_size": "width",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_width",
    "layer_norm_eps": "epsilon",
}
_SUPPORTED = {"model_type": "vit", "hidden_act": "gelu", "qkv_bias": True, "num_channels": 3}


class Patches(nn.Module):
    """A linear layer on every patch of pixels.

    Attributes:
        width: width of the output.
        patch: side of a patch.
    """

    width: int
    patch: int

    @nn.compact
    def __call__(self, x_BHWC: Array) -> Array:
        """Return [B, patches, width], row by row."""
        p = self.patch
        x = nn.Conv(self.width, (p, p), (p, p), "VALID", name="projection")(x_BHWC)
        return einops.rearrange(x, "b h w d -> b (h w) d")


class Layer(nn.Module):
    """Pre-norm self-attention and MLP."""

    num_heads: int
    mlp_width: int
    epsilon: float

    @nn.compact
    def __call__(self, x_BLD: Array) -> Array:
        """Return [B, L, D]."""
        B, L, D = x_BLD.shape

        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(self.epsilon, use_fast_variance=False, name=name)

        h = norm("layernorm_before")(x_BLD)
        q, k, v = (nn.Dense(D, name=n)(h).reshape(B, L, self.num_heads, -1) for n in ("query", "key", "value"))
        x_BLD += nn.Dense(D, name="attention_output")(attend(q, k, v).reshape(B, L, D))
        h = gelu(nn.Dense(self.mlp_width, name="mlp_in")(norm("layernorm_after")(x_BLD)))
        return x_BLD + nn.Dense(D, name="mlp_out")(h)


class VisionTransformer(nn.Module):
    """Pictures to the embedding of the class token, as transformers' `ViTModel` without its pooler.

    Attributes:
        resolution: side of the pictures.
        patch: side of a patch; it divides the resolution.
        width: width of the embeddings.
        num_layers: number of layers.
        num_heads: attention heads; they divide the width.
        mlp_width: hidden units of the MLPs.
        epsilon: added to the variance by layer norms.
    """

    resolution: int
    patch: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    epsilon: float = 1e-12

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build the network that a checkpoint's `config.json` describes.

        Args:
            config: its content, as transformers writes it for a `ViTModel`.

        Raises:
            UserError: a key is missing, or has a value that is not supported.
        """
        for key, value in _SUPPORTED.items():
            if config.get(key, value) != value:
                raise UserError(
                    f"{key} is {config[key]!r} in the config.json of a vision transformer; only {value!r} is."
                )
        if missing := [key for key in _KEYS if key not in config]:
            raise UserError(f"The config.json of a vision transformer lacks {', '.join(missing)}; restore the file.")
        return cls(**{name: config[key] for key, name in _KEYS.items()})

    @nn.compact
    def __call__(self, x_BHWC: Array) -> Array:
        """Embed pictures.

        Args:
            x_BHWC: float32 [B, resolution, resolution, 3], normalised as in training.

        Returns:
            float32 [B, width], not of unit length.
        """
        x = Patches(self.width, self.patch, name="patch_embeddings")(x_BHWC)
        B, L, D = x.shape
        cls_11D = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, D))
        x = jnp.concatenate([jnp.broadcast_to(cls_11D, (B, 1, D)), x], axis=1)
        x += self.param("position_embeddings", nn.initializers.normal(0.02), (1, L + 1, D))
        for i in range(self.num_layers):
            x = Layer(self.num_heads, self.mlp_width, self.epsilon, name=f"layers_{i}")(x)
        return nn.LayerNorm(self.epsilon, use_fast_variance=False, name="layernorm")(x[:, 0])
