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
        shape: sizes of data, fsdp and tensor. One of them may be -1, for all devices that the others leave; if fsdp and
            tensor both are, fsdp is as large as the batch can be split, and tensor takes the rest.
        batch_size: pictures of a group that go through a network at once.
        devices: the devices; by default all of this program.

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

    The same rules serve parameters, EMA and optimiser moments, since patterns are searched anywhere in a path. A
    dimension that its mesh axis does not divide is not sharded.

    Args:
        tree: pytree of arrays or shapes.
        rules: (regular expression, axis names from the *last* dimension backwards); the first that is found decides.
        mesh: the mesh.

    Raises:
        UserError: a leaf of two or more dimensions matches no rule.
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
    """Arrays placed as `shardings` says; shapes are given these shardings."""
    return jax.tree.map(_place, tree, shardings(tree, rules, mesh))


def split(tree: Any, mesh: Mesh) -> Any:
    """Arrays split along their first dimension as batches are, where its size allows, else replicated.

    Shapes are given these shardings.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    return jax.tree.map(lambda leaf: _place(leaf, NamedSharding(mesh, P() if leaf.shape[0] % parts else BATCH)), tree)


def _place(leaf: Any, target: NamedSharding) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=target)
    return hosts.device_put(leaf, target)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays that are whole on every device."""
    return NamedSharding(mesh, P())


def gathered(params: Any, rules: Sequence[tuple[str, Sequence[str | None]]], mesh: Mesh) -> Any:
    """Gather parameters over the axis fsdp, for a network to use; traceable.

    Left to itself, XLA may split a convolution's sums over fsdp instead, and then its gradients are wrong where a batch
    is split over both data and fsdp, and features over tensor (jax 0.10.2). Gradients are sharded like the parameters,
    so that each device sums up its own part only.

    Args:
        params: parameters, sharded as `shardings` says by the same rules.
        rules: see `shardings`.
        mesh: the mesh.
    """
    if mesh.shape["fsdp"] == 1:
        return params
    sharded = shardings(params, rules, mesh)
    whole = shardings(params, [(p, [None if axis == "fsdp" else axis for axis in axes]) for p, axes in rules], mesh)
    # Leaf by leaf, so that frozen parameters get no gradients beside others that are differentiated.
    return jax.tree.map(_gather, params, sharded, whole)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: Array, sharded: NamedSharding, whole: NamedSharding) -> Array:
    return jax.lax.with_sharding_constraint(x, whole)


_gather.defvjp(
    lambda x, sharded, whole: (_gather(x, sharded, whole), None),
    lambda sharded, whole, _, gradient: (jax.lax.with_sharding_constraint(gradient, sharded),),
)


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """Constrain every array of a batch to be sharded along its first axis; traceable."""
    return jax.lax.with_sharding_constraint(batch, NamedSharding(mesh, BATCH))
