"""The exchanges between devices of a compiled program: XLA's cost analysis leaves them out."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from personalize_jax.planning.hlo import Instruction, Module
from personalize_jax.planning.loops import Runs

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]*)\}|mesh\[([^\]]*)\][^{]* \{([^}]*)\})")


class Collective(NamedTuple):
    """An exchange between devices.

    Attributes:
        kind: one of `KINDS`.
        bytes: size of the whole array that is gathered, reduced or sent, on one device.
        group: number of devices that exchange with each other.
        runs: how often a run of the program makes it.
    """

    kind: str
    bytes: int
    group: int
    runs: float

    @property
    def received(self) -> float:
        """Bytes that each device receives in all runs, by the ring algorithm: an all-reduce takes two rounds of it."""
        if self.kind == "collective-permute":
            return self.runs * self.bytes
        rounds = 2 if self.kind == "all-reduce" else 1
        return self.runs * rounds * self.bytes * (self.group - 1) / self.group


def collectives(module: Module, runs: Runs) -> list[Collective]:
    """The exchanges of a compiled program, each once.

    Args:
        module: the program.
        runs: how often its computations run.
    """
    # An asynchronous exchange occurs several times: where it starts, on its way and where it ends.
    found: dict[str, Collective] = {}
    for computation, times in runs.times.items():
        for name, instruction in _exchanging(module, computation):
            channel = _CHANNEL.search(instruction.text)
            key = channel[1] if channel else instruction.result + instruction.text
            found.setdefault(key, _collective(name, instruction, times))
    return list(found.values())


def _exchanging(module: Module, name: str) -> Iterator[tuple[str, Instruction]]:
    """The exchanges of a computation and of its fusions, after the names of the computations in which they are."""
    for instruction in module.computations[name].instructions.values():
        if instruction.operation.removesuffix("-start") in KINDS:
            yield name, instruction
        if called := instruction.called("calls"):
            yield from _exchanging(module, called)


def _collective(computation: str, instruction: Instruction, runs: int) -> Collective:
    kind, group = instruction.operation.removesuffix("-start"), _group_size(instruction.text)
    sizes = [array.bytes for array in instruction.arrays]
    # The start of an asynchronous exchange yields its operands beside its results.
    size = max(sizes) if instruction.operation.endswith("-start") else sum(sizes)
    if kind == "reduce-scatter":
        size *= group
    if computation.startswith("all-reduce-scatter"):  # an all-reduce that TPUs fuse with slicing its result
        kind = "reduce-scatter"
    return Collective(kind, size, group, runs)


def _group_size(text: str) -> int:
    match = _GROUPS.search(text)
    if match is None:
        return 2 if "source_target_pairs" in text else 1
    if match[1]:
        return int(match[1])
    if match[2] is not None:
        return len(match[2].split(","))
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[3]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[4]))
