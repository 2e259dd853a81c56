"""Targets of a group's predictions, one function each.

Another form of the prior term is a function of the same arguments and a line in `PRIOR_FORMS`.
"""

import dataclasses
from collections.abc import Callable

from jax import Array

from personalize_jax.diffusion.prediction import target
from personalize_jax.families.batch import Batch, NoisyBatch
from personalize_jax.families.stage import Stage

# The frozen network's prediction for the same noisy input [B, H, W, C]; it is computed only if this is called.
FrozenPrediction = Callable[[], Array]


@dataclasses.dataclass(frozen=True)
class Target:
    """The target of a group's predictions.

    Attributes:
        function: (stage, batch, noisy batch, frozen prediction) -> [B, H, W, C] in the space of the stage's prediction.
        needs_frozen: whether the function uses the frozen prediction, so that a training must keep the pretrained
            networks beside those that it changes.
    """

    function: Callable[[Stage, Batch, NoisyBatch, FrozenPrediction], Array]
    needs_frozen: bool


def picture(stage: Stage, batch: Batch, noisy: NoisyBatch, frozen_prediction: FrozenPrediction) -> Array:
    """The prediction from which the clean picture x of z_t = alpha_t x + sigma_t eps would follow."""
    alpha, sigma = stage.process.alpha(noisy.t), stage.process.sigma(noisy.t)
    return target(stage.prediction, noisy.x, noisy.eps, alpha, sigma)


def frozen(stage: Stage, batch: Batch, noisy: NoisyBatch, frozen_prediction: FrozenPrediction) -> Array:
    """The frozen network's prediction for the same noisy input (specification [0082]-[0086])."""
    return frozen_prediction()


PICTURE = Target(picture, needs_frozen=False)

# By the values of config.prior.form. "sampled" is the class image that the frozen cascade has sampled.
PRIOR_FORMS = {"sampled": PICTURE, "frozen_prediction": Target(frozen, needs_frozen=True)}
