"""The optimiser as an optax chain."""

import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

MOMENT_DTYPES = ("float32", "bfloat16")


def make_learning_rate(config: ConfigDict, num_steps: int) -> optax.Schedule:
    """The learning rate by the number of steps done.

    It rises linearly for `warmup_steps`, stays, and falls linearly to 0 over the last `decay_steps`. A training can be
    prolonged until its decay begins.

    Args:
        config: learning_rate, warmup_steps, decay_steps.
        num_steps: steps of the whole training.
    """
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps),
            optax.constant_schedule(config.learning_rate),
            optax.linear_schedule(config.learning_rate, 0.0, config.decay_steps),
        ],
        [config.warmup_steps, num_steps - config.decay_steps],
    )


def same_learning_rates(config: ConfigDict, num_done: int, before: int, after: int) -> bool:
    """Whether the steps done so far would have had the same learning rates in a training of another length.

    Args:
        config: learning_rate, warmup_steps, decay_steps.
        num_done: number of steps done.
        before: steps of the whole training with which they were done.
        after: steps of the whole training with which it is to continue.
    """
    steps = np.arange(num_done)
    return np.array_equal(*(make_learning_rate(config, num_steps)(steps) for num_steps in (before, after)))


def make_optimizer(config: ConfigDict, num_steps: int) -> optax.GradientTransformation:
    """AdamW under a clipped gradient norm.

    The first moment may be kept in bfloat16, 2 bytes a parameter less. The second moment is always float32: a step
    moves it by 1 - b2 of itself, .001 usually, and bfloat16, with 8 significant bits, rounds changes below .002 away,
    so that it would never fall again.

    Args:
        config: learning_rate, warmup_steps, decay_steps, b1, b2, weight_decay, clip_norm, moment_dtype.
        num_steps: steps of the whole training.
    """
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            make_learning_rate(config, num_steps),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mu_dtype=jnp.dtype(config.moment_dtype),
        ),
    )
