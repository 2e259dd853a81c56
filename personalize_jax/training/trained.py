"""The result of a training: the parameters that it trained, which a run directory keeps in `trained.safetensors`."""

import contextlib
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from personalize_jax.formats.parameters import load_params, read_metadata, save_params
from personalize_jax.models.params import Params
from personalize_jax.runtime import hosts
from personalize_jax.runtime.errors import UserError
from personalize_jax.training import parameterizations
from personalize_jax.training.checkpoint import Checkpoints
from personalize_jax.training.step import TrainState

logger = logging.getLogger(__name__)

FILE = "trained.safetensors"


class Trained(NamedTuple):
    """The result of a training so far.

    Attributes:
        params: the moving average of the trained parameters, or their last values where there is none, in the layout of
            `parameterizations.init`: whole parameters, adapters, rows.
        step: number of steps done.
        token_ids: int32 [n], the tokens whose rows were trained; None where no rows were.
    """

    params: Params
    step: int
    token_ids: Array | None


def trained_of(state: TrainState) -> Trained:
    """The result of a training from its state."""
    return Trained(state.params if state.ema is None else state.ema, int(state.step), state.token_ids)


def trained_params(trained: Trained, pretrained: Params) -> Params:
    """The networks to sample with: the pretrained ones with the trained parameters, adapters merged into their kernels.

    Args:
        trained: the result of a training.
        pretrained: float32 networks by name, at least those that were trained.
    """
    return parameterizations.export(trained.params, pretrained, trained.token_ids)


def save_trained(trained: Trained, directory: Path) -> None:
    """Write the result of a training to the training's directory.

    Raises:
        UserError: the file cannot be written.
    """
    params = hosts.gather_on_first(trained.params)
    tokens = None if trained.token_ids is None else hosts.to_numpy(trained.token_ids).tolist()
    metadata = {"step": str(trained.step), "token_ids": json.dumps(tokens)}

    def write() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        save_params(params, directory / FILE, metadata=metadata)

    hosts.first_does(write)


def load_trained(directory: Path, place: Callable[[Params], Params] | None = None) -> Trained:
    """Read the result that `save_trained` wrote.

    Args:
        directory: the training's directory.
        place: maps a tree of shapes to a tree of shardings for the parameters; None for the default device.

    Raises:
        UserError: the file is damaged.
    """
    metadata = read_metadata(directory / FILE)
    tokens = json.loads(metadata.get("token_ids", "null"))
    token_ids = None if tokens is None else jnp.array(tokens, jnp.int32)
    return Trained(load_params(directory / FILE, place), int(metadata.get("step", 0)), token_ids)


def steps_trained(directory: Path) -> int:
    """The number of steps of the result that `save_trained` wrote; 0 where there is none, or its file is damaged."""
    try:
        return int(read_metadata(directory / FILE).get("step", 0)) if (directory / FILE).exists() else 0
    except UserError as error:
        logger.warning("%s The latest checkpoint takes its place.", error)
        return 0


class StoredResult(NamedTuple):
    """The result of a training, on the disk.

    Attributes:
        step: number of steps done.
        read: reads the result.
    """

    step: int
    read: Callable[[], Trained]


def latest_trained(directory: Path, place: Callable[[Params], Params] | None = None) -> StoredResult | None:
    """The latest result in a training's directory: its file, or a checkpoint of more steps; None if there is neither.

    Args:
        directory: the training's directory.
        place: see `load_trained`.

    Raises:
        UserError: there are checkpoints, but none can be read.
    """
    checkpoints, done = Checkpoints(directory / "checkpoints", read_only=True), steps_trained(directory)
    if max(checkpoints.steps(), default=0) <= done or (state := latest_state(directory)) is None:
        return StoredResult(done, lambda: load_trained(directory, place)) if done else None
    trained = trained_of(state)

    def read() -> Trained:
        if place is None:
            return trained._replace(params=hosts.device_put(trained.params, None))
        return trained._replace(params=jax.tree.map(hosts.device_put, trained.params, place(trained.params)))

    return StoredResult(trained.step, read)


def latest_state(directory: Path) -> TrainState | None:
    """The state of a training's latest checkpoint as NumPy arrays, whatever devices saved it; None if there is none.

    Raises:
        UserError: there are checkpoints, but none can be read.
    """
    if not (directory / "checkpoints").is_dir():
        return None
    with contextlib.closing(Checkpoints(directory / "checkpoints", read_only=True)) as checkpoints:
        state = checkpoints.restore(None)
    return None if state is None else TrainState(**state)
