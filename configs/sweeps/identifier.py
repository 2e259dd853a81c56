"""Which identifier? Rare ones of one to three tokens, a frequent word, and random characters.

python -m launch.sweep --config=configs/world.py --sweep=configs/sweeps/identifier.py --images=photos/ \
    --class_noun=dog --workdir=runs/identifier --metric=DINO
"""

from collections.abc import Iterator

from ml_collections import ConfigDict


def sweep(config: ConfigDict) -> Iterator[dict[str, object]]:
    """The configured rule with one to three tokens, then the identifiers that the paper advises against."""
    for num_tokens in (1, 2, 3):
        yield {"subject.num_tokens": num_tokens}
    yield {"subject.rule": "frequent", "subject.num_tokens": 1}
    yield {"subject.rule": "random_characters", "subject.num_tokens": 1}
