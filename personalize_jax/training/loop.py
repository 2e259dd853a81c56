"""The training loop: the same for every stage, for pretraining and for personalisation."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh
from ml_collections import ConfigDict

from personalize_jax import interruption
from personalize_jax.errors import UserError
from personalize_jax.files import naming, write_text
from personalize_jax.models.params import Params
from personalize_jax.models.text_encoder import TextEncoder
from personalize_jax.pipeline import Stage
from personalize_jax.training import sharding
from personalize_jax.training.checkpoint import Checkpoints
from personalize_jax.training.examples import Batch, Examples, draw_batch
from personalize_jax.training.lora import init_adapters
from personalize_jax.training.losses import Objective, personalization_loss
from personalize_jax.training.optimizer import make_optimizer
from personalize_jax.training.step import TrainState, init_state, make_train_step, make_train_steps
from personalize_jax.training.trainable import LORA, ROWS, init_rows, merge, select

_ADAPTER_PURPOSE = np.uint32(2**32 - 2)  # folded into the run's key for adapters; the steps fold in their numbers


@dataclasses.dataclass(frozen=True)
class Draw:
    """How batches are drawn: examples of each half, and the share of captions left empty.

    Attributes:
        batch_size: of each half.
        caption_dropout: share of empty captions by half.
        object_weight: additional loss weight of the object's pixels, where masks are known.
    """

    batch_size: int
    caption_dropout: dict[str, float]
    object_weight: float

    def __call__(self, examples: dict[str, Examples], key: Array) -> dict[str, Batch]:
        """Draw a batch for each half, with a key of its own."""
        keys = jax.random.split(key, len(examples))
        return {
            half: draw_batch(examples[half], k, self.batch_size, self.caption_dropout[half], self.object_weight)
            for half, k in zip(sorted(examples), keys, strict=True)
        }


class Training(NamedTuple):
    """A training made ready: what it starts from, where it lies, and the program that advances it.

    Attributes:
        advance: (state, frozen params, examples) -> (state, metrics), compiled; the state is donated.
        state: new, or from the last checkpoint.
        frozen_params: the pretrained parameters that the step looks at.
        examples: the set of each half, on the devices.
    """

    advance: Callable[[TrainState, Params, dict[str, Examples]], tuple[TrainState, dict[str, Array]]]
    state: TrainState
    frozen_params: Params
    examples: dict[str, Examples]


def prepare(
    stage: Stage,
    text_encoder: TextEncoder,
    pretrained: Params,
    examples: dict[str, Examples],
    config: ConfigDict,
    seed: int,
    checkpoints: Checkpoints,
    identifier: Mapping[int, Sequence[int]] | None = None,
) -> Training:
    """Place everything on the mesh and build the program; the arguments are those of `train`."""
    mesh = sharding.make_mesh(config.mesh)
    _check(config, mesh)
    root_key = jax.random.key(seed)
    selection = select(pretrained, config)
    if selection.with_rows and not identifier:
        raise UserError("The rows of an identifier are to be trained where there is none; give True or False instead.")
    frozen = selection.frozen
    objective = Objective(
        config.weighting,
        config.prior.weight,
        config.prior.form,
        tuple(config.augmentation_levels),
        config.offset_noise,
        config.vlb_weight,
    )
    if objective.prior_form == "frozen_prediction" and objective.prior_weight > 0:
        frozen = pretrained
    optimizer = make_optimizer(config.optimizer, config.num_steps)
    vocabulary_size = text_encoder.vocab_size if "text_encoder" in selection.networks else None

    def make_state(trained: Params) -> TrainState:
        params = dict(trained)
        if selection.with_rows:
            params[ROWS] = init_rows(pretrained, selection.with_rows, identifier)
        if selection.adapted:
            key = jax.random.fold_in(root_key, _ADAPTER_PURPOSE)
            params[LORA] = init_adapters(pretrained, selection.adapted, config.lora.rank, key)
        return init_state(params, optimizer, config.ema_decay > 0, vocabulary_size)

    abstract = jax.eval_shape(make_state, selection.trained)
    state_shardings = sharding.shardings(abstract, config.sharding, mesh)
    abstract = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, state_shardings)
    state = checkpoints.restore(abstract)
    if state is None:
        # Copied, since the state is donated and the caller keeps the pretrained parameters.
        state = jax.jit(make_state, out_shardings=state_shardings)(jax.tree.map(np.array, selection.trained))

    draw = Draw(
        config.batch_size,
        {"instance": config.caption_dropout, "prior": config.prior.caption_dropout},
        config.object_weight,
    )

    def loss(params: Params, frozen_params: Params, batch: dict[str, Batch], rng: Array) -> tuple[Array, dict]:
        params, frozen_params = (sharding.gathered(p, config.sharding, mesh) for p in (params, frozen_params))
        return personalization_loss(stage, text_encoder, objective, params, frozen_params, batch, rng)

    steps = make_train_steps(
        make_train_step(loss, optimizer, config.ema_decay, config.microbatches),
        lambda examples, key: sharding.shard_batch(draw(examples, key), mesh),
        root_key,
        config.steps_per_dispatch,
    )
    advance = jax.jit(steps, donate_argnums=0, out_shardings=(state_shardings, sharding.replicated(mesh)))
    frozen = jax.device_put(frozen, sharding.shardings(frozen, config.sharding, mesh))
    return Training(advance, state, frozen, jax.device_put(examples, sharding.replicated(mesh)))


def train(
    stage: Stage,
    text_encoder: TextEncoder,
    pretrained: Params,
    examples: dict[str, Examples],
    config: ConfigDict,
    seed: int,
    directory: Path,
    progress: Callable[[int, dict[str, float]], object] = lambda step, metrics: None,
    identifier: Mapping[int, Sequence[int]] | None = None,
) -> TrainState:
    """Train one stage, from its last checkpoint in `directory` if there is one.

    Args:
        stage: what to train.
        text_encoder: of the captions.
        pretrained: {"denoiser": ..., "text_encoder": ...} to start from; the frozen copy is made of it.
        examples: the set of each half, {"instance": ...} and with prior preservation {"prior": ...}.
        config: keys of `configs.common.training()`.
        seed: of all randomness in this training.
        directory: for `checkpoints/` and `metrics.jsonl`.
        progress: called with the number of steps done and the latest logged metrics, at first before any is done, and
            then after each dispatch.
        identifier: for rules that train its rows, its tokens and what they start from: see `trainable.init_rows`.

    Returns:
        The state after `config.num_steps`.

    Raises:
        UserError: the loss is not finite, or the configuration does not fit.
        Stopped: on request, after saving.
    """
    with contextlib.closing(Checkpoints(directory / "checkpoints")) as checkpoints:
        training = prepare(stage, text_encoder, pretrained, examples, config, seed, checkpoints, identifier)
        state = training.state
        step = saved = int(state.step)
        log = MetricsLog(directory / "metrics.jsonl", step)
        progress(step, log.latest)
        metrics: dict[str, Array] = {}
        while step < config.num_steps:
            if interruption.requested(step // config.steps_per_dispatch):
                if step > saved:
                    check_finite(step, metrics)
                    checkpoints.save(step, state)
                raise interruption.Stopped
            # The host does not wait for the devices but to log and to save.
            state, metrics = training.advance(state, training.frozen_params, training.examples)
            step += config.steps_per_dispatch
            last = step >= config.num_steps
            if last or step % config.log_every < config.steps_per_dispatch:
                log.write(step, metrics)
            if last or step - saved >= config.checkpoint_every:
                check_finite(step, metrics)
                checkpoints.save(step, state)
                saved = step
            progress(step, log.latest)
    return state


def _check(config: ConfigDict, mesh: Mesh) -> None:
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


def latest(directory: Path) -> TrainState | None:
    """The state of a training's last checkpoint, whose trees are nested dicts, or None before the first.

    Args:
        directory: of the training, as given to `train`.

    Raises:
        UserError: there are checkpoints, but none can be read.
    """
    if not (directory / "checkpoints").is_dir():
        return None
    with contextlib.closing(Checkpoints(directory / "checkpoints", read_only=True)) as checkpoints:
        state = checkpoints.restore(None)
    return None if state is None else TrainState(**state)


def averaged(state: TrainState) -> Params:
    """The average of what was trained, or the last values without one; adapters are under `trainable.LORA`."""
    return state.params if state.ema is None else state.ema


def trained_params(state: TrainState, pretrained: Params) -> Params:
    """What to sample with: the `averaged` parameters, completed by `pretrained`, with adapters applied."""
    return merge(averaged(state), pretrained)


def check_finite(step: int, metrics: dict[str, Any]) -> None:
    """Stop a training that has diverged, before its parameters reach a checkpoint.

    The parameters after a step are finite if the loss and its gradient were.

    Raises:
        UserError: a metric is not a finite number.
    """
    for name, value in metrics.items():
        if not np.isfinite(value):
            raise UserError(
                f"The {name} is {float(value)} at step {step}; the last checkpoint is kept: "
                "start again in another --workdir with a lower optimizer.learning_rate."
            )


class MetricsLog:
    """A JSONL file of metrics, one line a logged step, without repeats after a resume."""

    def __init__(self, file: Path, start_step: int) -> None:
        """Open a log; lines after `start_step`, from steps that will be done again, are dropped."""
        self.file = file
        self.latest: dict[str, float] = {}
        self._time = time.monotonic()
        file.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if file.exists():
            for line in file.read_text().splitlines(keepends=True):
                if line.endswith("\n") and json.loads(line)["step"] <= start_step:
                    kept.append(line)
        write_text(file, "".join(kept))

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        """Append a line.

        Raises:
            UserError: a metric is not a finite number.
        """
        check_finite(step, metrics)
        self.latest = {name: float(value) for name, value in metrics.items()}
        now = time.monotonic()
        line = {"step": step, **self.latest, "seconds": round(now - self._time, 3)}
        self._time = now
        with naming(self.file), self.file.open("a") as f:
            f.write(json.dumps(line) + "\n")
