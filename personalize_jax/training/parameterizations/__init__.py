"""Which parameters are trained and how they act: in full, as rows of an embedding, or as low-rank adapters.

Each parameterization is a file here. All that a training trains is one tree, {"denoiser": ..., "text_encoder": ...,
"rows": ..., "lora": ...}: parameters trained in full stand under the names of their networks, and all others under the
name of their parameterization.
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
PARAMETERIZATIONS = {parameterization.name: parameterization for parameterization in (FULL, ROWS, LORA)}


class Selection(NamedTuple):
    """The parameters that a training changes, and those that it leaves.

    Attributes:
        chosen: the parameters that each parameterization trains, by its name; without those that train nothing.
        frozen: the parameters that are not trained in full.
    """

    chosen: dict[str, Chosen]
    frozen: Params

    @property
    def networks(self) -> set[str]:
        """Names of the networks that change."""
        return {path.partition("/")[0] for chosen in self.chosen.values() for path in chosen}


def select(params: Params, config: ConfigDict) -> Selection:
    """Select the parameters that a configuration trains.

    Args:
        params: arrays or shapes of all parameters, such as {"denoiser": ..., "text_encoder": ...}.
        config: keys of `configs.common.training()`.

    Raises:
        UserError: rules or targets do not fit the parameters, train one in two ways, or leave nothing to train.
    """
    flat = flatten(params)
    chosen = {name: each.select(flat, config) for name, each in PARAMETERIZATIONS.items()}
    chosen = {name: paths for name, paths in chosen.items() if paths}
    if not chosen:
        raise UserError(
            f"The rules {list(config.trainable)} of config.training.trainable leave nothing to train; "
            "mark a pattern True."
        )
    _check_once(chosen)
    return Selection(chosen, unflatten({path: flat[path] for path in flat if path not in chosen.get(FULL.name, ())}))


def needed_identifier(selection: Selection, identifier: Identifier | None) -> Identifier | None:
    """The identifier if its tokens are trained, and otherwise None.

    Raises:
        UserError: its tokens are to be trained, and there is none.
    """
    if not any(PARAMETERIZATIONS[name].needs_identifier for name in selection.chosen):
        return None
    if identifier is None:
        raise UserError(
            'A rule of config.training.trainable says "identifier", but there is no subject here; give True or False.'
        )
    return identifier


def pretrained_values(selection: Selection, read: Callable[[str], Params]) -> dict[str, dict[str, Array]]:
    """The pretrained values that `init` needs, by the name of a parameterization and by path.

    Args:
        selection: from `select`.
        read: reads the float32 parameters of a network by its name; called only for networks that are needed.
    """
    chosen = {name: paths for name, paths in selection.chosen.items() if PARAMETERIZATIONS[name].starts_from_values}
    networks = {path.partition("/")[0] for paths in chosen.values() for path in paths}
    params = flatten({name: read(name) for name in networks})
    return {name: {path: params[path] for path in paths} for name, paths in chosen.items()}


def init(
    selection: Selection, values: dict[str, dict[str, Array]], identifier: Identifier | None, key: Array
) -> Params:
    """The trained parameters before the first step; traceable.

    Args:
        selection: from `select`.
        values: from `pretrained_values`.
        identifier: from `needed_identifier`.
        key: random key of adapters, used here alone.
    """
    trained = {
        name: PARAMETERIZATIONS[name].init(values.get(name, {}), paths, identifier, key)
        for name, paths in selection.chosen.items()
    }
    return {**trained.pop(FULL.name, {}), **trained}


def apply(trained: Params, others: Params, token_ids: Array | None = None) -> Networks:
    """The networks as a train step runs and differentiates them; traceable.

    Args:
        trained: the trained parameters, laid out as by `init`.
        others: the parameters that are not trained in full.
        token_ids: int32 [n], the identifier's tokens, where their rows are trained.

    Raises:
        UserError: the trained parameters are not those of these networks.
    """
    for name, part in _parts(trained).items():
        others = PARAMETERIZATIONS[name].apply(others, part, token_ids)
    return others


def export(trained: Params, others: Params, token_ids: Array | None = None) -> Params:
    """The networks as plain parameters, to sample from and to save; traceable. The arguments are those of `apply`."""
    for name, part in _parts(trained).items():
        others = PARAMETERIZATIONS[name].export(others, part, token_ids)
    return others


def trained_networks(trained: Params) -> list[str]:
    """Names of the networks that trained parameters belong to."""
    return sorted({name for part in _parts(trained).values() for name in part})


def part_of_network(trained: Params, network: str) -> Params:
    """The trained parameters of one network alone, in the same layout."""
    parts = {name: {network: part[network]} for name, part in _parts(trained).items() if network in part}
    return parts.pop(FULL.name, {}) | parts


def _parts(trained: Params) -> dict[str, Params]:
    """The trained parameters of each parameterization by its name, in the order in which they act."""
    beside = {name: trained[name] for name in PARAMETERIZATIONS if name in trained}
    return {FULL.name: {name: network for name, network in trained.items() if name not in beside}, **beside}


def _check_once(chosen: dict[str, Chosen]) -> None:
    """Refuse a parameter that two parameterizations train."""
    seen: dict[str, str] = {}
    for name, paths in chosen.items():
        keys = PARAMETERIZATIONS[name].keys
        if twice := next((path for path in paths if path in seen), None):
            raise UserError(
                f"Parameter {twice!r} is chosen by {seen[twice]} and by {keys} of config.training; choose one: the "
                "rules (('.*', False),) of trainable train adapters alone."
            )
        seen |= dict.fromkeys(paths, keys)
