"""The real programs of a run, compiled for devices that need not exist, and the memory and work of each device."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from personalize_jax.families.objective import INSTANCE, PRIOR, groups_of
from personalize_jax.families.stage import Conditioning
from personalize_jax.pipeline import Pipeline, Sampling, Stage
from personalize_jax.pipeline.cascade import sample_pictures
from personalize_jax.planning import slices
from personalize_jax.planning.compiler import analyse, counted_flops
from personalize_jax.planning.exchanges import Collective
from personalize_jax.planning.slices import Topology
from personalize_jax.runtime import sharding
from personalize_jax.runtime.errors import UserError
from personalize_jax.training.examples import Examples
from personalize_jax.training.parameterizations.base import Identifier
from personalize_jax.training.program import Program, mesh_of, stage_program

PHOTOS, CAPTIONS = 5, 3  # of a subject, the empty caption included; they are too small for their number to matter
# The compiler refuses either late, or early by an estimate. It calls that one of temporary arrays, and yet counts
# arguments in.
_REFUSED = re.compile(r"(?:Used |temporaries \()([\d.]+)([KMGT]?)(?: of|\) exceeds)")


class Usage(NamedTuple):
    """Memory and work of each device in one step of a program.

    Attributes:
        memory: bytes by kind.
        flops: number of operations.
        bytes: bytes read from memory and written to it.
        exchanges: the collectives between devices.
        unknown_loops: number of loops that are counted once, because the program does not tell how often they run.
        compiled: whether the compiler accepts the program; it refuses what does not fit.
        seconds: time spent compiling.
    """

    memory: dict[str, int]
    flops: float
    bytes: float
    exchanges: list[Collective]
    unknown_loops: int
    compiled: bool
    seconds: float

    @property
    def total(self) -> int:
        """Bytes of memory of all kinds."""
        return sum(self.memory.values())

    def received(self, kind: str | None = None) -> float:
        """Bytes that a device receives from others in a step, by one kind of exchange or by all."""
        return sum(e.received for e in self.exchanges if kind is None or e.kind == kind)


def train_step(
    pipeline: Pipeline, stage: Stage, config: ConfigDict, class_images: int, trains_text: bool, topology: Topology
) -> Usage:
    """The usage of one step of a stage's tuning, on its mesh.

    Args:
        pipeline: a pipeline with shapes in place of parameters.
        stage: the stage that is tuned.
        config: the stage's training configuration; one step is planned, however many a dispatch has.
        class_images: number of class images.
        trains_text: whether the text encoder is trained, so that captions are encoded in every step.
        topology: the slice.

    Raises:
        UserError: the configuration does not fit the number of chips.
    """
    devices = slices.devices(topology)
    program = tuning_program(pipeline, stage, config, class_images, trains_text, devices)
    memory = {
        "parameters": bytes_per_device(program.state.params),
        "optimizer": bytes_per_device(program.state.opt_state),
        "average": bytes_per_device(program.state.ema),
        "pretrained": bytes_per_device(pretrained_shapes(pipeline, config, program.mesh)),
        "examples": bytes_per_device(program.examples),
    }
    arguments = (program.state, program.frozen_params, program.examples)
    return program_usage(program.lower(), memory, arguments, devices)


def model_flops(pipeline: Pipeline, stage: Stage, config: ConfigDict, class_images: int, trains_text: bool) -> float:
    """Operations of one step on all devices together: those of the model itself if the networks compute nothing twice.

    XLA counts them before it optimises, for one device and without microbatches.

    Args:
        pipeline: a pipeline with shapes in place of parameters, whose networks attend by XLA and store all activations.
        stage: the stage that is tuned.
        config: the stage's training configuration.
        class_images: number of class images.
        trains_text: whether the text encoder is trained, so that captions are encoded in every step.
    """
    whole = config.copy_and_resolve_references().unlock()
    whole.microbatches, whole.mesh = 1, (1, 1, 1)
    one = slices.devices(slices.parse("v5e-1"))  # convolutions have other algorithms on CPUs
    return counted_flops(tuning_program(pipeline, stage, whole, class_images, trains_text, one).lower().as_text("hlo"))


def tuning_program(
    pipeline: Pipeline, stage: Stage, config: ConfigDict, class_images: int, trains_text: bool, devices: Sequence[Any]
) -> Program:
    """The program of one step of a stage's tuning, of shapes.

    Args:
        pipeline: a pipeline with shapes in place of parameters.
        stage: the stage that is tuned.
        config: the stage's training configuration.
        class_images: number of class images.
        trains_text: whether the text encoder is trained.
        devices: the devices of its mesh.

    Raises:
        UserError: the configuration does not fit the number of devices.
    """
    single = config.copy_and_resolve_references().unlock()
    single.steps_per_dispatch, single.num_steps = 1, max(1, config.num_steps)
    identifier = Identifier(_abstract((1,), jnp.int32), _abstract((1, 1), jnp.int32))  # some rules need one
    counts = {INSTANCE: PHOTOS, PRIOR: class_images}
    examples = {
        group.name: example_shapes(pipeline, stage, counts[group.name], not trains_text) for group in groups_of(config)
    }
    pretrained = pipeline.networks(stage.name)
    return stage_program(stage, pipeline.family, pretrained, examples, single, 0, identifier, devices=devices)


def sampling_step(
    pipeline: Pipeline, stage: Stage, sampling: Sampling, batch_size: int, config: ConfigDict, topology: Topology
) -> Usage:
    """The usage of one of the `sampling.num_steps` steps in which a stage samples a batch of pictures.

    What is done once a batch, such as gathering parameters and decoding, is shared out among the steps.

    Args:
        pipeline: a pipeline with shapes in place of parameters.
        stage: the stage that samples.
        sampling: its sampling settings.
        batch_size: pictures in a batch; filled up to a multiple of the devices.
        config: a training configuration, whose mesh and sharding the parameters have.
        topology: the slice.
    """
    devices = slices.devices(topology)
    B = batch_size + -batch_size % len(devices)
    mesh = Mesh(np.array(devices).ravel(), ("data",))
    over_devices = NamedSharding(mesh, P("data"))
    cond = conditioning_shapes(pipeline, B)
    side = stage.low_resolution
    low_res = None if side is None else _abstract((B, side, side, 3), jnp.uint8)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), B))
    inputs = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=over_devices), (keys, cond, cond, low_res)
    )
    params = pretrained_shapes(pipeline, config, mesh_of(config, devices))
    memory = {"pretrained": bytes_per_device(params), "batch": bytes_per_device(inputs)}
    lowered = sample_pictures.lower(stage, sampling, mesh, params[stage.name], *inputs)
    batch = program_usage(lowered, memory, (params[stage.name], inputs), devices)
    steps = sampling.num_steps
    exchanges = [exchange._replace(runs=exchange.runs / steps) for exchange in batch.exchanges]
    return batch._replace(flops=batch.flops / steps, bytes=batch.bytes / steps, exchanges=exchanges)


def program_usage(lowered: jax.stages.Lowered, memory: dict[str, int], arguments: Any, devices: Sequence[Any]) -> Usage:
    """Compile a program and return its usage.

    Args:
        lowered: the program.
        memory: bytes by kind that the run holds on a device; the program's activations are added to them.
        arguments: what the program is lowered for: shapes with shardings, held among these bytes.
        devices: the devices that it is lowered for.
    """
    analysis = analyse(lowered, devices)
    taken = kept_bytes(lowered, arguments)
    if analysis.refusal:
        memory = memory | {"activations": max(0, _refused_bytes(analysis.refusal) - taken)}  # rounded
        return Usage(memory, math.nan, math.nan, [], 0, False, analysis.seconds)
    memory = memory | {"activations": analysis.memory - taken}  # with the padding of the arguments' tiles
    exchanges, unknown = list(analysis.exchanges), analysis.unknown_loops
    return Usage(memory, analysis.flops, analysis.traffic, exchanges, unknown, True, analysis.seconds)


def kept_bytes(lowered: jax.stages.Lowered, arguments: Any) -> int:
    """Bytes on each device of those arguments that a program keeps; `jax.jit` drops what nothing uses.

    Args:
        lowered: the program.
        arguments: what it is lowered for: shapes with shardings.
    """
    kept = lowered._lowering.compile_args["kept_var_idx"]  # nothing public tells
    return bytes_per_device([leaf for i, leaf in enumerate(jax.tree.leaves(arguments)) if i in kept])


def _refused_bytes(message: str) -> int:
    """The memory that a refused program needs, arguments included, in bytes.

    Raises:
        UserError: the program is refused for another reason than memory.
    """
    if match := _REFUSED.search(message):
        return int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " "))
    raise UserError(f"The program cannot be compiled: {message.splitlines()[0]}")


def example_shapes(pipeline: Pipeline, stage: Stage, count: int, with_cond: bool) -> Examples:
    """A training set of `count` pictures, with shapes in place of arrays."""
    low, side = stage.low_resolution, stage.resolution
    pictures = _abstract((count, side, side, 3), jnp.float32)
    latents = jax.eval_shape(pipeline.family.to_latents, pipeline.params, pictures)
    return Examples(
        _abstract(pictures.shape, jnp.uint8) if latents is None else None,
        _abstract((count, 1), jnp.int32),
        pipeline.family.token_shapes(CAPTIONS),
        conditioning_shapes(pipeline, CAPTIONS) if with_cond else None,
        None if low is None else _abstract((count, low, low, 3), jnp.uint8),
        None,
        latents,
    )


def conditioning_shapes(pipeline: Pipeline, count: int) -> Conditioning:
    """The conditioning of `count` captions, with shapes in place of arrays."""
    return jax.eval_shape(pipeline.family.condition, pipeline.params, pipeline.family.token_shapes(count))


def pretrained_shapes(pipeline: Pipeline, config: ConfigDict, mesh: Mesh) -> Any:
    """Shapes of the pretrained parameters, sharded as they are throughout a run."""
    return sharding.placed(pipeline.params, config.sharding, mesh)


def bytes_per_device(tree: Any) -> int:
    """Bytes on each device of arrays, or shapes, that have shardings."""

    def size(leaf: jax.ShapeDtypeStruct) -> int:
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return math.prod(leaf.sharding.shard_shape(leaf.shape)) * (8 if is_key else leaf.dtype.itemsize)

    return sum(map(size, jax.tree.leaves(tree)))


def _abstract(shape: Sequence[int], dtype: Any) -> Array:
    # Programs are lowered for shapes as for arrays, and what takes arrays is not annotated for both.
    return cast(Array, jax.ShapeDtypeStruct(shape, dtype))
