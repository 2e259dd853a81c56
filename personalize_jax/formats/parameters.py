"""Parameters in a safetensors file, under their own slash-separated paths."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from personalize_jax.models.params import Params, flatten, unflatten
from personalize_jax.runtime import hosts
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import replacing

_METADATA = "personalize_jax"  # the entry that has all text beside the parameters, as JSON


def load_params(file: Path, place: Callable[[Params], Params] | None = None) -> Params:
    """Parameters as a nested dict of float32 arrays, read one by one.

    Args:
        file: a file of `save_params`.
        place: maps a tree of shapes to a tree of shardings for them; None for the default device.

    Raises:
        UserError: the file is cut short or no safetensors file.
    """
    with _opened(file) as tensors:
        paths = tensors.keys()
        shapes = {k: jax.ShapeDtypeStruct(tensors.get_slice(k).get_shape(), jnp.float32) for k in paths}
        shardings = {} if place is None else flatten(place(unflatten(shapes)))
        # Converted here: a device takes a program for every shape, seconds to compile whenever a command starts.
        read = ((path, np.asarray(tensors.get_tensor(path), np.float32)) for path in shapes)
        return unflatten({path: hosts.device_put(value, shardings.get(path)) for path, value in read})


def read_metadata(file: Path) -> dict[str, str]:
    """What `save_params` was given beside the parameters.

    Raises:
        UserError: the file is cut short or no safetensors file.
    """
    with _opened(file) as tensors:
        entries = tensors.metadata() or {}
    return json.loads(entries[_METADATA]) if _METADATA in entries else entries


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="numpy") as tensors:
            yield tensors
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{file} cannot be read as safetensors ({error}); restore the file or write it again."
        ) from error


def save_params(
    params: Params, file: Path, dtype: DTypeLike = jnp.float32, metadata: Mapping[str, str] | None = None
) -> None:
    """Write parameters under their slash-separated paths, and text beside them; the same bytes whenever called.

    Raises:
        UserError: the file cannot be written.
    """
    flat = flatten(jax.tree.map(lambda a: np.asarray(a, dtype, order="C"), params))  # as files hold them
    # One entry, because the format's library writes several in a random order.
    entries = None if metadata is None else {_METADATA: json.dumps(dict(metadata), sort_keys=True)}
    with replacing(file, own_folder=True) as temporary:
        try:
            save_file(flat, temporary, entries)
        except SafetensorError as error:
            raise UserError(f"{file} cannot be written ({error}); check free space and permissions.") from error
