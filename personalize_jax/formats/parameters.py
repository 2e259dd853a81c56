"""Parameters of one network in a safetensors file, under their own slash-separated paths."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from personalize_jax.models.params import Params, flatten, unflatten
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import replacing


def load_params(file: Path) -> Params:
    """Parameters of one network as a nested dict of float32 arrays.

    Raises:
        UserError: the file is cut short or no safetensors file.
    """
    try:
        flat = load_file(file)
    except Exception as error:  # safetensors raises its own, undocumented kinds
        raise UserError(
            f"{file} cannot be read as safetensors ({error}); restore the file or write it again."
        ) from error
    # Converted here: on a device that takes a program for every shape, seconds to compile whenever a command starts.
    return unflatten(jax.device_put({k: np.asarray(v, np.float32) for k, v in flat.items()}))


def save_params(params: Params, file: Path, dtype: Any = jnp.float32) -> None:
    """Write parameters under their slash-separated paths.

    Raises:
        UserError: the file cannot be written.
    """
    flat = flatten(jax.tree.map(lambda a: np.asarray(a, dtype, order="C"), params))  # as files hold them
    with replacing(file, apart=True) as temporary:
        try:
            save_file(flat, temporary)
        except SafetensorError as error:
            raise UserError(f"{file} cannot be written ({error}); check free space and permissions.") from error
