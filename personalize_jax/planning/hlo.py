"""The exchanges between devices of a compiled program, read from its text: XLA's cost analysis leaves them out."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|(?:true|false)_computation)=%?([\w.\-]+)")
_CHANNEL = re.compile(r"channel_id=(\d+)")
_GROUPS = re.compile(r"replica_groups=(?:\[\d+,(\d+)\]|\{\{([\d,]*)\}|mesh\[([^\]]*)\][^{]* \{([^}]*)\})")


class Collective(NamedTuple):
    """One exchange between devices.

    Attributes:
        kind: one of `KINDS`.
        bytes: size of the whole array that is gathered, reduced or sent, on one device.
        group: number of devices that exchange with each other.
        in_loop: whether it is in the body of a loop.
    """

    kind: str
    bytes: int
    group: int
    in_loop: bool

    @property
    def received(self) -> float:
        """Bytes that each device receives by the ring algorithm, in which an all-reduce takes two rounds."""
        if self.kind == "collective-permute":
            return self.bytes
        return self.bytes * (self.group - 1) / self.group * (2 if self.kind == "all-reduce" else 1)


def collectives(text: str) -> list[Collective]:
    """The exchanges of a compiled program, each once.

    Args:
        text: `compiled.as_text()`.
    """
    bodies = dict(_computations(text))
    found: dict[str, Collective] = {}

    def visit(name: str, in_loop: bool) -> None:
        for result, operation, rest in bodies.get(name, []):
            kind = operation.removesuffix("-start")
            if kind in KINDS:
                if name.startswith("all-reduce-scatter"):  # an all-reduce that TPUs fuse with slicing its result
                    kind = "reduce-scatter"
                # An asynchronous exchange occurs several times: where it starts, on its way and where it ends.
                channel = _CHANNEL.search(rest)
                group = _group_size(rest)
                size = _result_bytes(result, operation) * (group if operation == "reduce-scatter" else 1)
                found.setdefault(channel[1] if channel else result + rest, Collective(kind, size, group, in_loop))
            for called in dict.fromkeys(_CALLED.findall(rest)):
                visit(called, in_loop or operation == "while")

    visit(next(name for name in bodies if name.startswith("ENTRY ")), False)
    return list(found.values())


def _computations(text: str) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Names of computations, the entry's after "ENTRY ", and (result, operation, rest) of their exchanges and calls."""
    name: str | None = None
    body: list[tuple[str, str, str]] = []
    relevant = (*KINDS, "calls=", "to_apply=", "body=", "_computation=")
    for line in text.splitlines():
        if name is None:
            if header := _COMPUTATION.match(line):
                name, body = f"{header[1] or ''}{header[2]}", []
        elif line == "}":
            yield name, body
            name = None
        elif any(word in line for word in relevant) and (match := _INSTRUCTION.match(line)):
            body.append((match[1], match[2], match[3]))


def _result_bytes(result: str, operation: str) -> int:
    sizes = [_size(*shape) for shape in _SHAPE.findall(result)]
    # The start of an asynchronous exchange yields its operands beside its results.
    return max(sizes) if operation.endswith("-start") else sum(sizes)


def _size(dtype: str, dimensions: str) -> int:
    bits = re.search(r"\d+", dtype)
    return math.ceil((int(bits[0]) if bits else 8) / 8 * math.prod(int(d) for d in dimensions.split(",") if d))


def _group_size(rest: str) -> int:
    match = _GROUPS.search(rest)
    if match is None:
        return 2 if "source_target_pairs" in rest else 1
    if match[1]:
        return int(match[1])
    if match[2] is not None:
        return len(match[2].split(","))
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[3]))
    return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[4]))
