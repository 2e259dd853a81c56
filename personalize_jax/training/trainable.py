"""Which parameters are trained: regular expressions over slash-separated paths, directly or through adapters."""

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from personalize_jax.errors import UserError
from personalize_jax.models.params import Params, flatten, unflatten
from personalize_jax.training.lora import adapted_kernels, apply_adapters

LORA = "lora"  # where trained parameters hold adapters, beside the networks


def partition(
    params: Params, rules: Sequence[tuple[str, bool]], adapted: Collection[str] = ()
) -> tuple[Params, Params]:
    """Split parameters into those trained themselves and untouched ones.

    Args:
        params: nested dict, such as {"denoiser": ..., "text_encoder": ...}.
        rules: (regular expression, trained?) pairs; the first that matches a path's beginning decides.
        adapted: paths of the kernels that get adapters; if there are any, the rules may leave nothing else to train.

    Returns:
        Two nested dicts without common leaves; adapted kernels are untouched.

    Raises:
        UserError: a path that no rule matches, an adapted kernel that the rules train too, or nothing left to train.
    """
    sides: dict[bool, dict] = {True: {}, False: {}}
    for path, value in flatten(params).items():
        trained = next((trained for pattern, trained in rules if re.match(pattern, path)), None)
        if trained is None:
            raise UserError(f"Parameter {path!r} matches no rule of config.training.trainable; add one, such as '.*'.")
        if trained and path in adapted:
            raise UserError(
                f"Kernel {path!r} is to be trained by config.training.trainable and to be adapted by lora.targets; "
                "choose one: the rules (('.*', False),) train adapters alone."
            )
        sides[trained][path] = value
    if not sides[True] and not adapted:
        raise UserError(
            f"The rules {list(rules)} of config.training.trainable leave nothing to train; mark a pattern True."
        )
    return unflatten(sides[True]), unflatten(sides[False])


class Selection(NamedTuple):
    """What a training changes, and what it leaves.

    Attributes:
        trained: parameters that are trained themselves.
        frozen: all others.
        adapted: those of the frozen ones that get adapters: number of input dimensions by path.
    """

    trained: Params
    frozen: Params
    adapted: dict[str, int]

    @property
    def networks(self) -> set[str]:
        """Names of the networks that change, directly or through adapters."""
        return {*self.trained, *(path.partition("/")[0] for path in self.adapted)}


def select(params: Params, config: ConfigDict) -> Selection:
    """Tell what a configuration trains.

    Args:
        params: as for `partition`.
        config: keys of `configs.common.training()`.

    Raises:
        UserError: the rules or the targets do not fit the parameters.
    """
    adapted = adapted_kernels(params, config.lora.rank, config.lora.targets)
    return Selection(*partition(params, config.trainable, adapted), adapted)


def merge(trained: Params, others: Params) -> Params:
    """Parameters as the networks take them; traceable.

    Args:
        trained: parameters, and under "lora" adapters, if there are any.
        others: what completes them; the kernels that the adapters change are here.
    """
    direct = {name: network for name, network in trained.items() if name != LORA}
    return apply_adapters(unflatten({**flatten(others), **flatten(direct)}), trained.get(LORA, {}))
