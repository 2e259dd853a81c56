"""What a training tells of itself, and where to.

Every training writes `metrics.jsonl`, one line a logged step. On request the same numbers, and the pictures that a run
shows, go to event files for TensorBoard and to Weights & Biases, and a few steps are traced. Nothing of it changes what
is trained, nor what a run is.

step                     number of steps done
loss, ...                of that step
seconds                  since the line before, compiling included
step_seconds             mean of the steps since then, saving and tracing included, compiling not
images_per_second        pictures trained in that time, of all groups and on all devices
device_memory_gib        the peak so far, of the device that holds most; on CPU, of this process
tflops_per_second        10^12 operations, of all devices: see `Work`
model_flops_utilization  their share of the devices' bfloat16 peak, where that is known
"""

import contextlib
import dataclasses
import json
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

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
from personalize_jax.training.event_file import EventFile
from personalize_jax.training.wandb_run import WandbRun

# Keys of a line that differ from run to run of the same training.
MEASURED = (
    *("seconds", "step_seconds", "images_per_second", "device_memory_gib"),
    *("tflops_per_second", "model_flops_utilization"),
)
WARM_UP, TRACED = 2, 3  # dispatches before a trace, and in it


class Work(NamedTuple):
    """What a training step does, by which seconds become rates.

    Attributes:
        images: pictures trained.
        flops: operations on all devices together; None where the compiler counts none.
        peak_flops: of all devices, a second; None where they are not known.
    """

    images: int
    flops: float | None
    peak_flops: float | None

    @classmethod
    def of(cls, program: jax.stages.Compiled, images: int, microbatches: int) -> "Work":
        """The work of a compiled training step, as XLA counts it.

        XLA counts the program as each of its devices runs it: what every device does, such as updating parameters that
        lie whole on all of them, is counted on each. The body of a loop counts once, however often it runs: right for
        the steps of a dispatch, while a step's microbatches are multiplied in here, with the little that is outside
        their loop. On TPUs the backward pass of "flash" attention is added; on GPUs what libraries such as cuDNN do is
        not counted at all. Activations that are computed again (`compute.remat`) are counted again.

        Args:
            program: one dispatch, of one step or more.
            images: pictures trained in a step.
            microbatches: parts of the batch that a step's loop goes through.
        """
        counted = (program.cost_analysis() or {}).get("flops")
        if counted and jax.default_backend() == "tpu":
            counted += flash_flops(program.as_text(), forward=False)
        peak = peak_flops(jax.devices()[0].device_kind)
        count = jax.device_count()
        return cls(images, counted and counted * microbatches * count, peak and peak * count)

    def rates(self, step_seconds: float) -> dict[str, float]:
        """What there is of `step_seconds`, `images_per_second`, and the rates of operations; see above."""
        found = {"step_seconds": step_seconds, "images_per_second": self.images / step_seconds}
        if self.flops is not None:
            found["tflops_per_second"] = self.flops / step_seconds / 1e12
            if self.peak_flops is not None:
                found["model_flops_utilization"] = self.flops / step_seconds / self.peak_flops
        return found


