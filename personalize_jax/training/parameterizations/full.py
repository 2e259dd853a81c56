"""Parameters that are trained themselves."""

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict

from personalize_jax.models.params import Params, flatten, unflatten
from personalize_jax.training.parameterizations.base import Chosen, Identifier, Parameterization, matching


def select(params: Mapping[str, Array], config: ConfigDict) -> Chosen:
    """The parameters whose rule says True."""
    return matching(params, config.trainable, True)


def init(values: Mapping[str, Array], chosen: Chosen, identifier: Identifier | None, key: Array) -> Params:
    """Copies of the pretrained values: a train step donates its state, and the caller keeps what is pretrained."""
    return unflatten({path: jnp.copy(values[path]) for path in chosen})


def apply(networks: Params, trained: Params, token_ids: Array | None) -> Params:
    """The networks with trained parameters in place of theirs, or beside those that they have."""
    return unflatten({**flatten(networks), **flatten(trained)})


FULL = Parameterization("full", "trainable", True, False, select, init, apply, export=apply)
