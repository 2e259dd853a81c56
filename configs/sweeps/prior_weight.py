"""How much prior preservation? The weight lambda of the base model's prior term, from none upwards.

python -m launch.sweep --config=configs/world.py --sweep=configs/sweeps/prior_weight.py --images=photos/ \
    --class_noun=dog --workdir=runs/prior_weight --metric="diversity kept"
"""

from collections.abc import Iterator

from ml_collections import ConfigDict


def sweep(config: ConfigDict) -> Iterator[dict[str, object]]:
    """Six weights around the paper's 1."""
    for weight in (0.0, 0.25, 0.5, 1.0, 2.0, 4.0):
        yield {"training.prior.weight": weight}