@dataclasses.dataclass(frozen=True)
class Tracking:
    """Where numbers and pictures go besides `metrics.jsonl`; by default nowhere.

    Attributes:
        tensorboard: folder for event files, in which each part of a run has its own.
        wandb: the run of Weights & Biases; to be used while it is `running`.
        profile: whether to trace a few steps of each training.
        part: of the run, such as "base".
    """

    tensorboard: Path | None = None
    wandb: WandbRun | None = None
    profile: bool = False
    part: str = "training"

    def of(self, part: str) -> "Tracking":
        """The same for another part of the run."""
        return dataclasses.replace(self, part=part)

    def running(self, config: ConfigDict) -> contextlib.AbstractContextManager[None]:
        """Begin or go on with the W&B run if there is one, and end it after; see `WandbRun.running`."""
        return contextlib.nullcontext() if self.wandb is None else self.wandb.running(config.to_dict())

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Hand on numbers that are of no training, as `pictures` does.

        Args:
            step: after which they were measured.
            values: by name.

        Raises:
            OSError: the event file cannot be written.
        """
        if self.tensorboard is not None:
            with contextlib.closing(EventFile(self.tensorboard / self.part, step)) as events:
                events.scalars(step, values)
        if self.wandb is not None:
            self.wandb.scalars(self.part, step, values)

    def pictures(self, step: int, pictures: Mapping[str, np.ndarray]) -> None:
        """Hand on pictures; those that were of this step or a later one are replaced.

        Args:
            step: after which they were drawn.
            pictures: uint8 [H, W, 3] by name.

        Raises:
            OSError: the event file cannot be written.
        """
        if self.tensorboard is not None:
            with contextlib.closing(EventFile(self.tensorboard / self.part, step)) as events:
                events.pictures(step, pictures)
        if self.wandb is not None:
            self.wandb.pictures(self.part, step, pictures)


JSONL_ONLY = Tracking()


class Destinations(NamedTuple):
    """Where the numbers and pictures of any run go besides `metrics.jsonl`; `of` says so of one.

    Attributes:
        tensorboard: whether event files are written, to `tensorboard/` of the run directory.
        wandb: a project of Weights & Biases.
        profile: whether a few steps of each training are traced.
    """

    tensorboard: bool = False
    wandb: str | None = None
    profile: bool = False

    def of(self, workdir: Path, name: str | None = None) -> Tracking:
        """Those of a run; of several processes, process 0 writes them.

        Args:
            workdir: run directory.
            name: that the run is shown by; by default the directory's.

        Raises:
            UserError: Weights & Biases is asked for and not installed.
        """
        run = None if self.wandb is None else WandbRun(workdir, self.wandb, name)
        folder = workdir / "tensorboard" if self.tensorboard else None
        return Tracking(folder, run, self.profile) if hosts.is_first() else JSONL_ONLY


NO_DESTINATIONS = Destinations()


def define_flags() -> None:
    """Flags of commands that train."""
    flags.DEFINE_bool("tensorboard", False, "Write event files, too, to tensorboard/ of the run directory.")
    flags.DEFINE_string("wandb", None, "Send numbers and pictures to this project of Weights & Biases, too.")
    flags.DEFINE_bool("profile", False, "Trace a few steps of each training, to profile/ beside its metrics.jsonl.")


def asked_for() -> Destinations:
    """What the command line asks for."""
    arguments = flags.FLAGS
    return Destinations(arguments.tensorboard, arguments.wandb or None, arguments.profile)


class TrainingLog:
    """The log of one training, in all places that are asked for."""

    def __init__(self, directory: Path, start_step: int, tracking: Tracking = JSONL_ONLY) -> None:
        """Open the log of a training that goes on after `start_step`.

        Args:
            directory: of the training, for `metrics.jsonl` and `profile/`.
            start_step: steps that are done; lines of later ones are dropped.
            tracking: other places.
        """
        self._lines = MetricsLog(directory / "metrics.jsonl", start_step)
        self._tracking = tracking
        self._step, self._time = start_step, monotonic()
        self._work: Work | None = None
        self._events: EventFile | None = None
        self._trace = _Trace(directory / "profile") if tracking.profile else None

    @property
    def latest(self) -> dict[str, float]:
        """The metrics that were written last; empty before."""
        return self._lines.latest

    def begin(self, work: Work) -> None:
        """Start the clock, once the program is compiled.

        Args:
            work: of each step.

        Raises:
            OSError: the event file cannot be written.
        """
        if self._tracking.tensorboard is not None:
            self._events = EventFile(self._tracking.tensorboard / self._tracking.part, self._step + 1)
        self._work, self._time = work, monotonic()

    def dispatching(self, step: int, metrics: dict[str, Array]) -> contextlib.AbstractContextManager:
        """To dispatch steps within, so that traces know them.

        Args:
            step: number of steps done.
            metrics: of the last of them, which is waited for where a trace begins or ends.
        """
        return contextlib.nullcontext() if self._trace is None else self._trace.dispatching(step, metrics)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write a line, and the same numbers elsewhere.

        Args:
            step: number of steps done.
            metrics: of the last of them.

        Raises:
            UserError: a metric is not a finite number.
            OSError: a file cannot be written.
        """
        check_finite(step, metrics)  # which waits for the devices
        now = monotonic()
        rates = self._work.rates((now - self._time) / (step - self._step))
        self._step, self._time = step, now
        line = self._lines.write(step, metrics, rates | {"device_memory_gib": peak_memory() / GIB})
        numbers = {name: value for name, value in line.items() if name != "step"}
        if self._events is not None:
            self._events.scalars(step, numbers)
        if self._tracking.wandb is not None:
            self._tracking.wandb.scalars(self._tracking.part, step, numbers)

    def close(self) -> None:
        """Close what is open."""
        if self._trace is not None:
            self._trace.stop()
        if self._events is not None:
            self._events.close()


class MetricsLog:
    """A JSONL file of metrics, one line a logged step, without repeats after a resume."""

    def __init__(self, file: Path, start_step: int) -> None:
        """Open a log; lines after `start_step`, from steps that will be done again, are dropped."""
        self.file = file
        self.latest: dict[str, float] = {}
        self._time = monotonic()
        if not hosts.is_first():
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if file.exists():
            for line in file.read_text().splitlines(keepends=True):
                if line.endswith("\n") and json.loads(line)["step"] <= start_step:
                    kept.append(line)
        write_text(file, "".join(kept))

    def write(
        self, step: int, metrics: Mapping[str, Any], measured: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """Append a line.

        Args:
            step: number of steps done.
            metrics: of the last of them.
            measured: what else the line is to hold; rounded to six digits.

        Returns:
            The line.

        Raises:
            UserError: a metric is not a finite number.
            OSError: the file cannot be written.
        """
        check_finite(step, metrics)
        self.latest = {name: float(value) for name, value in metrics.items()}
        now = monotonic()
        rounded = {name: float(f"{value:.6g}") for name, value in (measured or {}).items()}
        line = {"step": step, **self.latest, "seconds": round(now - self._time, 3), **rounded}
        self._time = now
        if hosts.is_first():
            with naming(self.file), self.file.open("a") as f:
                f.write(json.dumps(line) + "\n")
        return line


def check_finite(step: int, metrics: Mapping[str, Any]) -> None:
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
    """Most bytes that one of this process's devices has held so far; where they do not tell, as CPUs, the process."""
    held = [device.memory_stats() for device in jax.local_devices()]
    if all(held):
        return max(stats["peak_bytes_in_use"] for stats in held)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else 1024 * resident


class _Trace:
    """A trace of `TRACED` dispatches, after `WARM_UP` that are not traced."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._dispatches, self._goes_on = folder, 0, False

    def dispatching(self, step: int, metrics: dict[str, Array]) -> jax.profiler.StepTraceAnnotation:
        if self._dispatches == WARM_UP:
            jax.block_until_ready(metrics)
            jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
            self._goes_on = True
        if self._dispatches == WARM_UP + TRACED:
            jax.block_until_ready(metrics)
            self.stop()
        self._dispatches += 1
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def stop(self) -> None:
        if self._goes_on:
            self._goes_on = False
            jax.profiler.stop_trace()
