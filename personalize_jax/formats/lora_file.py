"""Low-rank adapters on disk, as diffusers' `load_lora_weights` reads them for its U-Nets and CLIP text encoders.

A kernel W + down up is stored under its layer's name in PyTorch: `unet.<layer>.lora_A.weight` is down, [r, in] or for a
convolution [r, in, k, k], and `.lora_B.weight` is up, [out, r] or [out, r, 1, 1]. Without an alpha in the file
diffusers takes alpha = r, which is the scale of 1 that adapters have here.
"""

from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
from jax import Array

from personalize_jax.formats.parameters import save_params
from personalize_jax.formats.port_weights import Naming, torch_names
from personalize_jax.models.params import Params, flatten
from personalize_jax.runtime.errors import UserError

FILE = "pytorch_lora_weights.safetensors"
# By a network's name in training: the prefix of its layers in the file, and the naming of its tensors.
Networks = Mapping[str, tuple[str, Naming]]


def save_lora(adapters: Params, folder: Path, networks: Networks) -> None:
    """Write adapters to `pytorch_lora_weights.safetensors`, to a temporary name first.

    Args:
        adapters: adapters by network, such as {"denoiser": ..., "text_encoder": ...}, see `models.adapters.Adapted`.
        folder: made if missing.
        networks: the networks that may have adapters.

    Raises:
        UserError: a kernel is neither a linear layer's nor a convolution's, or the file cannot be written.
    """
    flat, stored = flatten(adapters), {}
    for path in (key.removesuffix("/down") for key in flat if key.endswith("/down")):
        down, up = flat[f"{path}/down"], flat[f"{path}/up"]
        if down.ndim not in (2, 4) or up.ndim != 2:
            raise UserError(
                f"The adapter of {path} has the shapes {down.shape} and {up.shape}, and diffusers reads those of "
                "linear layers and convolutions only; save the whole pipeline instead."
            )
        name = _torch_name(path, networks)
        stored[f"{name}.lora_A.weight"], stored[f"{name}.lora_B.weight"] = _to_torch(down, up)
    folder.mkdir(parents=True, exist_ok=True)
    save_params(stored, folder / FILE)


def _torch_name(path: str, networks: Networks) -> str:
    """denoiser/down_blocks_0/.../to_q/kernel as unet.down_blocks.0....to_q."""
    name, _, layer = path.partition("/")
    prefix, naming = networks[name]
    return f"{prefix}.{torch_names(layer, naming)[0].removesuffix('.weight')}"


def _to_torch(down: Array, up: Array) -> tuple[Array, Array]:
    """[in, r] and [r, out] to [r, in] and [out, r]; [k, k, in, r] and [r, out] to [r, in, k, k] and [out, r, 1, 1]."""
    if down.ndim == 4:
        return jnp.transpose(down, (3, 2, 0, 1)), up.T[:, :, None, None]
    return down.T, up.T
