"""A causal transformer over a picture's tokens, which attends to the text: p(picture | text), token by token."""

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

from personalize_jax.models.activation import gelu
from personalize_jax.models.picture_tokenizer import values_of_tokens

OPENING = -1  # in place of a neighbour's id, where it would lie outside of the picture

_zeros = nn.initializers.zeros_init()

KeysValues = tuple[Array, Array]  # keys and values of a sequence, [B, S, N, D] each, for N heads of D dimensions


class Context(NamedTuple):
    """A text as all positions read it: computed once for a picture.

    Attributes:
        pooled: [B, 1, width] mean of the text's embeddings, projected.
        keys_values: keys and values of the text, of each layer.
        mask: [B, 1, 1, L], True at the text's tokens.
    """

    pooled: Array
    keys_values: tuple[KeysValues, ...]
    mask: Array


class Attention(nn.Module):
    """Multi-head attention whose keys and values can be kept."""

    width: int
    num_heads: int

    def setup(self) -> None:
        """Make the projections."""
        heads = self.num_heads, self.width // self.num_heads
        self.query, self.key, self.value = nn.DenseGeneral(heads), nn.DenseGeneral(heads), nn.DenseGeneral(heads)
        self.out = nn.DenseGeneral(self.width, axis=(-2, -1), kernel_init=_zeros)

    def keys_values(self, x_BSD: Array) -> KeysValues:
        """Keys and values of a sequence."""
        return self.key(x_BSD), self.value(x_BSD)

    def __call__(self, x_BLD: Array, keys_values: KeysValues, mask: Array) -> Array:
        """Attend from x to a sequence's keys where the mask, broadcast to [B, N, L, S], is True; [B, L, width]."""
        return self.out(jax.nn.dot_product_attention(self.query(x_BLD), *keys_values, mask=mask))


class Layer(nn.Module):
    """Causal self-attention, cross-attention to the text, MLP; each after a norm and added to its input."""

    width: int
    num_heads: int

    def setup(self) -> None:
        """Make the parts."""
        self.self_norm, self.cross_norm, self.mlp_norm = nn.LayerNorm(), nn.LayerNorm(), nn.LayerNorm()
        self.self_attention = Attention(self.width, self.num_heads)
        self.cross_attention = Attention(self.width, self.num_heads)
        self.mlp_in, self.mlp_out = nn.Dense(4 * self.width), nn.Dense(self.width, kernel_init=_zeros)

    def __call__(
        self, x_BLD: Array, text: KeysValues, text_mask: Array, position: Array | int, cache: KeysValues | None
    ) -> tuple[Array, KeysValues]:
        """Run positions `position`, `position` + 1, ... of the picture.

        Args:
            x_BLD: inputs at L positions.
            text: keys and values of the text.
            text_mask: see `Context`.
            position: the first of the positions.
            cache: keys and values of all positions, of which those before `position` are known; None where x has all.

        Returns:
            Outputs at the L positions, and the keys and values with theirs.
        """
        h = self.self_norm(x_BLD)
        known = self.self_attention.keys_values(h)
        if cache is not None:
            insert = partial(jax.lax.dynamic_update_slice_in_dim, start_index=position, axis=1)
            known = jax.tree.map(insert, cache, known)
        query_L1, key_S = position + jnp.arange(x_BLD.shape[1])[:, None], jnp.arange(known[0].shape[1])
        x_BLD += self.self_attention(h, known, (key_S <= query_L1)[None, None])
        x_BLD += self.cross_attention(self.cross_norm(x_BLD), text, text_mask)
        return x_BLD + self.mlp_out(gelu(self.mlp_in(self.mlp_norm(x_BLD)))), known


class TokenEmbedding(nn.Module):
    """Embeddings of tokens: a vector for each token, and one for each value of each dimension of its code.

    Tokens that share values share these vectors, so that a token is known a little before it has been met.
    """

    levels: Sequence[int]
    width: int

    def setup(self) -> None:
        """Make the tables; the last row of a token's own is that of `OPENING`."""
        self.own = nn.Embed(math.prod(self.levels) + 1, self.width, embedding_init=nn.initializers.normal(0.1))
        self.shared = nn.Dense(self.width, use_bias=False)

    def __call__(self, ids: Array) -> Array:
        """Embeddings [..., width] of ids [...]; `OPENING` stands for what is outside of the picture."""
        values = jnp.asarray(values_of_tokens(self.levels))[ids] * (ids != OPENING)[..., None]
        return self.own(ids % (math.prod(self.levels) + 1)) + self.shared(values)


