"""How fast, and how long? Learning rate and number of steps of the base model, around the configured ones.

python -m launch.sweep --config=configs/world.py --sweep=configs/sweeps/learning_rate_and_steps.py --images=photos/ \
    --class_noun=dog --workdir=runs/learning_rate_and_steps --metric=DINO
"""

from collections.abc import Iterator

from ml_collections import ConfigDict

FACTORS = (0.5, 1.0, 2.0)


def sweep(config: ConfigDict) -> Iterator[dict[str, object]]:
    """A grid of nine points."""
    training = config.training
    for rate in FACTORS:
        for length in FACTORS:
            dispatches = max(1, round(length * training.num_steps / training.steps_per_dispatch))
            yield {
                "training.optimizer.learning_rate": float(f"{rate * training.optimizer.learning_rate:.6g}"),
                "training.num_steps": dispatches * training.steps_per_dispatch,
            }
