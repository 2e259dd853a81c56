"""Trains the world's own networks, all parameters from random ones, by the loop that trains the stages."""

from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from personalize_jax.models.params import Params
from personalize_jax.runtime import command, sharding
from personalize_jax.training.loop import train
from personalize_jax.training.program import Program, check_sizes, mesh_of
from personalize_jax.training.step import Metrics

SEED = 0


def training_config(
    num_steps: int, batch_size: int, log_every: int, checkpoint_every: int, **optimizer: float
) -> ConfigDict:
    """The keys of a training that `Program` and `loop.train` read.

    Args:
        num_steps: number of steps.
        batch_size: number of examples in a batch, a multiple of the number of devices, which share it.
        log_every: steps between lines of `metrics.jsonl`.
        checkpoint_every: steps between checkpoints.
        **optimizer: keys of `optimizer.make_optimizer`.
    """
    return ConfigDict(
        {
            "num_steps": num_steps,
            "batch_size": batch_size,
            "microbatches": 1,
            "steps_per_dispatch": 1,
            "log_every": log_every,
            "checkpoint_every": checkpoint_every,
            "ema_decay": 0.0,
            "mesh": (-1, 1, 1),
            "sharding": (("", ()),),
            "optimizer": {"clip_norm": 1.0, "moment_dtype": "float32"} | optimizer,
        }
    )


def network_program(
    loss: Callable[[Params, Mapping[str, Array], Array], Array],
    sample_batch: Callable[[Mapping[str, Array], Array], Mapping[str, Array]],
    init: Callable[[Array], Params],
    examples: Mapping[str, np.ndarray],
    config: ConfigDict,
) -> Program:
    """The program that trains a network.

    Args:
        loss: (parameters, batch, key) -> scalar; traceable.
        sample_batch: (examples, key) -> batch; traceable.
        init: (key) -> parameters; traceable.
        examples: arrays to sample from.
        config: keys of `training_config`.

    Raises:
        UserError: the batch cannot be split over this machine's devices.
    """
    mesh = mesh_of(config)
    check_sizes(config, mesh)

    def loss_of(params: Params, frozen_params: Params, batch: Mapping[str, Array], key: Array) -> tuple[Array, Metrics]:
        return loss(params, batch, key), {}

    return Program(
        loss=loss_of,
        sample_batch=sample_batch,
        init_params=lambda values, identifier, key: init(key),
        examples=sharding.placed(examples, config.sharding, mesh),
        config=config,
        key=jax.random.key(SEED),
        mesh=mesh,
        images_per_step=config.batch_size,
    )


def train_network(program: Program, directory: Path, description: str) -> Params:
    """Train a network, from its last checkpoint in `directory` if there is one.

    Args:
        program: the training's program.
        directory: the folder of checkpoints and metrics.
        description: the text of the progress bar.

    Raises:
        UserError: the loss is not finite, or the directory cannot be used.
        Stopped: on request, after saving.
    """
    with command.steps_bar(description, program.config.num_steps) as progress:
        return train(program, directory, progress).params
