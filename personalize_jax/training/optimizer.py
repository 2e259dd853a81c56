"""The optimiser as an optax chain."""

import optax
from ml_collections import ConfigDict


def make_optimizer(config: ConfigDict, num_steps: int) -> optax.GradientTransformation:
    """AdamW under a clipped gradient norm.

    The learning rate rises linearly for `warmup_steps`, stays, and falls linearly to 0 over the last `decay_steps`:
    training can be prolonged at any time before its decay begins.

    Args:
        config: learning_rate, warmup_steps, decay_steps, b1, b2, weight_decay, clip_norm.
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
        optax.adamw(learning_rate, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay),
    )
