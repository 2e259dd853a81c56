r"""Low-rank adapters of frozen kernels: of W + down up only down and up are trained.

Hu et al. 2021, "LoRA", eq. 3, with alpha = r, so that nothing scales the product. A train step runs them beside their
layers, see `models.adapters`; `export` adds the product to the kernels. The adapters of {"denoiser": {"to_q":
{"kernel": W}}} are {"denoiser": {"to_q": {"kernel": {"down": ..., "up": ...}}}}. Factors have the input and output
dimensions of their kernel: with W [h, w, I, O], down is [h, w, I, r] and up is [r, O], so that a tensor product gives
W's shape.
"""

import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array
from ml_collections import ConfigDict

from personalize_jax.models.adapters import Adapted
from personalize_jax.models.params import Params, flatten, unflatten
from personalize_jax.runtime.errors import UserError
from personalize_jax.training.parameterizations.base import Chosen, Identifier, Networks, Parameterization

# The possible numbers of input dimensions by a kernel's number of dimensions: for linear layers, for those whose inputs
# or outputs are heads, and for convolutions.
_INPUT_DIMS = {2: (1,), 3: (1, 2), 4: (3,)}


def select(params: Mapping[str, Array], config: ConfigDict) -> Chosen:
    """The kernels that lora.targets matches, each with the shapes of its factors down and up.

    A target is a regular expression and a number of input dimensions; the first one that matches a whole path decides.
    A rank of 0 switches adapters off.

    Raises:
        UserError: the rank is negative, no path matches a target, or a target matches other parameters than kernels
            with that number of input dimensions.
    """
    rank, found = config.lora.rank, {}
    if rank < 0:
        raise UserError(f"lora.rank is {rank}; give a positive rank, or 0 to train without adapters.")
    for pattern, input_dims in config.lora.targets if rank else ():
        matches = [path for path in params if re.fullmatch(pattern, path)]
        if not matches:
            raise UserError(
                f"The target {pattern!r} of lora.targets matches no parameter; "
                f"give a pattern for whole paths such as {next(iter(params))!r}."
            )
        for path in (path for path in matches if path not in found):
            shape, bias = params[path].shape, params.get(path.removesuffix("kernel") + "bias")
            possible = path.endswith("/kernel") and input_dims in _INPUT_DIMS.get(len(shape), ())
            if not possible or (bias is not None and bias.shape != shape[input_dims:]):
                raise UserError(
                    f"The target {pattern!r} of lora.targets gives {path!r} {input_dims} input dimensions of "
                    f"{len(shape)} altogether; match kernels only, and give 1 for linear layers, 2 for those that join "
                    "heads, 3 for convolutions."
                )
            found[path] = (*shape[:input_dims], rank), (rank, *shape[input_dims:])
    return found


def init(values: Mapping[str, Array], chosen: Chosen, identifier: Identifier | None, key: Array) -> Params:
    """Adapters that do not change their kernels yet.

    down is normal with a deviation of 1 / r and up is zero, as peft's `init_lora_weights="gaussian"`, with which
    diffusers' DreamBooth trains.
    """
    factors = {}
    for (path, (down, up)), k in zip(sorted(chosen.items()), jax.random.split(key, len(chosen)), strict=True):
        factors[f"{path}/down"] = jax.random.normal(k, down) / down[-1]
        factors[f"{path}/up"] = jnp.zeros(up)
    return unflatten(factors)


def apply(networks: Params, adapters: Params, token_ids: Array | None) -> Networks:
    """The networks with adapters beside their layers.

    Raises:
        UserError: the networks lack an adapter's kernel, or have it in another shape.
    """
    _check_kernels(networks, adapters)
    return {**networks, **{name: Adapted(networks[name], adapters[name]) for name in adapters}}


def export(networks: Params, adapters: Params, token_ids: Array | None) -> Params:
    """The networks with W + down up in place of every adapted W.

    Raises:
        UserError: the networks lack an adapter's kernel, or have it in another shape.
    """
    _check_kernels(networks, adapters)
    params = flatten(networks)
    for path, (down, up) in _pairs(adapters).items():
        params[path] = params[path] + jnp.tensordot(down, up, axes=1)
    return unflatten(params)


def _pairs(adapters: Params) -> dict[str, tuple[Array, Array]]:
    """Factors down and up by the path of their kernel."""
    flat = flatten(adapters)
    paths = (key.removesuffix("/down") for key in flat if key.endswith("/down"))
    return {path: (flat[f"{path}/down"], flat[f"{path}/up"]) for path in paths}


def _check_kernels(networks: Params, adapters: Params) -> None:
    kernels = flatten(networks)
    for path, (down, up) in _pairs(adapters).items():
        shape = (*down.shape[:-1], *up.shape[1:])
        if path not in kernels or kernels[path].shape != shape:
            found = f"of {kernels[path].shape}" if path in kernels else "missing"
            raise UserError(
                f"The adapter of {path!r} is for a kernel of {shape}, which is {found} here; "
                "give adapters that were trained for this network."
            )


LORA = Parameterization("lora", "lora.targets", False, False, select, init, apply, export)
