"""Training metrics, and the places where they are logged.

Every training writes `metrics.jsonl`, one line for each logged step. On request the same numbers, and a run's pictures
and scores, also go to event files for TensorBoard and to Weights & Biases, and a few steps are traced for a profiler.
None of this changes the training or the run's configuration.

step                     number of steps done
loss, ...                metrics of that step
seconds                  time since the line before, compilation included
step_seconds             mean of the steps since then, saving and tracing included, compilation not
images_per_second        pictures trained in that time, of all groups and on all devices
device_memory_gib        the peak so far on the fullest device; on CPU, of this process
tflops_per_second        10^12 operations a second on all devices together, see `Work`
model_flops_utilization  their share of the devices' bfloat16 peak, where that is known
"""

import contextlib
import dataclasses
import functools
import json
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from time import monotonic
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from jax import Array
from ml_collections import ConfigDict

from personalize_jax.models.attention import flash_flops
from personalize_jax.runtime import hosts
from personalize_jax.runtime.chips import GIB, peak_flops
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import naming, write_text
from personalize_jax.training.event_file import event_file
from personalize_jax.training.wandb_run import WandbRun

WARM_UP, TRACED = 2, 3  # dispatches before a trace, and in it

Values = Mapping[str, float | np.ndarray]  # numbers, and pictures as uint8 [H, W, 3], by name


class Work(NamedTuple):
    """The work of one training step, which turns seconds into rates.

    Attributes:
        images: pictures trained in a step.
        flops: operations on all devices together; None where the compiler counts none.
        peak_flops: operations a second that all devices together can do; None where that is not known.
    """

    images: int
    flops: float | None
    peak_flops: float | None

    @classmethod
    def of_program(cls, program: jax.stages.Compiled, images: int, microbatches: int) -> "Work":
        """The work of a compiled training step, as XLA counts it.

        XLA counts the program as each of its devices runs it: what every device does, such as updating replicated
        parameters, is counted on each. The body of a loop counts once, however often it runs: right for the steps of a
        dispatch, while a step's microbatches are multiplied in here, with the little that is outside their loop. On
        TPUs the kernels of "flash" attention are added; on GPUs the work of libraries such as cuDNN is not counted
        at all. Activations that are computed again (`compute.remat`) are counted again.

        Args:
            program: one dispatch, of one step or more.
            images: pictures trained in a step.
            microbatches: parts of the batch that a step's loop goes through.
        """
        counted = (program.cost_analysis() or {}).get("flops")
        if counted and jax.default_backend() == "tpu":
            counted += flash_flops(program.as_text() or "")
        peak = peak_flops(jax.devices()[0].device_kind)
        count = jax.device_count()
        return cls(images, counted and counted * microbatches * count, peak and peak * count)

    def rates(self, step_seconds: float) -> dict[str, float]:
        """`step_seconds`, `images_per_second`, and the rates of operations as far as those are known."""
        rates = {"step_seconds": step_seconds, "images_per_second": self.images / step_seconds}
        if self.flops is not None:
            rates["tflops_per_second"] = self.flops / step_seconds / 1e12
            if self.peak_flops is not None:
                rates["model_flops_utilization"] = self.flops / step_seconds / self.peak_flops
        return rates


@dataclasses.dataclass(frozen=True)
class Tracking:
    """Where one part of a run logs numbers and pictures in addition to `metrics.jsonl`; by default nowhere.

    Attributes:
        tensorboard: the folder for event files, in which each part has its own.
        wandb: the run of Weights & Biases, which may be written to while it is `running`.
        profile: whether to trace a few steps of each training.
        part: the part of the run, such as "base".
    """

    tensorboard: Path | None = None
    wandb: WandbRun | None = None
    profile: bool = False
    part: str = "training"

    def for_part(self, part: str) -> "Tracking":
        """The same destinations for another part of the run."""
        return dataclasses.replace(self, part=part)

    def running(self, config: ConfigDict) -> contextlib.AbstractContextManager[None]:
        """Begin or continue the W&B run, if there is one, and end it afterwards; see `WandbRun.running`."""
        return contextlib.nullcontext() if self.wandb is None else self.wandb.running(config.to_dict())

    @contextlib.contextmanager
    def opened(self, first_step: int) -> Iterator[Callable[[int, Values], None]]:
        """Open the destinations, and yield a function that writes the values of a step to all of them.

        Args:
            first_step: the first step that is written; event files no longer show earlier values from it on.

        Raises:
            OSError: the event file cannot be written.
        """
        with contextlib.ExitStack() as stack:
            writers: list[Callable[[int, Values], None]] = []
            if self.tensorboard is not None:
                writers.append(stack.enter_context(event_file(self.tensorboard / self.part, first_step)))
            if self.wandb is not None:
                writers.append(functools.partial(self.wandb.write, self.part))

            def write(step: int, values: Values) -> None:
                for writer in writers:
                    writer(step, values)

            yield write

    def write(self, step: int, values: Values) -> None:
        """Write numbers and pictures that belong to no training; in event files they replace those from `step` on.

        Raises:
            OSError: the event file cannot be written.
        """
        with self.opened(step) as write:
            write(step, values)


JSONL_ONLY = Tracking()


