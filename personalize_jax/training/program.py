"""The program of a training, and where what it works on lies; nothing is computed or placed here.

Built from arrays or from their shapes alone, so that what a machine would have to hold is known without that machine.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from personalize_jax.errors import UserError
from personalize_jax.models import attention
from personalize_jax.models.params import Params, flatten, unflatten
from personalize_jax.models.text_encoder import TextEncoder
from personalize_jax.pipeline import Stage
from personalize_jax.training import sharding
from personalize_jax.training.examples import Batch, Examples
from personalize_jax.training.groups import sample_batches
from personalize_jax.training.lora import init_adapters
from personalize_jax.training.losses import objective_of, personalization_loss
from personalize_jax.training.optimizer import make_optimizer
from personalize_jax.training.step import TrainState, init_state, make_train_step, make_train_steps
from personalize_jax.training.trainable import LORA, ROWS, init_rows, select


class Program(NamedTuple):
    """A training before it starts.

    Attributes:
        advance: (state, frozen params, examples) -> (state, metrics), jitted; the state is donated.
        start: (network's name -> its float32 parameters) -> what the state is made of.
        make_state: start -> the state that the training starts from, jitted; nothing of `start` is donated.
        frozen_params: what the step looks at besides.
        state: shapes, dtypes and shardings of the state.
        place: gives arrays, or shapes, of parameters their shardings.
        everywhere: the sharding of examples.
    """

    advance: Callable[[TrainState, Params, dict[str, Examples]], tuple[TrainState, dict[str, Array]]]
    start: Callable[[Callable[[str], Params]], Params]
    make_state: Callable[[Params], TrainState]
    frozen_params: Params
    state: TrainState
    place: Callable[[Params], Params]
    everywhere: NamedSharding


def build(
    stage: Stage,
    text_encoder: TextEncoder,
    pretrained: Params,
    config: ConfigDict,
    seed: int,
    mesh: Mesh,
    identifier: Mapping[int, Sequence[int]] | None = None,
) -> Program:
    """The program of one stage's training on a mesh.

    Args:
        stage: what to train.
        text_encoder: of the captions.
        pretrained: {"denoiser": ..., "text_encoder": ...}, arrays or shapes; what is frozen is of these. They may be
            rounded: what is trained is float32, see `Program.start`.
        config: keys of `configs.common.training()`.
        seed: of all randomness in this training.
        mesh: of `sharding.make_mesh`.
        identifier: for rules that train its rows, its tokens and what they start from: see `trainable.init_rows`.

    Raises:
        UserError: the configuration does not fit the parameters or the mesh.
    """
    check_sizes(config, mesh)
    adapters_key, steps_key = jax.random.split(training_key(seed, stage.name))
    selection = select(pretrained, config)
    if selection.with_rows and not identifier:
        raise UserError("The rows of an identifier are to be trained where there is none; give True or False instead.")
    objective = objective_of(config)
    needs_frozen = any(group.target.needs_frozen for group in objective.groups)
    frozen = pretrained if needs_frozen else selection.frozen
    optimizer = make_optimizer(config.optimizer, config.num_steps)
    vocabulary_size = text_encoder.vocab_size if "text_encoder" in selection.networks else None

    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.float32), pretrained)
    networks = {path.partition("/")[0] for path in (*flatten(selection.trained), *selection.with_rows)}

    def start(read: Callable[[str], Params]) -> dict[str, Params]:
        params = flatten({name: read(name) for name in networks})
        return {
            "trained": unflatten({path: params[path] for path in flatten(selection.trained)}),
            "tables": unflatten({path: params[path] for path in selection.with_rows}),
        }

    def make_state(start: dict[str, Params]) -> TrainState:
        # Copied, since the state is donated and the caller keeps the pretrained parameters.
        params = jax.tree.map(jnp.copy, start["trained"])
        if selection.with_rows:
            params[ROWS] = init_rows(start["tables"], selection.with_rows, identifier)
        if selection.adapted:
            params[LORA] = init_adapters(shapes, selection.adapted, config.lora.rank, adapters_key)
        return init_state(params, optimizer, config.ema_decay > 0, vocabulary_size)

    state = sharding.placed(jax.eval_shape(make_state, start(shapes.get)), config.sharding, mesh)
    state_shardings = jax.tree.map(lambda a: a.sharding, state)

    def loss(params: Params, frozen_params: Params, batch: dict[str, Batch], rng: Array) -> tuple[Array, dict]:
        params, frozen_params = (sharding.gathered(p, config.sharding, mesh) for p in (params, frozen_params))
        with attention.over(mesh):
            return personalization_loss(stage, text_encoder, objective, params, frozen_params, batch, rng)

    sample = partial(sample_batches, objective.groups, batch_size=config.batch_size, object_weight=config.object_weight)
    steps = make_train_steps(
        make_train_step(loss, optimizer, config.ema_decay, config.microbatches),
        lambda examples, key: sharding.shard_batch(sample(examples, key), mesh),
        steps_key,
        config.steps_per_dispatch,
    )
    everywhere = sharding.replicated(mesh)
    return Program(
        jax.jit(steps, donate_argnums=0, out_shardings=(state_shardings, everywhere)),
        start,
        jax.jit(make_state, out_shardings=state_shardings),
        frozen,
        state,
        lambda params: sharding.placed(params, config.sharding, mesh),
        everywhere,
    )


def training_key(seed: int, stage_name: str) -> Array:
    """The key that all randomness of a stage's training comes from.

    Neither another stage's training nor a picture of the same seed shares any of its keys: pictures fold in the small
    number of their stage, a training this large one of its name.

    Args:
        seed: of the run.
        stage_name: of the stage in training.
    """
    purpose = zlib.crc32(f"training {stage_name}".encode())
    return jax.random.fold_in(jax.random.key(seed), np.uint32(purpose))


def mesh_of(config: ConfigDict, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh that a training's configuration asks for, over this program's devices or others."""
    return sharding.make_mesh(config.mesh, config.batch_size // max(1, config.microbatches), devices)


def check_sizes(config: ConfigDict, mesh: Mesh) -> None:
    """Refuse batches and numbers of steps that do not divide as they must.

    Args:
        config: of a training.
        mesh: that it is to run on.

    Raises:
        UserError: such a number.
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