class CausalTransformer(nn.Module):
    """Logits of every token of a picture, given the text and the tokens before it.

    A position's input is its left neighbour and the one above; it attends to all positions before it.

    Attributes:
        levels: number of values of each dimension of the codes, whose combinations are the tokens.
        rows: rows of tokens of a picture.
        columns: tokens of a row.
        width: features of each position.
        num_layers: number of layers.
        num_heads: heads of each attention; they divide the width.
    """

    levels: Sequence[int]
    rows: int
    columns: int
    width: int
    num_layers: int
    num_heads: int

    def setup(self) -> None:
        """Make the parts."""
        self.left, self.above = TokenEmbedding(self.levels, self.width), TokenEmbedding(self.levels, self.width)
        self.positions = self.param("positions", nn.initializers.normal(0.1), (self.length, self.width))
        self.pooled_text = nn.Dense(self.width)
        self.layers = [Layer(self.width, self.num_heads) for _ in range(self.num_layers)]
        self.final_norm = nn.LayerNorm()
        self.head = nn.Dense(math.prod(self.levels), kernel_init=_zeros)
        self.head_of_values = nn.Dense(sum(self.levels), kernel_init=_zeros, use_bias=False)

    @property
    def length(self) -> int:
        """Tokens N of a picture."""
        return self.rows * self.columns

    def __call__(self, ids_BN: Array, text_BLD: Array, mask_BL: Array) -> Array:
        """Logits [B, N, V] of all tokens of pictures; those of token i depend on the tokens before i alone.

        Args:
            ids_BN: ids of the pictures' tokens.
            text_BLD: text embeddings.
            mask_BL: True at the text's tokens.
        """
        above = jnp.pad(ids_BN, ((0, 0), (self.columns, 0)), constant_values=OPENING)
        return self._run(above[:, self.columns - 1 : -1], above[:, : self.length], 0, self.read(text_BLD, mask_BL))[0]

    def read(self, text_BLD: Array, mask_BL: Array) -> Context:
        """The text as all positions read it."""
        weight_BL = mask_BL / jnp.maximum(mask_BL.sum(-1, keepdims=True), 1)
        pooled_BD = self.pooled_text(jnp.einsum("bld,bl->bd", text_BLD, weight_BL))
        keys_values = tuple(layer.cross_attention.keys_values(text_BLD) for layer in self.layers)
        return Context(pooled_BD[:, None], keys_values, mask_BL[:, None, None, :])

    def empty_cache(self, count: int) -> tuple[KeysValues, ...]:
        """The keys and values of `count` pictures of which no token is known."""
        empty = jnp.zeros((count, self.length, self.num_heads, self.width // self.num_heads))
        return ((empty, empty),) * self.num_layers

    def step(
        self, known_BN: Array, position: Array, context: Context, cache: tuple[KeysValues, ...]
    ) -> tuple[Array, tuple[KeysValues, ...]]:
        """Logits [B, V] of the token at a position, and the cache with it.

        Args:
            known_BN: ids of the tokens, of which those before the position are known.
            position: its position, a scalar.
            context: from `read`.
            cache: keys and values of each layer, from the step before.
        """

        def neighbour(distance: int) -> Array:
            ids_B1 = jax.lax.dynamic_slice_in_dim(known_BN, jnp.maximum(position - distance, 0), 1, axis=1)
            return jnp.where(position < distance, OPENING, ids_B1)

        logits_B1V, cache = self._run(neighbour(1), neighbour(self.columns), position, context, cache)
        return logits_B1V[:, 0], cache

    def _run(
        self,
        left_BL: Array,
        above_BL: Array,
        position: Array | int,
        context: Context,
        cache: tuple[KeysValues, ...] | None = None,
    ) -> tuple[Array, tuple[KeysValues, ...]]:
        position_LD = jax.lax.dynamic_slice_in_dim(self.positions, position, left_BL.shape[1])
        x, known = self.left(left_BL) + self.above(above_BL) + position_LD + context.pooled, []
        for i, layer in enumerate(self.layers):
            x, of_layer = layer(x, context.keys_values[i], context.mask, position, None if cache is None else cache[i])
            known.append(of_layer)
        x = self.final_norm(x)
        return self.head(x) + self.head_of_values(x) @ values_of_tokens(self.levels).T, tuple(known)
