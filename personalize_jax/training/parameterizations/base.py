"""The protocol of a parameterization, and the rules that say which parameters are trained."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jax import Array
from ml_collections import ConfigDict

from personalize_jax.models.adapters import Adapted
from personalize_jax.models.params import Params
from personalize_jax.runtime.errors import UserError

Rule = tuple[str, bool | Literal["identifier"]]  # a pattern for paths, and what is trained there, see `matching`
Chosen = Mapping[str, Any]  # by slash-separated path of a parameter, what `init` needs for it
Networks = Mapping[str, Params | Adapted]  # by name, such as {"denoiser": ..., "text_encoder": ...}


class Identifier(NamedTuple):
    """The tokens of an identifier whose rows are trained.

    Attributes:
        token_ids: int32 [n], each token once.
        start_ids: int32 [n, k]; each token's row starts from the mean of the rows of these k tokens.
    """

    token_ids: Array | np.ndarray
    start_ids: Array | np.ndarray


class Parameterization(NamedTuple):
    """A way to train parameters.

    Attributes:
        name: the key of its arrays in the tree of trained parameters.
        keys: the keys of `configs.common.training()` that choose its parameters, as error messages name them.
        starts_from_values: whether `init` needs the pretrained values of the chosen parameters.
        needs_identifier: whether it trains rows of the identifier's tokens.
        select: (arrays or shapes of all parameters by path, config) -> the chosen ones. It raises UserError where the
            configuration does not fit the parameters.
        init: (pretrained values by path, the chosen parameters, identifier, key) -> the arrays to train, nested by
            path; traceable.
        apply: (networks, trained arrays, token ids of the identifier) -> the networks as a train step runs and
            differentiates them; traceable.
        export: the same -> the networks as plain parameters, to sample from and to save; traceable.
    """

    name: str
    keys: str
    starts_from_values: bool
    needs_identifier: bool
    select: Callable[[Mapping[str, Array], ConfigDict], Chosen]
    init: Callable[[Mapping[str, Array], Chosen, Identifier | None, Array], Params]
    apply: Callable[[Params, Params, Array | None], Networks]
    export: Callable[[Params, Params, Array | None], Params]


def matching(params: Mapping[str, Array], rules: Sequence[Rule], answer: bool | str) -> dict[str, Array]:
    """The parameters for which the rules give one answer.

    Args:
        params: parameters by path.
        rules: pairs of a regular expression and an answer: True to train the whole parameter, False to train nothing,
            "identifier" to train the rows of the identifier's tokens. The first pattern that matches the beginning of a
            path decides.
        answer: the answer of the wanted parameters.

    Raises:
        UserError: a path matches no rule, or a rule has none of these answers.
    """
    if wrong := [trained for _, trained in rules if trained not in (True, False, "identifier")]:
        raise UserError(f'A rule of config.training.trainable says {wrong[0]!r}; give True, False or "identifier".')
    found = {}
    for path, value in params.items():
        trained = next((trained for pattern, trained in rules if re.match(pattern, path)), None)
        if trained is None:
            raise UserError(f"Parameter {path!r} matches no rule of config.training.trainable; add one, such as '.*'.")
        if trained == answer:
            found[path] = value
    return found
