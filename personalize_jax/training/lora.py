r"""Low-rank adapters: frozen kernels W are used as W + down up, and only down and up are trained.

Hu et al. 2021, "LoRA", eq. 3, with alpha = r, so that nothing scales the product. Networks know nothing of it. The
adapters of {"denoiser": {"to_q": {"kernel": W}}} are {"denoiser": {"to_q": {"kernel": {"down": ..., "up": ...}}}}. A
kernel of several input or output dimensions has factors of as many: with W [h, w, I, O], down is [h, w, I, r] and up is
[r, O], so that a tensor product gives W's shape.
"""

import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from personalize_jax.errors import UserError
from personalize_jax.models.params import Params, flatten, unflatten


def adapted_kernels(params: Params, rank: int, targets: Sequence[tuple[str, int]]) -> dict[str, int]:
    """Which kernels get adapters.

    Args:
        params: nested dict of all parameters, such as {"denoiser": ..., "text_encoder": ...}.
        rank: r; 0 switches adapters off.
        targets: (regular expression, number of a kernel's input dimensions) pairs; the first that matches a whole path
            decides.

    Returns:
        Number of input dimensions by slash-separated path.

    Raises:
        UserError: a target that no path matches, or that matches parameters without so many dimensions.
    """
    if rank < 0:
        raise UserError(f"lora.rank is {rank}; give a positive rank, or 0 to train without adapters.")
    if rank == 0:
        return {}
    ndims = {path: value.ndim for path, value in flatten(params).items()}
    found: dict[str, int] = {}
    for pattern, input_dims in targets:
        matches = [path for path in ndims if re.fullmatch(pattern, path)]
        if not matches:
            raise UserError(
                f"The target {pattern!r} of lora.targets matches no parameter; "
                f"give a pattern for whole paths such as {next(iter(ndims))!r}."
            )
        for path in matches:
            if not 0 < input_dims < ndims[path]:
                raise UserError(
                    f"The target {pattern!r} of lora.targets gives {path!r} {input_dims} input dimensions of "
                    f"{ndims[path]} altogether; match kernels only, and leave an input and an output dimension each."
                )
            found.setdefault(path, input_dims)
    return found


def init_adapters(params: Params, adapted: Mapping[str, int], rank: int, key: Array) -> Params:
    """Adapters that do not change their kernels yet; traceable.

    down is normal with a deviation of 1 / r and up is zero, as peft's `init_lora_weights="gaussian"`, with which
    diffusers' DreamBooth trains.

    Args:
        params: the kernels, or their shapes.
        adapted: from `adapted_kernels`.
        rank: r.
        key: used here alone.
    """
    flat, factors = flatten(params), {}
    for (path, input_dims), k in zip(sorted(adapted.items()), jax.random.split(key, len(adapted)), strict=True):
        shape = flat[path].shape
        factors[f"{path}/down"] = jax.random.normal(k, (*shape[:input_dims], rank)) / rank
        factors[f"{path}/up"] = jnp.zeros((rank, *shape[input_dims:]))
    return unflatten(factors)


def apply_adapters(params: Params, adapters: Params) -> Params:
    """The parameters with W + down up in place of every adapted W; traceable.

    Raises:
        UserError: an adapter whose kernel the parameters lack, or have in another shape.
    """
    flat, factors = dict(flatten(params)), flatten(adapters)
    for path in (key.removesuffix("/down") for key in factors if key.endswith("/down")):
        change = jnp.tensordot(factors[f"{path}/down"], factors[f"{path}/up"], axes=1)
        if path not in flat or flat[path].shape != change.shape:
            found = f"of {flat[path].shape}" if path in flat else "missing"
            raise UserError(
                f"The adapter of {path!r} is for a kernel of {change.shape}, which is {found} here; "
                "give adapters that were trained for this network."
            )
        flat[path] = flat[path] + change
    return unflatten(flat)
