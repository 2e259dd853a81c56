"""Which parameters are trained: regular expressions over slash-separated paths."""

import re
from collections.abc import Sequence

from personalize_jax.errors import UserError
from personalize_jax.models.params import Params, flatten, unflatten


def partition(params: Params, rules: Sequence[tuple[str, bool]]) -> tuple[Params, Params]:
    """Split parameters into trained and untouched ones.

    Args:
        params: nested dict, such as {"denoiser": ..., "text_encoder": ...}.
        rules: (regular expression, trained?) pairs; the first that matches a path's beginning decides.

    Returns:
        Two nested dicts without common leaves.

    Raises:
        UserError: a path that no rule matches, or nothing left to train.
    """
    sides: dict[bool, dict] = {True: {}, False: {}}
    for path, value in flatten(params).items():
        trained = next((trained for pattern, trained in rules if re.match(pattern, path)), None)
        if trained is None:
            raise UserError(f"Parameter {path!r} matches no rule of config.training.trainable; add one, such as '.*'.")
        sides[trained][path] = value
    if not sides[True]:
        raise UserError(
            f"The rules {list(rules)} of config.training.trainable leave nothing to train; mark a pattern True."
        )
    return unflatten(sides[True]), unflatten(sides[False])


def merge(trained: Params, others: Params) -> Params:
    """Parameters as the networks take them: `trained`, completed by what only `others` has."""
    return unflatten({**flatten(others), **flatten(trained)})
