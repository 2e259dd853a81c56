"""Contrastive losses, which are low where embeddings are nearer to their partners than to all others."""

import jax.numpy as jnp
import optax
from jax import Array


def info_nce(a_BD: Array, b_BD: Array, scale: Array | float) -> Array:
    """CLIP's loss (Radford et al. 2021, figure 3): each a finds its own b among the batch's, and the reverse.

    Args:
        a_BD: embeddings of unit length.
        b_BD: their partners, row by row.
        scale: the factor of the cosines, the reciprocal of a temperature.

    Returns:
        Mean cross-entropy in nats; log B where all embeddings are alike.
    """
    logits_BB = scale * a_BD @ b_BD.T
    own_B = jnp.arange(len(a_BD))
    both = [optax.softmax_cross_entropy_with_integer_labels(logits, own_B) for logits in (logits_BB, logits_BB.T)]
    return jnp.mean(jnp.stack(both))


def nt_xent(a_BD: Array, b_BD: Array, scale: Array | float) -> Array:
    """SimCLR's loss (Chen et al. 2020, equation 1): each of 2 B views finds its partner among the 2 B - 1 others.

    Args:
        a_BD: embeddings of unit length of one view of each of B things.
        b_BD: embeddings of another view of them.
        scale: the factor of the cosines, the reciprocal of a temperature.

    Returns:
        Mean cross-entropy in nats; log(2 B - 1) where all embeddings are alike.
    """
    x_ND = jnp.concatenate([a_BD, b_BD])
    N = len(x_ND)
    logits_NN = jnp.where(jnp.eye(N, dtype=bool), -jnp.inf, scale * x_ND @ x_ND.T)
    partner_N = jnp.roll(jnp.arange(N), N // 2)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits_NN, partner_N))
