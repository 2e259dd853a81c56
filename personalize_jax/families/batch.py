"""Batches: the examples that a family's loss is computed from."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from personalize_jax.families.stage import Conditioning

Tokens = Any  # a pytree of int32 arrays with a leading batch axis


class Batch(NamedTuple):
    """B examples of a group in a train step.

    Attributes:
        x: float32 [B, H, W, 3] pictures in [-1, 1], or latents.
        tokens: tokens of B captions.
        cond: conditioning of the captions, or None when the step has to compute it.
        low_res: float32 [B, h, w, 3] low-resolution pictures in [-1, 1], or None.
        pixel_weight: float32 [B, H, W, 1], or None for 1 everywhere.
    """

    x: Array
    tokens: Tokens
    cond: Conditioning | None
    low_res: Array | None
    pixel_weight: Array | None


class NoisyBatch(NamedTuple):
    """The denoiser's inputs for B examples, and the noise in them.

    Attributes:
        x: [B, H, W, C] what is noised: pictures, latents, or `Stage.to_residual` of pictures.
        z: [B, H, W, C] z_t, the same with noise.
        t: [B] times.
        cond: conditioning of the captions.
        low_res: low-resolution pictures and their noise levels, see `Stage.augment`; or None.
        eps: [B, H, W, C] noise in z.
    """

    x: Array
    z: Array
    t: Array
    cond: Conditioning
    low_res: tuple[Array, Array] | None
    eps: Array


def interleave(*groups: tuple) -> tuple:
    """Join pytrees of [B, ...] arrays to [len(groups) B, ...], alternating, so that a sharded batch stays in place."""
    return jax.tree.map(lambda *a: jnp.stack(a, 1).reshape(-1, *a[0].shape[1:]), *groups)


def separate(x: Array, count: int) -> list[Array]:
    """The inverse of `interleave` for one array."""
    return list(jnp.moveaxis(x.reshape(-1, count, *x.shape[1:]), 1, 0))
