"""How large an adapter? The rank of the base model's adapters, for a configuration that trains them.

python -m launch.sweep --config=configs/world.py:lora --sweep=configs/sweeps/lora_rank.py --images=photos/ \
    --class_noun=dog --workdir=runs/lora_rank --metric=DINO
"""

from collections.abc import Iterator

from ml_collections import ConfigDict


def sweep(config: ConfigDict) -> Iterator[dict[str, object]]:
    """Powers of two, 1 to 32."""
    if config.training.lora.rank == 0:
        raise ValueError("The configuration trains no adapters; give one that does, such as configs/world.py:lora.")
    for exponent in range(6):
        yield {"training.lora.rank": 2**exponent}
