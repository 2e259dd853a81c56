"""A small bidirectional transformer that turns caption tokens into the sequence that the U-Nets attend to."""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

PAD_ID = 0


class TransformerLayer(nn.Module):
    """Pre-norm self-attention and MLP; padding is masked out of the keys."""

    num_heads: int

    @nn.compact
    def __call__(self, x_BLD: Array, mask_BL: Array) -> Array:
        """Return the layer's output, [B, L, D]."""
        width = x_BLD.shape[-1]
        attention_mask_B11L = mask_BL[:, None, None, :]
        h = nn.LayerNorm(name="attention_norm")(x_BLD)
        x_BLD += nn.MultiHeadDotProductAttention(self.num_heads, name="attention")(h, mask=attention_mask_B11L)
        h = nn.LayerNorm(name="mlp_norm")(x_BLD)
        h = nn.gelu(nn.Dense(4 * width, name="mlp_in")(h))
        return x_BLD + nn.Dense(width, name="mlp_out")(h)


class TextEncoder(nn.Module):
    """Token ids to text embeddings.

    A token's embedding begins with unit variance and moves only when the token is processed, so that a token that
    pretraining never saw keeps a vector of its own: this makes a rare token a usable identifier.
    """

    vocab_size: int
    width: int = 128
    num_layers: int = 2
    num_heads: int = 4
    max_length: int = 32

    @nn.compact
    def __call__(self, tokens_BL: Array) -> tuple[Array, Array]:
        """Encode captions.

        Args:
            tokens_BL: int token ids, padded with `PAD_ID` to at most `max_length`.

        Returns:
            text_BLD, and mask_BL which is True at tokens and False at padding.
        """
        mask_BL = tokens_BL != PAD_ID
        x_BLD = nn.Embed(self.vocab_size, self.width, embedding_init=nn.initializers.normal(1.0), name="tokens")(
            tokens_BL
        )
        position_LD = self.param("positions", nn.initializers.normal(0.1), (self.max_length, self.width))
        x_BLD += position_LD[: tokens_BL.shape[1]]
        for i in range(self.num_layers):
            x_BLD = TransformerLayer(self.num_heads, name=f"layer_{i}")(x_BLD, mask_BL)
        return nn.LayerNorm(name="final_norm")(x_BLD), jnp.asarray(mask_BL)
