"""Trainings that end in time: how many steps they have is chosen while they run.

The learning rate stays as it is until the steps that the time still allows are those over which it is to fall. Only
then is the length chosen, from the speed so far, and written down. All rates up to that step are those of a training of
any greater length, so the result is, bit for bit, that of a training whose length was given. A call that resumes takes
the length that was chosen; before that, it takes the steps done to have been as fast as its own.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from personalize_jax.runtime import hosts
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import write_text
from personalize_jax.training.loop import train
from personalize_jax.training.program import Program
from personalize_jax.training.step import Metrics
from personalize_jax.training.tracking import JSONL_ONLY, Tracking

FILE = "length.json"
KEPT_BACK = 0.03  # share of the time for saving, and for steps that turn out slower
SAVED = "/jax/compilation_cache/compile_time_saved_sec"  # JAX's event
MEASURED = 3  # least number of dispatches whose time is measured, after the first
TOO_SHORT = (
    "give a larger --budget_minutes in another --workdir; or the same command again, if it was rendering that took "
    "long: pictures that are kept are not rendered twice."
)


class Budget(NamedTuple):
    """The time that a training may take, compiling and saving included.

    Attributes:
        ends: when it is over, in seconds by the clock.
        decay_share: share of the steps over which the learning rate falls, between 0 and 1.
        clock: gives the time in seconds.
    """

    ends: float
    decay_share: float
    clock: Callable[[], float] = time.monotonic


class Length(NamedTuple):
    """The length of a training.

    Attributes:
        num_steps: steps of the whole training.
        decay_steps: the last of them, over which the learning rate falls.
    """

    num_steps: int
    decay_steps: int


OPEN = Length(2**30, 1)  # of a training until its length is chosen


def of_length(program: Program, length: Length) -> Program:
    """The same training with another length."""
    config = program.config.copy_and_resolve_references().unlock()
    config.num_steps, config.optimizer.decay_steps = length
    return dataclasses.replace(program, config=config.lock())


def train_until_length_is_known(
    program: Program,
    directory: Path,
    budget: Budget,
    progress: Callable[[int, dict[str, float]], object] = lambda step, metrics: None,
    tracking: Tracking = JSONL_ONLY,
) -> Length:
    """Train at a learning rate that does not fall yet until the length that ends in time is known, and choose it.

    `loop.train` of the program `of_length` then goes on from the checkpoint that is left. A length that was chosen in
    an earlier call is read, and nothing is trained.

    Args:
        program: the training; its own number of steps and its decay are ignored.
        directory: the training's directory, where the time and the length are kept in `length.json`.
        budget: the time; that of the first call holds.
        progress: see `loop.train`.
        tracking: see `loop.train`.

    Raises:
        UserError: the time is too short, in which case the next call may take another; or an error of `loop.train`.
        Stopped: see `loop.train`.
    """
    known = _read(directory)
    if "num_steps" in known:
        return Length(known["num_steps"], known["decay_steps"])
    seconds = known.get("seconds", hosts.of_first(int(budget.ends - budget.clock())))
    if seconds <= 0:
        raise UserError(f"The time of {directory.name} was over before it had its pictures; {TOO_SHORT}")
    _write(directory, seconds=seconds)
    with compiling_saved() as saved:
        pace = _Pace(program.config.steps_per_dispatch, seconds * (1 - KEPT_BACK), budget, saved)
        train(of_length(program, OPEN), directory, progress, tracking, pace.must_decay)
    length = pace.length()
    if length.decay_steps <= 0 or pace.step < program.config.optimizer.warmup_steps:
        hosts.first_does((directory / FILE).unlink)
        raise UserError(
            f"{directory.name} has {seconds} seconds, which allow {max(0, pace.num_steps)} steps, as starting takes "
            f"{pace.starting:.0f} s and a step {pace.step_seconds:.3g} s; the learning rate alone rises over "
            f"{program.config.optimizer.warmup_steps}; {TOO_SHORT}"
        )
    _write(directory, seconds=seconds, **length._asdict())
    return length


class _Pace:
    """The pace of a training, and the number of steps that its time allows.

    Attributes:
        step: number of steps done.
        num_steps: number of steps that the time allows, those done included; not positive if there is no time.
        step_seconds: mean time of a step.
        starting: seconds in which no step is done.
    """

    def __init__(self, dispatch: int, seconds: float, budget: Budget, saved: Sequence[float]) -> None:
        self.step, self.num_steps, self.step_seconds, self.starting = 0, 0, 0.0, 0.0
        self._dispatch, self._seconds, self._budget, self._saved = dispatch, seconds, budget, saved
        self._began = budget.clock()
        self._first: tuple[int, float] | None = None  # step and time at the end of the first dispatch

    def must_decay(self, step: int, metrics: Metrics) -> bool:
        """Whether the learning rate has to fall from this step on, see `enough` of `loop.train`."""
        jax.block_until_ready(metrics)  # the host is ahead of the devices
        now = self._budget.clock()
        if self._first is None:
            self._first = step, now
        first_step, first_time = self._first
        if step < first_step + MEASURED * self._dispatch:
            return False
        # The steps to come have other learning rates: their program is compiled, too, and never found in the cache.
        self.starting = 2 * (first_time - self._began) + sum(self._saved)
        self.step, self.step_seconds = step, (now - first_time) / (step - first_step)
        self.num_steps = hosts.of_first(int((self._seconds - self.starting) / self.step_seconds))
        return step >= (1 - self._budget.decay_share) * self.num_steps

    def length(self) -> Length:
        """The length of the training if its learning rate falls from here on, in whole dispatches."""
        decay_steps = (self.num_steps - self.step) // self._dispatch * self._dispatch
        return Length(self.step + decay_steps, decay_steps)


@contextlib.contextmanager
def compiling_saved() -> Iterator[list[float]]:
    """Yield a list that gets the seconds of each compilation that JAX's cache makes unnecessary."""
    saved: list[float] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == SAVED:
            saved.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield saved
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def _read(directory: Path) -> dict[str, Any]:
    file = directory / FILE
    try:
        return json.loads(file.read_text()) if file.exists() else {}
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); delete {directory} to begin this training anew.") from error


def _write(directory: Path, **known: int) -> None:
    def write() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / FILE, json.dumps(known))

    hosts.first_does(write)
