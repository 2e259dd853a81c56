"""The program of a training: its jitted train steps, their inputs, and the shardings of both on a mesh.

A program can be made from shapes alone, so that its memory and its compilation are known without the machine.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from personalize_jax.families.base import Family
from personalize_jax.families.objective import objective_of
from personalize_jax.families.stage import Stage
from personalize_jax.models import attention
from personalize_jax.models.params import Params
from personalize_jax.runtime import hosts, sharding
from personalize_jax.runtime.errors import UserError
from personalize_jax.training import parameterizations
from personalize_jax.training.examples import PICTURES, Examples, sample_batches
from personalize_jax.training.optimizer import make_optimizer
from personalize_jax.training.parameterizations.base import Identifier
from personalize_jax.training.step import Loss, TrainState, init_state, make_train_step, make_train_steps

# XLA may yield the gradient of a sharded kernel by a loop, each round of which sums up one device's part. These loops
# run late, and hold their operands until then: with them Stable Diffusion 2.1 takes 7.4 GiB of a v5e-8's chip and
# receives 3.4 GB a step, without them 5.6 GiB and 2.9 GB.
COMPILER_OPTIONS = {
    "tpu": {f"xla_tpu_enable_windowed_einsum_for_{kind}": False for kind in ("reduce_scatter", "all_gather")}
}


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A training that `loop.train` can run, of any network.

    Attributes:
        loss: see `step.make_train_step`.
        sample_batch: (examples, key) -> batch; traceable.
        init_params: (pretrained values, identifier, key) -> the parameters to train; traceable.
        examples: the examples that batches are sampled from, on the mesh; arrays or shapes.
        config: the keys of `configs.common.training()` about steps, average, mesh and optimiser.
        key: the random key from which all randomness of the training comes.
        mesh: the mesh that the program runs on.
        images_per_step: pictures trained in a step.
        frozen_params: parameters that are read and not trained, on the mesh; arrays or shapes.
        pretrained_values: shapes of the arrays that `init_params` starts from.
        read_pretrained_values: reads these arrays; called once, and only where there is no checkpoint.
        identifier: tokens whose rows are trained, if any are.
        vocabulary_size: number of tokens to count, or None to count none.
    """

    loss: Loss
    sample_batch: Callable[[Any, Array], Any]
    init_params: Callable[[Any, Identifier | None, Array], Params]
    examples: Any
    config: ConfigDict
    key: Array
    mesh: Mesh
    images_per_step: int
    frozen_params: Params = dataclasses.field(default_factory=dict)
    pretrained_values: Any = None
    read_pretrained_values: Callable[[], Any] = lambda: None
    identifier: Identifier | None = None
    vocabulary_size: int | None = None

    @cached_property
    def state(self) -> TrainState:
        """Shapes, dtypes and shardings of the train state."""
        shapes = jax.eval_shape(self._init_state, self.key, self.pretrained_values, self.identifier)
        return sharding.placed(shapes, self.config.sharding, self.mesh)

    def init(self) -> TrainState:
        """The state before the first step."""
        key, identifier = hosts.device_put((self.key, self.identifier), sharding.replicated(self.mesh))
        values = sharding.placed(self.read_pretrained_values(), self.config.sharding, self.mesh)
        return jax.jit(self._init_state, out_shardings=_shardings(self.state))(key, values, identifier)

    @cached_property
    def advance(self) -> jax.stages.Wrapped:
        """One jitted dispatch, (state, frozen_params, examples) -> (state, metrics), which donates the state."""
        config, mesh = self.config, self.mesh
        gather = partial(sharding.gathered, rules=config.sharding, mesh=mesh)
        train_step = make_train_step(self.loss, self._optimizer, config.ema_decay, config.microbatches, gather)
        steps = make_train_steps(
            train_step,
            lambda examples, key: sharding.shard_batch(self.sample_batch(examples, key), mesh),
            config.steps_per_dispatch,
        )
        out_shardings = _shardings(self.state), sharding.replicated(mesh)
        options = COMPILER_OPTIONS.get(mesh.devices.flat[0].platform)
        return jax.jit(steps, donate_argnums=0, out_shardings=out_shardings, compiler_options=options)

    def lower(self) -> jax.stages.Lowered:
        """`advance` lowered for the arrays of this training, ready to be compiled."""
        with attention.over(self.mesh):
            return self.advance.lower(self.state, self.frozen_params, self.examples)

    def checkpoint_defaults(self) -> dict[str, Any]:
        """The values that fields of the state had in earlier versions, whose checkpoints lack these fields."""
        key = hosts.device_put(jax.random.key_data(jax.random.split(self.key)[1]), sharding.replicated(self.mesh))
        return {"key": key, "token_ids": None}

    @cached_property
    def _optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(self.config.optimizer, self.config.num_steps)

    def _init_state(self, key: Array, pretrained_values: Any, identifier: Identifier | None) -> TrainState:
        init_key, steps_key = jax.random.split(key)
        params = self.init_params(pretrained_values, identifier, init_key)
        token_ids = None if identifier is None else jnp.asarray(identifier.token_ids)
        has_ema = self.config.ema_decay > 0
        return init_state(params, self._optimizer, steps_key, has_ema, self.vocabulary_size, token_ids)


