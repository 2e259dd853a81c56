"""From what programs take to times: the roofline of a step, and of whole runs."""

import math
from typing import NamedTuple

from personalize_jax.planning.programs import Usage
from personalize_jax.planning.slices import Topology

USABLE = 0.98  # share of a chip's memory that is left by what the runtime keeps for itself


class Roofline(NamedTuple):
    """The least time that a step can take: seconds that each resource is needed for, if nothing waits.

    Attributes:
        compute: at the chip's rate of bfloat16 operations.
        memory: at its memory's bandwidth.
        network: at the bandwidth of the links along one dimension of the slice: two where it is a ring, one where a
            line.
    """

    compute: float
    memory: float
    network: float

    @property
    def seconds(self) -> float:
        """Of the resource that is needed longest."""
        return max(self)

    @property
    def bound(self) -> str:
        """The name of that resource."""
        return max(zip(self, self._fields, strict=True))[1]


def roofline(usage: Usage, topology: Topology) -> Roofline:
    """The least time of a step on a slice; not a number where the program does not fit.

    A step is slower in practice: operations wait for each other, and matrices do not fill the units.
    """
    chip = topology.chip
    links = 2 if any(side % chip.ring == 0 for side in topology.shape) else 1  # the ends of a line have but one
    return Roofline(
        usage.rounds * usage.flops / chip.flops,
        usage.rounds * usage.bytes / chip.hbm_bandwidth,
        usage.received() / (links * chip.link_bandwidth) if usage.compiled else math.nan,
    )


def fits(usage: Usage, topology: Topology) -> bool:
    """Whether a chip can hold what the program takes, and the compiler has accepted it."""
    return usage.compiled and usage.total <= USABLE * topology.chip.hbm_bytes


class Run(NamedTuple):
    """How often each program of a personalisation runs.

    Attributes:
        tuning: steps by stage.
        class_batches: batches of class images, and sampling steps a batch, by stage.
        picture_batches: the same of what an evaluation draws for a subject.
    """

    tuning: dict[str, int]
    class_batches: dict[str, tuple[int, int]]
    picture_batches: dict[str, tuple[int, int]]


def seconds(run: Run, steps: dict[str, float], draws: dict[str, float]) -> dict[str, float]:
    """The least time of each part of a run.

    Args:
        run: how often.
        steps: seconds of a training step by stage.
        draws: seconds of a sampling step by stage.
    """

    def drawing(batches: dict[str, tuple[int, int]]) -> float:
        return sum(count * num_steps * draws[stage] for stage, (count, num_steps) in batches.items())

    return {
        "class images": drawing(run.class_batches),
        "tuning": sum(count * steps[stage] for stage, count in run.tuning.items()),
        "evaluation": drawing(run.picture_batches),
    }
