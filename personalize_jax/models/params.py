"""Parameters of networks as nested dicts, and by their paths."""

from collections.abc import Mapping
from typing import Any

from flax import traverse_util

Params = Mapping[str, Any]  # of arrays, or of their shapes or shardings


def flatten(params: Params) -> dict[str, Any]:
    """Leaves by slash-separated path."""
    return traverse_util.flatten_dict(dict(params), sep="/")


def unflatten(flat: Mapping[str, Any]) -> Params:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(flat), sep="/")