def stage_program(
    stage: Stage,
    family: Family,
    pretrained: Params,
    examples: Mapping[str, Examples],
    config: ConfigDict,
    seed: int,
    identifier: Identifier | None = None,
    read_float32: Callable[[str], Params] | None = None,
    devices: Sequence[Any] | None = None,
) -> Program:
    """The program that trains one stage, to pretrain or to personalise it.

    Args:
        stage: the stage to train.
        family: the model's family.
        pretrained: {"denoiser": ...} and the family's encoders, arrays or shapes: the frozen parameters, and those that
            the training starts from. They may be rounded, see `read_float32`.
        examples: the examples of each group of `objective.groups_of` by its name; arrays or shapes.
        config: keys of `configs.common.training()`.
        seed: seed of all randomness in this training.
        identifier: tokens of the subject's identifier, for rules that train their rows.
        read_float32: reads the float32 parameters of a network by its name in `pretrained`, where those are rounded;
            called only for networks that are trained.
        devices: devices of the mesh; by default all of them.

    Raises:
        UserError: the configuration does not fit the parameters or the mesh.
    """
    mesh = mesh_of(config, devices)
    check_sizes(config, mesh)
    selection, objective = parameterizations.select(pretrained, config), objective_of(config)
    identifier = parameterizations.needed_identifier(selection, identifier)
    needs_frozen = any(group.target.needs_frozen for group in objective.groups)
    frozen = dict(pretrained if needs_frozen else selection.frozen)
    if all(group.cond is not None for group in examples.values()):
        for name in family.encoders:  # the step does not read them, and a copy of them would take memory
            frozen.pop(name, None)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float32), pretrained)
    return Program(
        loss=partial(family.loss, stage, objective),
        sample_batch=partial(
            sample_batches, objective.groups, batch_size=config.batch_size, object_weight=config.object_weight
        ),
        init_params=partial(parameterizations.init, selection),
        examples={name: _placed_examples(group, mesh) for name, group in examples.items()},
        config=config,
        key=training_key(seed, stage.name),
        mesh=mesh,
        images_per_step=config.batch_size * len(objective.groups),
        frozen_params=sharding.placed(frozen, config.sharding, mesh),
        pretrained_values=parameterizations.pretrained_values(selection, shapes.__getitem__),
        read_pretrained_values=partial(
            parameterizations.pretrained_values, selection, read_float32 or pretrained.__getitem__
        ),
        identifier=identifier,
        vocabulary_size=family.vocabulary_size if selection.networks & {*family.encoders} else None,
    )


def _placed_examples(examples: Examples, mesh: Mesh) -> Examples:
    """Pictures split over the devices that split batches; captions, of which there are few, replicated."""
    pictures = {name: sharding.split(getattr(examples, name), mesh) for name in PICTURES}
    none: dict[str, Any] = dict.fromkeys(PICTURES)  # all pictures on one device might not fit
    return sharding.placed(examples._replace(**none), (("", ()),), mesh)._replace(**pictures)


def _shardings(state: TrainState) -> TrainState:
    return jax.tree.map(lambda a: a.sharding, state)


def training_key(seed: int, stage_name: str) -> Array:
    """The random key from which all randomness of a stage's training comes.

    It is shared neither with another stage's training nor with a picture of the same seed: pictures fold in the small
    number of their stage, trainings this large number of its name.

    Args:
        seed: seed of the run.
        stage_name: name of the stage in training.
    """
    purpose = zlib.crc32(f"training {stage_name}".encode())
    return jax.random.fold_in(jax.random.key(seed), np.uint32(purpose))


def mesh_of(config: ConfigDict, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that a training's configuration asks for, over this program's devices or others."""
    return sharding.make_mesh(config.mesh, config.batch_size // max(1, config.microbatches), devices)


def check_sizes(config: ConfigDict, mesh: Mesh) -> None:
    """Refuse batches that the mesh and the microbatches do not divide, and steps that dispatches do not.

    Args:
        config: keys of `configs.common.training()`.
        mesh: the mesh of the training.

    Raises:
        UserError: a number is no multiple of the other.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.batch_size % shards:
        raise UserError(
            f"batch_size is {config.batch_size} and the mesh splits it {shards} ways; give a multiple of that."
        )
    if config.microbatches < 1 or config.batch_size % (config.microbatches * shards):
        raise UserError(
            f"batch_size is {config.batch_size} and microbatches {config.microbatches}, and the mesh splits each part "
            f"{shards} ways; give microbatches of 1 or more whose product with that divides batch_size."
        )
    if config.num_steps % config.steps_per_dispatch:
        raise UserError(
            f"num_steps is {config.num_steps} and steps_per_dispatch {config.steps_per_dispatch}; give a multiple."
        )
