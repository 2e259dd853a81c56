"""A training set that lives on the device, and batches sampled from it inside jit."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from personalize_jax.families.base import UNCONDITIONAL
from personalize_jax.families.batch import Batch, Tokens
from personalize_jax.families.objective import Group
from personalize_jax.families.stage import Conditioning
from personalize_jax.pipeline.cascade import to_float


class Examples(NamedTuple):
    """A labelled set of N pictures and M captions: arrays on the host or on devices, or their shapes.

    Attributes:
        image: uint8 [N, H, W, 3]; None where `latent` takes its place.
        caption: int32 [N, K], rows of `tokens`: the K captions of a picture, one of which is sampled each time.
        tokens: tokens of M captions; row 0 is the unconditional one.
        cond: conditioning of the M captions, computed once; None where the encoders are trained.
        low_res: uint8 [N, h, w, 3], each picture at the resolution of the previous stage (super-resolution only).
        object_mask: uint8 [N, H, W], the object's pixels, for weighting the loss; or None.
        latent: mean and standard deviation, float32 [N, h, w, C] each, of the pictures' latents, computed once, where
            latents are denoised; a batch then has samples of them.
    """

    image: Array | np.ndarray | None
    caption: Array | np.ndarray
    tokens: Tokens
    cond: Conditioning | None = None
    low_res: Array | np.ndarray | None = None
    object_mask: Array | np.ndarray | None = None
    latent: tuple[Array | np.ndarray, Array | np.ndarray] | None = None


PICTURES = ("image", "low_res", "object_mask", "latent")  # the fields with something for each picture's pixels


def make_examples(
    images: np.ndarray,
    captions_NK: np.ndarray,
    tokenize: Callable[[Sequence[str]], Tokens],
    low_res: np.ndarray | None = None,
    object_mask: np.ndarray | None = None,
) -> Examples:
    """Assemble a training set.

    Args:
        images: uint8 [N, H, W, 3].
        captions_NK: K captions for each picture, strings.
        tokenize: `families.base.Family.tokenize`.
        low_res: see `Examples`.
        object_mask: see `Examples`.
    """
    unique, index = np.unique(captions_NK, return_inverse=True)
    caption_NK = index.reshape(captions_NK.shape).astype(np.int32) + 1
    return Examples(images, caption_NK, tokenize([UNCONDITIONAL, *unique.tolist()]), None, low_res, object_mask)


def sample_batch(
    examples: Examples, key: Array, batch_size: int, caption_dropout: float, object_weight: float = 0.0
) -> Batch:
    """Sample a batch with replacement; traceable.

    Args:
        examples: the set.
        key: random key, used here alone.
        batch_size: B.
        caption_dropout: probability of the empty caption, in [0, 1], which trains the unconditional prediction that
            guidance needs.
        object_weight: additional loss weight of the object's pixels, beside 1 for every pixel.
    """
    picture_key, caption_key, drop_key, latent_key = jax.random.split(key, 4)
    i_B = jax.random.randint(picture_key, (batch_size,), 0, examples.caption.shape[0])
    k_B = jax.random.randint(caption_key, (batch_size,), 0, examples.caption.shape[1])
    drop_B = jax.random.bernoulli(drop_key, caption_dropout, (batch_size,))
    m_B = jnp.where(drop_B, 0, examples.caption[i_B, k_B])
    weight = None
    if examples.object_mask is not None:
        weight = 1 + object_weight * examples.object_mask[i_B][..., None].astype(jnp.float32) / 255
    if examples.latent is not None:
        mean, std = (a[i_B] for a in examples.latent)
        x = mean + std * jax.random.normal(latent_key, mean.shape)
    else:
        assert examples.image is not None, "examples have pictures or their latents"
        x = to_float(examples.image[i_B])
    return Batch(
        x=x,
        tokens=jax.tree.map(lambda a: a[m_B], examples.tokens),
        cond=None if examples.cond is None else jax.tree.map(lambda a: a[m_B], examples.cond),
        low_res=None if examples.low_res is None else to_float(examples.low_res[i_B]),
        pixel_weight=weight,
    )


def sample_batches(
    groups: Sequence[Group], examples: Mapping[str, Examples], key: Array, batch_size: int, object_weight: float
) -> dict[str, Batch]:
    """Sample a batch for each group, each with its own key; traceable.

    Args:
        groups: the groups.
        examples: each group's examples by its name.
        key: random key, used here alone.
        batch_size: examples of each group.
        object_weight: additional loss weight of the object's pixels, where masks are known.
    """
    keys = jax.random.split(key, len(groups))
    return {
        group.name: sample_batch(examples[group.name], k, batch_size, group.caption_dropout, object_weight)
        for group, k in zip(groups, keys, strict=True)
    }


def count_tokens(counts_V: Array, batches: Mapping[str, Batch]) -> Array:
    """Add the tokens of all groups' batches to the count of each token; traceable."""
    ids = jax.tree.leaves([batch.tokens for batch in batches.values()])
    return counts_V.at[jnp.concatenate([tokens.ravel() for tokens in ids])].add(1)


def downsample_uint8(u: np.ndarray, size: int) -> np.ndarray:
    """Area averages of uint8 pictures [N, H, H, C] as uint8 [N, size, size, C], on the host in little memory.

    Raises:
        ValueError: H is no multiple of size.
    """
    factor, remainder = divmod(u.shape[1], size)
    if remainder:
        raise ValueError(f"Pictures of {u.shape[1]} pixels cannot be averaged to {size}; give a divisor.")
    if factor == 1:
        return u
    blocks = [
        np.round(b.reshape(len(b), size, factor, size, factor, -1).mean((2, 4), dtype=np.float32)).astype(np.uint8)
        for b in np.array_split(u, -(-len(u) // 1000))
    ]
    return np.concatenate(blocks)
