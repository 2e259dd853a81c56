"""Where arrays live: a named mesh (data, fsdp, tensor) and rules from parameter paths to PartitionSpecs."""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from personalize_jax.runtime import hosts
from personalize_jax.runtime.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))


def make_mesh(shape: Sequence[int], batch_size: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over this program's devices.

    Args:
        shape: sizes of data, fsdp and tensor. One of them may be -1 for "what remains"; or fsdp and tensor both, and
            then fsdp is as large as the batch can be split and tensor takes the rest.
        batch_size: pictures of a group that go through a network at once.
        devices: others than this program's.

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    found = np.array(jax.devices() if devices is None else devices)
    data, fsdp, tensor = shape
    if fsdp == tensor == -1 and data > 0:
        fsdp = math.gcd(batch_size // math.gcd(batch_size, data), found.size // data)
    try:
        grid = found.reshape(data, fsdp, tensor)
    except ValueError as error:
        raise UserError(
            f"config.mesh is {tuple(shape)} and there are {found.size} devices; "
            "give sizes of (data, fsdp, tensor) that multiply to that number, -1 for what remains."
        ) from error
    return Mesh(grid, AXES)


def shardings(tree: Any, rules: Sequence[tuple[str, Sequence[str | None]]], mesh: Mesh) -> Any:
    """A NamedSharding for every leaf.

    The same rules serve parameters, EMA and optimiser moments, since a path is searched, not matched from its start. A
    dimension that its mesh axis does not divide stays whole.

    Args:
        tree: pytree of arrays or shapes.
        rules: (regular expression, axis names from the *last* dimension backwards); the first found decides.
        mesh: the mesh.

    Raises:
        UserError: a leaf with two dimensions or more that no rule matches.
    """

    def place(path: tuple, leaf: Any) -> NamedSharding:
        if leaf.ndim < 2:
            return NamedSharding(mesh, P())
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        axes = next((axes for pattern, axes in rules if re.search(pattern, name)), None)
        if axes is None:
            raise UserError(f"Parameter {name!r} matches no rule of config.sharding; add one, such as ('.*', ()).")
        spec: list[str | None] = [None] * leaf.ndim
        for dimension, axis in zip(range(leaf.ndim - 1, -1, -1), axes, strict=False):
            if axis is not None and leaf.shape[dimension] % mesh.shape[axis] == 0:
                spec[dimension] = axis
        return NamedSharding(mesh, P(*spec))

    return jax.tree_util.tree_map_with_path(place, tree)


def placed(tree: Any, rules: Sequence[tuple[str, Sequence[str | None]]], mesh: Mesh) -> Any:
    """Arrays where `shardings` puts them; of shapes, shapes that say so."""

    def place(leaf: Any, target: NamedSharding) -> Any:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=target)
        return hosts.device_put(leaf, target)

    return jax.tree.map(place, tree, shardings(tree, rules, mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, P())


def gathered(params: Any, rules: Sequence[tuple[str, Sequence[str | None]]], mesh: Mesh) -> Any:
    """Parameters whole over fsdp, as a network uses them; traceable.

    Stored in parts, used whole: left to itself XLA may split a convolution's sums over fsdp instead, and then its
    gradients are wrong where a batch is split over data and fsdp both and features over tensor (jax 0.10.2). Their
    gradients lie as the parameters do, so that devices add up their own parts only and none holds them all.

    Args:
        params: parameters that lie as `shardings` with the same rules puts them.
        rules: see `shardings`.
        mesh: the mesh.
    """
    if mesh.shape["fsdp"] == 1:
        return params
    in_parts = shardings(params, rules, mesh)
    whole = shardings(params, [(p, [None if axis == "fsdp" else axis for axis in axes]) for p, axes in rules], mesh)
    # Each by itself, so that frozen ones get no gradients beside others that are differentiated.
    return jax.tree.map(_gather, params, in_parts, whole)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: Array, in_parts: NamedSharding, whole: NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(x, whole)


_gather.defvjp(
    lambda x, in_parts, whole: (_gather(x, in_parts, whole), None),
    lambda in_parts, whole, _, gradient: (jax.lax.with_sharding_constraint(gradient, in_parts),),
)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Constrain every array of a batch to be split by its first axis; traceable."""
    return jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, BATCH))