class Destinations(NamedTuple):
    """The additional places where any run logs its numbers and pictures.

    Attributes:
        tensorboard: whether event files are written, to `tensorboard/` of the run directory.
        wandb: a project of Weights & Biases, or None.
        profile: whether a few steps of each training are traced.
    """

    tensorboard: bool = False
    wandb: str | None = None
    profile: bool = False

    def tracking(self, workdir: Path, name: str | None = None) -> Tracking:
        """These destinations for one run; none in other processes than process 0.

        Args:
            workdir: the run directory.
            name: the run's name at W&B; by default the directory's.

        Raises:
            UserError: Weights & Biases is asked for and not installed.
        """
        run = None if self.wandb is None else WandbRun(workdir, self.wandb, name)
        folder = workdir / "tensorboard" if self.tensorboard else None
        return Tracking(folder, run, self.profile) if hosts.is_first() else JSONL_ONLY


NO_DESTINATIONS = Destinations()


def define_flags() -> None:
    """Define the flags of commands that train."""
    flags.DEFINE_bool("tensorboard", False, "Write event files, too, to tensorboard/ of the run directory.")
    flags.DEFINE_string("wandb", None, "Send numbers and pictures to this project of Weights & Biases, too.")
    flags.DEFINE_bool("profile", False, "Trace a few steps of each training, to profile/ beside its metrics.jsonl.")


def from_flags() -> Destinations:
    """The destinations that the command line names."""
    return Destinations(flags.FLAGS.tensorboard, flags.FLAGS.wandb or None, flags.FLAGS.profile)


class TrainingLog:
    """The log of one training: `metrics.jsonl` without repeats after a resume, other destinations, and a trace."""

    def __init__(self, directory: Path, start_step: int, tracking: Tracking = JSONL_ONLY) -> None:
        """Open the log of a training that continues after `start_step`.

        Args:
            directory: the training's directory, for `metrics.jsonl` and `profile/`.
            start_step: number of steps done; lines of later ones, which will be done again, are dropped.
            tracking: additional destinations.
        """
        self.file = directory / "metrics.jsonl"
        self.latest: dict[str, float] = {}  # the metrics that were written last
        self._tracking, self._step = tracking, start_step
        self._line_time = self._step_time = monotonic()
        self._begun: tuple[Work, Callable[[int, Values], None]] | None = None
        self._stack = contextlib.ExitStack()
        self._trace = _Trace(directory / "profile") if tracking.profile else None
        if hosts.is_first():
            directory.mkdir(parents=True, exist_ok=True)
            lines = self.file.read_text().splitlines(keepends=True) if self.file.exists() else []
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start_step]
            write_text(self.file, "".join(kept))

    def begin(self, work: Work) -> None:
        """Start the clock of steps, once the program is compiled.

        Args:
            work: the work of each step.

        Raises:
            OSError: the event file cannot be written.
        """
        self._begun = work, self._stack.enter_context(self._tracking.opened(self._step + 1))
        self._step_time = monotonic()

    def dispatching(self, step: int, metrics: Mapping[str, Array]) -> contextlib.AbstractContextManager:
        """A context in which steps are dispatched, so that a trace shows them under their number.

        Args:
            step: number of steps done.
            metrics: metrics of the last of them, which are waited for where a trace begins or ends.
        """
        return contextlib.nullcontext() if self._trace is None else self._trace.dispatching(step, metrics)

    def write(self, step: int, metrics: Mapping[str, float | Array]) -> None:
        """Write a line, and the same numbers to the other destinations.

        Args:
            step: number of steps done.
            metrics: metrics of the last of them.

        Raises:
            UserError: a metric is not a finite number.
            OSError: a file cannot be written.
        """
        check_finite(step, metrics)  # which waits for the devices
        assert self._begun is not None, "steps are logged once the training has begun"
        work, write_elsewhere = self._begun
        now = monotonic()
        measured = work.rates((now - self._step_time) / (step - self._step))
        measured["device_memory_gib"] = peak_memory() / GIB
        self.latest = {name: float(value) for name, value in metrics.items()}
        numbers = {
            **self.latest,
            "seconds": round(now - self._line_time, 3),
            **{name: float(f"{value:.6g}") for name, value in measured.items()},
        }
        self._step, self._step_time, self._line_time = step, now, now
        if hosts.is_first():
            with naming(self.file), self.file.open("a") as f:
                f.write(json.dumps({"step": step, **numbers}) + "\n")
        write_elsewhere(step, numbers)

    def close(self) -> None:
        """End a trace that is being made, and close the event file."""
        if self._trace is not None:
            self._trace.stop()
        self._stack.close()


def check_finite(step: int, metrics: Mapping[str, float | Array]) -> None:
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


def peak_memory() -> int:
    """The most bytes that one of this process's devices has held so far; on CPU, that the process itself has."""
    held = [device.memory_stats() for device in jax.local_devices()]
    if all(held):
        return max(stats["peak_bytes_in_use"] for stats in held)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else 1024 * resident


class _Trace:
    """A trace of `TRACED` dispatches, after `WARM_UP` that are not traced."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._dispatches, self._tracing = folder, 0, False

    def dispatching(self, step: int, metrics: Mapping[str, Array]) -> jax.profiler.StepTraceAnnotation:
        if self._dispatches in (WARM_UP, WARM_UP + TRACED):
            jax.block_until_ready(metrics)
            self.stop()
        if self._dispatches == WARM_UP:
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._tracing = True
        self._dispatches += 1
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def stop(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
