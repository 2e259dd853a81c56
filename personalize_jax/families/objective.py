"""The objective of a training: groups of examples with their weights, and constants of the loss.

DreamBooth has two groups, instance images and class images; pretraining has one; n subjects in one model are 2 n.
"""

import dataclasses

from ml_collections import ConfigDict

from personalize_jax.diffusion.prediction import Weighting
from personalize_jax.families.targets import PICTURE, PRIOR_FORMS, Target

INSTANCE, PRIOR = "instance", "prior"


@dataclasses.dataclass(frozen=True)
class Group:
    """A group of examples, without the examples themselves.

    Attributes:
        name: key of its examples; its metrics begin with it.
        weight: factor of its term in the loss.
        target: the target of its predictions.
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


@dataclasses.dataclass(frozen=True)
class Objective:
    """Constants of the loss.

    Attributes:
        groups: groups of examples, whose losses are summed.
        weighting: kind of the weight w_t, see `diffusion.prediction.loss_weight`.
        augmentation_levels: range of the low-resolution picture's noise level while training (super-resolution only).
        offset_noise: standard deviation of noise that is the same in all of a picture, added to eps; 0 leaves it out.
        vlb_weight: weight of the variational bound, by which a network learns the variance of its steps; 0 leaves that
            part of the output alone. It is the weight of one step, where Nichol & Dhariwal (2021, eq. 16) weigh the sum
            over N steps with .001: 1 is theirs for N = 1000.
    """

    groups: tuple[Group, ...]
    weighting: Weighting
    augmentation_levels: tuple[float, float] = (0.0, 0.0)
    offset_noise: float = 0.0
    vlb_weight: float = 0.0


def objective_of(config: ConfigDict) -> Objective:
    """The objective of a training.

    Args:
        config: keys of `configs.common.training()`.
    """
    levels = tuple(config.augmentation_levels)
    return Objective(groups_of(config), config.weighting, levels, config.offset_noise, config.vlb_weight)
