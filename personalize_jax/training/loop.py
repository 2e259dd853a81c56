"""The training loop: the same for every stage and network, for pretraining and for personalisation."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import jax
from ml_collections import ConfigDict

from personalize_jax.runtime import interruption
from personalize_jax.runtime.errors import UserError
from personalize_jax.training.checkpoint import Checkpoints
from personalize_jax.training.optimizer import same_learning_rates
from personalize_jax.training.program import Program
from personalize_jax.training.step import Metrics, TrainState
from personalize_jax.training.tracking import JSONL_ONLY, Tracking, TrainingLog, Work, check_finite
from personalize_jax.training.trained import steps_trained


def train(
    program: Program,
    directory: Path,
    progress: Callable[[int, dict[str, float]], object] = lambda step, metrics: None,
    tracking: Tracking = JSONL_ONLY,
    enough: Callable[[int, Metrics], bool] = lambda step, metrics: False,
) -> TrainState:
    """Run a training, from its last checkpoint in `directory` if there is one.

    Args:
        program: the training's program.
        directory: folder of `checkpoints/`, `metrics.jsonl` and traces.
        progress: called with the number of steps done and the latest logged metrics, before the first step and after
            each dispatch.
        tracking: additional destinations of metrics.
        enough: called with the number of steps done and their metrics after each dispatch; says whether to save and end
            here, before `config.num_steps`.

    Returns:
        The last state, which has been saved.

    Raises:
        UserError: the loss is not finite, or more steps are done than the configuration asks for.
        Stopped: a stop was requested; the state has been saved.
    """
    config = program.config
    with contextlib.ExitStack() as opened:
        checkpoints = opened.enter_context(contextlib.closing(Checkpoints(directory / "checkpoints")))
        state = checkpoints.restore(program.state, program.checkpoint_defaults())
        if state is None:
            state = program.init()
        step = saved = int(state.step)
        _check_not_shorter(directory, step, config.num_steps)
        log = opened.enter_context(contextlib.closing(TrainingLog(directory, step, tracking)))
        progress(step, log.latest)
        metrics: Metrics = {}
        advance: jax.stages.Compiled | None = None
        ended = step >= config.num_steps
        while not ended:
            if interruption.requested():
                if step > saved:
                    check_finite(step, metrics)
                    checkpoints.save(step, state)
                raise interruption.Stopped
            if advance is None:  # ahead of time, so that no step's time includes it; and only if there are steps to do
                advance = program.lower().compile()
                log.begin(Work.of_program(advance, program.images_per_step, config.microbatches))
            # The host waits for the devices only to log and to save.
            with log.dispatching(step, metrics):
                state, metrics = advance(state, program.frozen_params, program.examples)
            step += config.steps_per_dispatch
            ended = step >= config.num_steps or enough(step, metrics)
            if ended or step % config.log_every < config.steps_per_dispatch:
                log.write(step, metrics)
            if ended or step - saved >= config.checkpoint_every:
                check_finite(step, metrics)
                checkpoints.save(step, state)
                saved = step
            progress(step, log.latest)
    return state


def check_length(directory: Path, config: ConfigDict, before: int) -> None:
    """Refuse a new number of steps with which a resumed training would differ from an uninterrupted one.

    Args:
        directory: the training's directory, as given to `train`; it may not exist yet.
        config: keys of `configs.common.training()`, with the new number of steps.
        before: the number of steps that the latest call asked for.

    Raises:
        UserError: more steps are done already, or they would have had other learning rates, or the checkpoints are gone
            that the training would continue from.
    """
    saved = max(Checkpoints(directory / "checkpoints", read_only=True).steps(), default=0)
    done = max(saved, steps_trained(directory))
    _check_not_shorter(directory, done, config.num_steps)
    if saved < done < config.num_steps:
        raise UserError(
            f"{directory} has done {done} steps, and its checkpoints have been deleted: it cannot be prolonged to "
            f"num_steps={config.num_steps}; give num_steps={done}, or another --workdir."
        )
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
