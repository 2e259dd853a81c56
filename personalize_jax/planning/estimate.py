"""Least times by a roofline, of a step and of whole runs."""

import math
from typing import NamedTuple

from personalize_jax.planning.programs import Usage
from personalize_jax.planning.slices import Topology

USABLE = 0.98  # share of a chip's memory that the runtime leaves to programs


class Roofline(NamedTuple):
    """Seconds for which a step occupies each resource; it takes at least the largest of them.

    Attributes:
        compute: time at the chip's rate of bfloat16 operations.
        memory: time at the bandwidth of its memory.
        network: time at the bandwidth of the links along one dimension of the slice: two links in a ring, one in a
            line.
    """

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        """The least time of the step."""
        return max(self)

    @property
    def bound(self) -> str:
        """The name of the resource that sets the least time."""
        return max(zip(self, self._fields, strict=True))[1]


def roofline(usage: Usage, topology: Topology) -> Roofline:
    """The least time of a step on a slice; NaN where the program does not fit.

    A step is slower in practice: operations wait for each other, and matrices do not fill the units.
    """
    chip = topology.chip
    links = 2 if any(side % chip.ring == 0 for side in topology.shape) else 1  # the ends of a line have one
    return Roofline(
        usage.flops / chip.flops,
        usage.bytes / chip.hbm_bandwidth,
        usage.received() / (links * chip.link_bandwidth) if usage.compiled else math.nan,
    )


def fits(usage: Usage, topology: Topology) -> bool:
    """Whether the compiler accepts the program and a chip has enough memory for it."""
    return usage.compiled and usage.total <= USABLE * topology.chip.hbm_bytes


class Run(NamedTuple):
    """How often each program of a personalisation runs.

    Attributes:
        tuning: training steps by stage.
        class_batches: (number of batches, sampling steps a batch) of class images, by stage.
        picture_batches: the same for the pictures that are evaluated, of one subject.
    """

    tuning: dict[str, int]
    class_batches: dict[str, tuple[int, int]]
    picture_batches: dict[str, tuple[int, int]]


def part_seconds(run: Run, train_step: dict[str, float], sampling_step: dict[str, float]) -> dict[str, float]:
    """The least time of each part of a run.

    Args:
        run: how often each program runs.
        train_step: seconds of a training step by stage.
        sampling_step: seconds of a sampling step by stage.
    """

    def sampling(batches: dict[str, tuple[int, int]]) -> float:
        return sum(count * num_steps * sampling_step[stage] for stage, (count, num_steps) in batches.items())

    return {
        "class images": sampling(run.class_batches),
        "tuning": sum(count * train_step[stage] for stage, count in run.tuning.items()),
        "evaluation": sampling(run.picture_batches),
    }
