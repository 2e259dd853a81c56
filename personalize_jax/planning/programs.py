"""The real programs of a run, compiled for devices that need not be there, and what they take of each."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from personalize_jax.families.objective import INSTANCE, PRIOR, groups_of
from personalize_jax.families.stage import Conditioning
from personalize_jax.pipeline import Pipeline, Sampling, Stage
from personalize_jax.pipeline.cascade import sample_pictures
from personalize_jax.planning import slices
from personalize_jax.planning.compiler import ask
from personalize_jax.planning.hlo import Collective
from personalize_jax.planning.slices import Topology
from personalize_jax.runtime import sharding
from personalize_jax.runtime.errors import UserError
from personalize_jax.training.examples import Examples
from personalize_jax.training.parameterizations.base import Identifier
from personalize_jax.training.program import mesh_of, stage_program

PHOTOS, CAPTIONS = 5, 3  # of a subject, and its captions with the empty one: too little to matter
# The compiler tells what the whole program takes, or early on what it needs beside its arguments.
_ALL_OF_MEMORY = re.compile(r"Used ([\d.]+)([KMGT]?) of")
_TEMPORARIES = re.compile(r"temporaries \(([\d.]+)([KMGT]?)\) exceeds")
Shape = jax.ShapeDtypeStruct


class Usage(NamedTuple):
    """What a program takes of each device, for one step.

    Attributes:
        memory: bytes by kind.
        flops: operations.
        bytes: read from memory and written to it.
        exchanges: what is sent between devices.
        rounds: how often the body of the program's loop runs in a step; what is counted above is once.
        compiled: whether there is a program: the compiler refuses what does not fit.
        seconds: of compiling, as far as this is known.
    """

    memory: dict[str, int]
    flops: float
    bytes: float
    exchanges: list[Collective]
    rounds: int
    compiled: bool
    seconds: float

    @property
    def total(self) -> int:
        """Bytes of memory altogether."""
        return sum(self.memory.values())

    def received(self, kind: str | None = None) -> float:
        """Bytes that a device receives from others in a step, of one kind of exchange or all."""
        return sum(
            e.received * (self.rounds if e.in_loop else 1) for e in self.exchanges if kind is None or e.kind == kind
        )


def train_step(
    pipeline: Pipeline, stage: Stage, config: ConfigDict, class_images: int, trains_text: bool, topology: Topology
) -> Usage:
    """One step of a stage's tuning, on its mesh.

    Args:
        pipeline: whose parameters are shapes.
        stage: one of its stages.
        config: of the training; one step is planned, however many are dispatched at once.
        class_images: their number.
        trains_text: whether captions are encoded in the step, rather than once.
        topology: the slice.

    Raises:
        UserError: the configuration does not fit the number of chips.
    """
    devices = slices.devices(topology)
    one = config.copy_and_resolve_references().unlock()
    one.steps_per_dispatch, one.num_steps = 1, max(1, config.num_steps)
    pretrained = pipeline.networks(stage.name)
    identifier = Identifier(np.ones((1,), np.int32), np.ones((1, 1), np.int32))  # which rules may ask for
    counts = {INSTANCE: PHOTOS, PRIOR: class_images}
    examples = {
        group.name: examples_of(pipeline, stage, counts[group.name], not trains_text) for group in groups_of(config)
    }
    program = stage_program(stage, pipeline.family, pretrained, examples, one, 0, identifier, devices=devices)
    memory = {
        "parameters": bytes_per_device(program.state.params),
        "optimizer": bytes_per_device(program.state.opt_state),
        "average": bytes_per_device(program.state.ema),
        "pretrained": bytes_per_device(resident(pipeline, one, program.mesh)),
        "examples": bytes_per_device(program.examples),
    }
    arguments = memory["parameters"] + memory["optimizer"] + memory["average"] + memory["examples"]
    arguments += bytes_per_device(program.frozen_params)
    return measured(program.lower(), memory, arguments, one.microbatches, devices)


def sampling_step(
    pipeline: Pipeline, stage: Stage, sampling: Sampling, batch_size: int, config: ConfigDict, topology: Topology
) -> Usage:
    """One step of drawing a batch of pictures from a stage, of `sampling.num_steps`.

    Args:
        pipeline: whose parameters are shapes.
        stage: one of its stages.
        sampling: how it is drawn.
        batch_size: pictures at once; filled up to a multiple of the devices.
        config: of a training, which says how parameters lie.
        topology: the slice.
    """
    devices = slices.devices(topology)
    B = batch_size + -batch_size % len(devices)
    mesh = Mesh(np.array(devices).ravel(), ("data",))
    over_devices = NamedSharding(mesh, P("data"))
    cond = conditioning(pipeline, B)
    side = stage.low_resolution
    low_res = None if side is None else Shape((B, side, side, 3), jnp.uint8)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), B))
    inputs = jax.tree.map(lambda a: Shape(a.shape, a.dtype, sharding=over_devices), (keys, cond, cond, low_res))
    held = resident(pipeline, config, mesh_of(config, devices))
    memory = {"pretrained": bytes_per_device(held), "batch": bytes_per_device(inputs)}
    lowered = sample_pictures.lower(stage, sampling, mesh, held[stage.name], *inputs)
    arguments = memory["batch"] + bytes_per_device(held[stage.name])
    return measured(lowered, memory, arguments, 1, devices)


def measured(
    lowered: jax.stages.Lowered, memory: dict[str, int], arguments: int, rounds: int, devices: Sequence[Any]
) -> Usage:
    """Compile a program and read what it takes.

    Args:
        lowered: the program.
        memory: bytes of what is held by kind, to which its own is added.
        arguments: how many bytes of these the program is given.
        rounds: see `Usage`.
        devices: that it is for.
    """
    found = ask(lowered, devices)
    if found.refusal:
        own = {"activations": _refused(found.refusal, arguments)}
        return Usage(memory | own, math.nan, math.nan, [], rounds, False, found.seconds)
    own = {"activations": max(0, found.memory - arguments)}  # with tiles that arguments do not fill
    return Usage(memory | own, found.flops, found.traffic, list(found.exchanges), rounds, True, found.seconds)


def _refused(message: str, arguments: int) -> int:
    """Bytes beside its arguments for which a program is refused.

    Raises:
        UserError: memory is not why it cannot be compiled.
    """
    for pattern, given in ((_ALL_OF_MEMORY, arguments), (_TEMPORARIES, 0)):
        if found := pattern.search(message):
            return max(0, int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " ")) - given)
    raise UserError(f"The program cannot be compiled: {message.splitlines()[0]}")


def examples_of(pipeline: Pipeline, stage: Stage, count: int, with_cond: bool) -> Examples:
    """Shapes of a training set."""
    low, side = stage.low_resolution, stage.resolution
    pictures = Shape((count, side, side, 3), jnp.float32)
    latents = jax.eval_shape(pipeline.family.to_latents, pipeline.params, pictures)
    return Examples(
        Shape(pictures.shape, jnp.uint8) if latents is None else None,
        Shape((count, 1), jnp.int32),
        pipeline.family.token_shapes(CAPTIONS),
        conditioning(pipeline, CAPTIONS) if with_cond else None,
        None if low is None else Shape((count, low, low, 3), jnp.uint8),
        None,
        latents,
    )


def conditioning(pipeline: Pipeline, count: int) -> Conditioning:
    """Shapes of the conditioning of so many captions."""
    return jax.eval_shape(pipeline.family.condition, pipeline.params, pipeline.family.token_shapes(count))


def resident(pipeline: Pipeline, config: ConfigDict, mesh: Mesh) -> Any:
    """The pretrained cascade as it is held throughout a run: in parts."""
    return sharding.placed(pipeline.params, config.sharding, mesh)


def bytes_per_device(tree: Any) -> int:
    """Bytes on each device of arrays that have shardings."""

    def size(leaf: Shape) -> int:
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * _itemsize(leaf)

    return sum(map(size, jax.tree.leaves(tree)))


def _itemsize(leaf: Shape) -> int:
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return 8
    return leaf.dtype.itemsize
