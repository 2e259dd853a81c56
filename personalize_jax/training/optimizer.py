"""The optimiser as an optax chain."""

import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

MOMENT_DTYPES = ("float32", "bfloat16")


def make_optimizer(config: ConfigDict, num_steps: int) -> optax.GradientTransformation:
    """AdamW under a clipped gradient norm.

    The learning rate rises linearly for `warmup_steps`, stays, and falls linearly to 0 over the last `decay_steps`:
    training can be prolonged at any time before its decay begins.

    The first moment may be kept in bfloat16, 2 bytes a parameter less. The second moment is always float32: a step
    moves it by 1 - b2 of itself, .001 usually, and bfloat16, with 8 significant bits, rounds changes below .002 away,
    so that it would never fall again.

    Args:
        config: learning_rate, warmup_steps, decay_steps, b1, b2, weight_decay, clip_norm, moment_dtype.
        num_steps: of the whole training.
    """
    learning_rate = optax.join_schedules(
        [
            optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps),
            optax.constant_schedule(config.learning_rate),
            optax.linear_schedule(config.learning_rate, 0.0, config.decay_steps),
        ],
        [config.warmup_steps, num_steps - config.decay_steps],
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate,
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mu_dtype=jnp.dtype(config.moment_dtype),
        ),
    )
