"""The training loop: the same for every stage, for pretraining and for personalisation."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
from jax import Array
from ml_collections import ConfigDict

from personalize_jax import hosts, interruption
from personalize_jax.errors import UserError
from personalize_jax.models.params import Params
from personalize_jax.models.text_encoder import TextEncoder
from personalize_jax.pipeline import Stage
from personalize_jax.training.checkpoint import Checkpoints
from personalize_jax.training.examples import Examples
from personalize_jax.training.optimizer import same_learning_rates
from personalize_jax.training.program import build, mesh_of
from personalize_jax.training.step import TrainState
from personalize_jax.training.tracking import JSONL_ONLY, Tracking, TrainingLog, Work, check_finite
from personalize_jax.training.trainable import merge


class Training(NamedTuple):
    """A training made ready: what it starts from, where it lies, and the program that advances it.

    Attributes:
        advance: (state, frozen params, examples) -> (state, metrics), jitted; the state is donated.
        state: new, or from the last checkpoint.
        frozen_params: the pretrained parameters that the step looks at.
        examples: the examples of each group, on the devices.
    """

    advance: jax.stages.Wrapped
    state: TrainState
    frozen_params: Params
    examples: dict[str, Examples]

    def compiled(self) -> jax.stages.Compiled:
        """The program of `advance`, for what this training holds."""
        return self.advance.lower(self.state, self.frozen_params, self.examples).compile()


def prepare(
    stage: Stage,
    text_encoder: TextEncoder,
    pretrained: Params,
    examples: dict[str, Examples],
    config: ConfigDict,
    seed: int,
    checkpoints: Checkpoints,
    identifier: Mapping[int, Sequence[int]] | None = None,
    in_full: Callable[[str], Params] | None = None,
) -> Training:
    """Build the program and place everything on the mesh; the arguments are those of `train`."""
    mesh = mesh_of(config)
    program = build(stage, text_encoder, pretrained, config, seed, mesh, identifier)
    state = checkpoints.restore(program.state)
    if state is None:
        state = program.make_state(program.place(program.start(in_full or pretrained.__getitem__)))
    frozen = dict(program.frozen_params)
    if all(of_group.text is not None for of_group in examples.values()):
        frozen.pop("text_encoder", None)  # nobody looks at it, and placing it may mean to hold it twice
    frozen = program.place(frozen)
    return Training(program.advance, state, frozen, hosts.put(examples, program.everywhere))


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
    in_full: Callable[[str], Params] | None = None,
    tracking: Tracking = JSONL_ONLY,
) -> TrainState:
    """Train one stage, from its last checkpoint in `directory` if there is one.

    Args:
        stage: what to train.
        text_encoder: of the captions.
        pretrained: {"denoiser": ..., "text_encoder": ...} to start from; the frozen copy is made of it.
        examples: the examples of each group of `groups.groups_of` by its name.
        config: keys of `configs.common.training()`.
        seed: of all randomness in this training.
        directory: for `checkpoints/`, `metrics.jsonl` and traces.
        progress: called with the number of steps done and the latest logged metrics, at first before any is done, and
            then after each dispatch.
        identifier: for rules that train its rows, its tokens and what they start from: see `trainable.init_rows`.
        in_full: reads the parameters of a network in float32, by the name it has in `pretrained`, where those are
            rounded; called once at the start for what is trained, which nothing here then holds twice.
        tracking: where metrics go besides `metrics.jsonl`.

    Returns:
        The state after `config.num_steps`.

    Raises:
        UserError: the loss is not finite, the configuration does not fit, or more steps are done than it asks for.
        Stopped: on request, after saving.
    """
    with contextlib.ExitStack() as opened:
        checkpoints = opened.enter_context(contextlib.closing(Checkpoints(directory / "checkpoints")))
        training = prepare(stage, text_encoder, pretrained, examples, config, seed, checkpoints, identifier, in_full)
        state = training.state
        step = saved = int(state.step)
        _check_not_shorter(directory, step, config.num_steps)
        log = opened.enter_context(contextlib.closing(TrainingLog(directory, step, tracking)))
        progress(step, log.latest)
        metrics: dict[str, Array] = {}
        advance: jax.stages.Compiled | None = None
        while step < config.num_steps:
            if interruption.requested():
                if step > saved:
                    check_finite(step, metrics)
                    checkpoints.save(step, state)
                raise interruption.Stopped
            if advance is None:  # ahead of time, so that it is no part of a step's; and only if there are steps to do
                advance = training.compiled()
                log.begin(Work.of(advance, config.batch_size * len(examples), config.microbatches))
            # The host does not wait for the devices but to log and to save.
            with log.dispatching(step, metrics):
                state, metrics = advance(state, training.frozen_params, training.examples)
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


def check_length(directory: Path, config: ConfigDict, before: int) -> None:
    """Refuse another number of steps for a training that would then be none that has run without a break.

    Args:
        directory: of the training, as given to `train`, begun or not.
        config: its keys, with the number of steps that is asked for.
        before: the number of steps that has been asked for so far.

    Raises:
        UserError: more steps are done already, or their learning rates would have been others.
    """
    done = max(Checkpoints(directory / "checkpoints", read_only=True).steps(), default=0)
    _check_not_shorter(directory, done, config.num_steps)
    if not same_learning_rates(config.optimizer, done, before, config.num_steps):
        raise UserError(
            f"{directory} has done {done} of {before} steps, and the learning rate falls over the last "
            f"{config.optimizer.decay_steps}: with num_steps={config.num_steps} those steps would have had another; "
            f"give num_steps={before}, or another --workdir."
        )


def _check_not_shorter(directory: Path, done: int, num_steps: int) -> None:
    if done > num_steps:
        raise UserError(
            f"{directory} has done {done} steps already, more than num_steps={num_steps}; give num_steps={done} or "
            "more, or another --workdir."
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
