"""Low-rank adapters on disk, as diffusers' `load_lora_weights` reads them for its U-Nets and CLIP text encoders.

A kernel W + down up is stored under its layer's name in PyTorch: `unet.<layer>.lora_A.weight` is down, [r, in] or for a
convolution [r, in, k, k], and `.lora_B.weight` is up, [out, r] or [out, r, 1, 1]. Without an alpha in the file
diffusers takes alpha = r, which is the scale of 1 that adapters have here.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
from jax import Array
from safetensors import safe_open

from personalize_jax.formats.parameters import load_params, save_params
from personalize_jax.formats.port_weights import Network, torch_names
from personalize_jax.models.params import Params, flatten, unflatten
from personalize_jax.runtime.errors import UserError

FILE = "pytorch_lora_weights.safetensors"
# By the name that a training has for a network: the prefix of its layers in the file, and how its tensors are named.
Networks = Mapping[str, tuple[str, Network]]


def save_lora(adapters: Params, folder: Path, networks: Networks) -> None:
    """Write adapters to `pytorch_lora_weights.safetensors`, to a temporary name first.

    Args:
        adapters: by network, such as {"denoiser": ..., "text_encoder": ...}, as `parameterizations.lora` trains them.
        folder: made if missing.
        networks: those that there may be.

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


def load_lora(folder: Path, networks: Networks) -> Params:
    """The adapters in a folder's `pytorch_lora_weights.safetensors`, from here or from diffusers' training scripts.

    Args:
        folder: with the file.
        networks: those that there may be.

    Returns:
        Adapters by network, such as {"denoiser": ..., "text_encoder": ...}, for `parameterizations.lora.export`.

    Raises:
        UserError: no such file, tensors of another kind, or an alpha that is not the rank.
    """
    file = folder / FILE
    if not file.is_file():
        raise UserError(f"No {FILE} in {folder}; give a folder with adapters.")
    stored = load_params(file)
    prefixes = {prefix: name for name, (prefix, _) in networks.items()}
    _check_scale(file, prefixes)
    names = {key.removesuffix(".lora_A.weight") for key in stored if key.endswith(".lora_A.weight")}
    expected = {f"{name}.{factor}.weight" for name in names for factor in ("lora_A", "lora_B")}
    expected = {key for key in expected if key.partition(".")[0] in prefixes}
    if strange := sorted(stored.keys() ^ expected):
        raise UserError(
            f"{strange[0]!r} is missing from {file}, or has no place in it; "
            "give adapters stored as pairs of unet.<layer>.lora_A.weight and unet.<layer>.lora_B.weight."
        )
    adapters = {}
    for name in names:
        down, up = _from_torch(stored[f"{name}.lora_A.weight"], stored[f"{name}.lora_B.weight"])
        path = _path(name, prefixes)
        adapters |= {f"{path}/down": down, f"{path}/up": up}
    return unflatten(adapters)


def _torch_name(path: str, networks: Networks) -> str:
    """denoiser/down_blocks_0/.../to_q/kernel as unet.down_blocks.0....to_q."""
    name, _, layer = path.partition("/")
    prefix, network = networks[name]
    return f"{prefix}.{torch_names(layer, network)[0].removesuffix('.weight')}"


def _path(torch_name: str, prefixes: Mapping[str, str]) -> str:
    """The inverse of `_torch_name`."""
    prefix, _, layers = torch_name.partition(".")
    layers = re.sub(r"\.(\d+)\b", r"_\1", layers).replace(".", "/")
    return f"{prefixes[prefix]}/{layers}/kernel"


def _check_scale(file: Path, prefixes: Mapping[str, str]) -> None:
    """Refuse a file whose metadata, which diffusers' scripts write, asks for another scale than 1."""
    with safe_open(file, "numpy") as opened:
        metadata = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    for prefix in prefixes:
        alpha, rank = (metadata.get(f"{prefix}.{name}") for name in ("lora_alpha", "r"))
        if alpha != rank or any(metadata.get(f"{prefix}.{name}") for name in ("alpha_pattern", "use_rslora")):
            raise UserError(f"{file} scales its adapters of {prefix}; give adapters whose lora_alpha is their rank.")


def _to_torch(down: Array, up: Array) -> tuple[Array, Array]:
    """[in, r] and [r, out] to [r, in] and [out, r]; [k, k, in, r] and [r, out] to [r, in, k, k] and [out, r, 1, 1]."""
    if down.ndim == 4:
        return jnp.transpose(down, (3, 2, 0, 1)), up.T[:, :, None, None]
    return down.T, up.T


def _from_torch(a: Array, b: Array) -> tuple[Array, Array]:
    """The inverse of `_to_torch`."""
    if a.ndim == 4:
        return jnp.transpose(a, (2, 3, 1, 0)), b[:, :, 0, 0].T
    return a.T, b.T
