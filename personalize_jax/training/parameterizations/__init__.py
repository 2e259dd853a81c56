"""Which parameters are trained and how they act: in full, as rows of an embedding, or as low-rank adapters.

Each way is in a file of its own, and all go together: what is trained is {"denoiser": ..., "text_encoder": ..., "rows":
..., "lora": ...}, the parameters that are trained in full under their networks' names, and all else under its way's.
"""

from collections.abc import Callable
from typing import NamedTuple

from jax import Array
from ml_collections import ConfigDict

from personalize_jax.models.params import Params, flatten, unflatten
from personalize_jax.runtime.errors import UserError
from personalize_jax.training.parameterizations.base import Chosen, Identifier, Networks
from personalize_jax.training.parameterizations.full import FULL
from personalize_jax.training.parameterizations.lora import LORA
from personalize_jax.training.parameterizations.rows import ROWS

# In the order in which they act: adapters, beside layers, are the last.
PARAMETERIZATIONS = {how.name: how for how in (FULL, ROWS, LORA)}


class Selection(NamedTuple):
    """What a training changes, and what it leaves.

    Attributes:
        chosen: what each parameterization trains, by its name; without those that train nothing.
        frozen: the parameters that are not trained in full.
    """

    chosen: dict[str, Chosen]
    frozen: Params

    @property
    def networks(self) -> set[str]:
        """Names of the networks that change."""
        return {path.partition("/")[0] for chosen in self.chosen.values() for path in chosen}


def select(params: Params, config: ConfigDict) -> Selection:
    """Tell what a configuration trains.

    Args:
        params: arrays or shapes of all parameters, such as {"denoiser": ..., "text_encoder": ...}.
        config: keys of `configs.common.training()`.

    Raises:
        UserError: rules or targets do not fit the parameters, train one in two ways, or leave nothing to train.
    """
    flat = flatten(params)
    chosen = {name: how.select(flat, config) for name, how in PARAMETERIZATIONS.items()}
    chosen = {name: paths for name, paths in chosen.items() if paths}
    if not chosen:
        raise UserError(
            f"The rules {list(config.trainable)} of config.training.trainable leave nothing to train; "
            "mark a pattern True."
        )
    _check_once(chosen)
    return Selection(chosen, unflatten({path: flat[path] for path in flat if path not in chosen.get(FULL.name, ())}))


def start(selection: Selection, read: Callable[[str], Params]) -> dict[str, dict[str, Array]]:
    """The pretrained values that `init` needs.

    Args:
        selection: from `select`.
        read: gives the float32 parameters of a network by name; called for those alone whose values are needed.

    Returns:
        By the name of a parameterization, values by path.
    """
    chosen = {name: paths for name, paths in selection.chosen.items() if PARAMETERIZATIONS[name].starts_from_values}
    networks = {path.partition("/")[0] for paths in chosen.values() for path in paths}
    params = flatten({name: read(name) for name in networks})
    return {name: {path: params[path] for path in paths} for name, paths in chosen.items()}


def init(
    selection: Selection, values: dict[str, dict[str, Array]], identifier: Identifier | None, key: Array
) -> Params:
    """What is trained, before the first step; traceable.

    Args:
        selection: from `select`.
        values: from `start`.
        identifier: from `needed_identifier`.
        key: for adapters; used here alone.
    """
    trained = {
        name: PARAMETERIZATIONS[name].init(values.get(name, {}), paths, identifier, key)
        for name, paths in selection.chosen.items()
    }
    return {**trained.pop(FULL.name, {}), **trained}


def needed_identifier(selection: Selection, identifier: Identifier | None) -> Identifier | None:
    """The identifier, if something of its tokens is trained.

    Raises:
        UserError: there is none.
    """
    if not any(PARAMETERIZATIONS[name].needs_identifier for name in selection.chosen):
        return None
    if identifier is None:
        raise UserError("The rows of an identifier are to be trained where there is none; give True or False instead.")
    return identifier


def apply(trained: Params, others: Params, token_ids: Array | None = None) -> Networks:
    """The networks as a train step runs and differentiates them; traceable.

    Args:
        trained: as `init` gives it.
        others: the parameters that are not trained in full.
        token_ids: int32 [n], the identifier's tokens, where something of them is trained.

    Raises:
        UserError: what is trained is not of these networks.
    """
    for name, part in _parts(trained).items():
        others = PARAMETERIZATIONS[name].apply(others, part, token_ids)
    return others


def export(trained: Params, others: Params, token_ids: Array | None = None) -> Params:
    """The networks as plain parameters, to sample from and to save; traceable. The arguments are those of `apply`."""
    for name, part in _parts(trained).items():
        others = PARAMETERIZATIONS[name].export(others, part, token_ids)
    return others


def networks(trained: Params) -> list[str]:
    """Names of the networks that trained parameters belong to."""
    return sorted({name for part in _parts(trained).values() for name in part})


def of_network(trained: Params, name: str) -> Params:
    """The trained parameters of one network alone, laid out alike."""
    parts = {way: {name: part[name]} for way, part in _parts(trained).items() if name in part}
    return parts.pop(FULL.name, {}) | parts


def _parts(trained: Params) -> dict[str, Params]:
    """What each parameterization trains, in the order in which they act."""
    beside = {name: trained[name] for name in PARAMETERIZATIONS if name in trained}
    return {FULL.name: {name: network for name, network in trained.items() if name not in beside}, **beside}


def _check_once(chosen: dict[str, Chosen]) -> None:
    seen: dict[str, str] = {}
    for name, paths in chosen.items():
        keys = PARAMETERIZATIONS[name].keys
        if twice := next((path for path in paths if path in seen), None):
            raise UserError(
                f"Parameter {twice!r} is chosen by {seen[twice]} and by {keys} of config.training; choose one: the "
                "rules (('.*', False),) of trainable train adapters alone."
            )
        seen |= dict.fromkeys(paths, keys)
