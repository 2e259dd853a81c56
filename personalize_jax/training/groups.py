"""Groups of examples: what a training learns from, and how much each kind of examples counts.

DreamBooth has two groups, instance images and class images; pretraining has one; n subjects in one model are 2 n.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
from jax import Array
from ml_collections import ConfigDict

from personalize_jax.training.examples import Batch, Examples, sample_batch
from personalize_jax.training.targets import PICTURE, PRIOR_FORMS, Target

INSTANCE, PRIOR = "instance", "prior"


@dataclasses.dataclass(frozen=True)
class Group:
    """A group of examples, without the examples themselves.

    Attributes:
        name: key of its examples; its metrics begin with it.
        weight: factor of its term in the loss.
        target: what its predictions are compared with.
        caption_dropout: probability of the empty caption, in [0, 1].
    """

    name: str
    weight: float = 1.0
    target: Target = PICTURE
    caption_dropout: float = 0.0


def groups_of(config: ConfigDict) -> tuple[Group, ...]:
    """The groups of a training: instance images, and class images unless the prior weight is 0.

    Args:
        config: keys of `configs.common.training()`.
    """
    instance = Group(INSTANCE, caption_dropout=config.caption_dropout)
    if config.prior.weight == 0:
        return (instance,)
    form = PRIOR_FORMS[config.prior.form]
    return instance, Group(PRIOR, config.prior.weight, form, config.prior.caption_dropout)


def sample_batches(
    groups: Sequence[Group], examples: Mapping[str, Examples], key: Array, batch_size: int, object_weight: float
) -> dict[str, Batch]:
    """Sample a batch of each group, with a key of its own; traceable.

    Args:
        groups: the groups.
        examples: examples by the name of their group.
        key: random key, used here alone.
        batch_size: examples of each group.
        object_weight: additional loss weight of the object's pixels, where masks are known.
    """
    keys = jax.random.split(key, len(groups))
    return {
        group.name: sample_batch(examples[group.name], k, batch_size, group.caption_dropout, object_weight)
        for group, k in zip(groups, keys, strict=True)
    }
