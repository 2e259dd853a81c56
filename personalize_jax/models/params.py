"""Parameters of networks as nested dicts, and by their paths."""

from collections.abc import Mapping
from typing import Any

from flax import traverse_util
from jax import Array

Params = Mapping[str, Any]


def flatten(params: Params) -> dict[str, Array]:
    """Arrays by slash-separated path."""
    return traverse_util.flatten_dict(dict(params), sep="/")


def unflatten(flat: Mapping[str, Array]) -> Params:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")
