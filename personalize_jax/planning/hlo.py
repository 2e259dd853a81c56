"""A compiled program, read from its text: computations, their instructions, and the sizes of arrays."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_END_OF_OPERANDS = re.compile(r"\)(?:, [\w\-]+=|$)")
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_ELSEWHERE = re.compile(r"S\([1-9]\d*\)")  # a memory space: 0, the default, is not written
_FRAMES = re.compile(r" ?stack_frame_id=\d+")  # they refer to a list at the head of the program
_BRANCHES = re.compile(r"(?:branch_computations=\{|(?:true|false)_computation=)(%[\w.\-]+(?:, %[\w.\-]+)*)")


class Shaped(NamedTuple):
    """An array that an instruction yields.

    Attributes:
        bytes: its size, padding of tiles excluded.
        in_memory: whether it is in the device's main memory, HBM on TPUs, and not in VMEM or another space.
    """

    bytes: int
    in_memory: bool


class Instruction(NamedTuple):
    """An instruction of a computation.

    Attributes:
        name: unique in the program.
        result: type and layout of what it yields, an array or a tuple.
        operation: such as "fusion".
        operands: names of instructions of the same computation.
        text: what stands in the parentheses after the operation, and its attributes.
    """

    name: str
    result: str
    operation: str
    operands: tuple[str, ...]
    text: str

    @property
    def arrays(self) -> list[Shaped]:
        """The arrays that it yields: one, or the leaves of a tuple."""
        return [Shaped(_size(*found[:2]), not _ELSEWHERE.search(found[2])) for found in _ARRAY.findall(self.result)]

    @property
    def bytes(self) -> int:
        """The size of all that it yields."""
        return sum(array.bytes for array in self.arrays)

    @property
    def branches(self) -> list[str]:
        """The computations of a "conditional", of which one is run."""
        return [name for found in _BRANCHES.findall(self.text) for name in _NAME.findall(found)]

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute names: calls, to_apply, body or condition."""
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.text)
        return match[1] if match else None


class Computation(NamedTuple):
    """A computation: the program's entry, the body of a loop, what a fusion computes.

    Attributes:
        instructions: by name, in the order in which they run.
        root: the name of the one that yields the result.
        text: all of it.
    """

    instructions: dict[str, Instruction]
    root: str
    text: str

    @property
    def parameters(self) -> list[Instruction]:
        """The instructions that yield its arguments, in order."""
        found = [i for i in self.instructions.values() if i.operation == "parameter"]
        return sorted(found, key=lambda instruction: int(instruction.text.split(")")[0]))


class Module(NamedTuple):
    """A compiled program.

    Attributes:
        computations: by name; those that another calls stand before it.
        entry: the name of the one that is run.
    """

    computations: dict[str, Computation]
    entry: str

    def alone(self, name: str) -> str:
        """The text of a program whose entry is one of the computations."""
        needed = {name}
        for other in reversed(self.computations):
            if other in needed:
                needed.update(n for n in _NAME.findall(self.computations[other].text) if n in self.computations)
        texts = [f"{'ENTRY ' if n == name else ''}{c.text}" for n, c in self.computations.items() if n in needed]
        return _FRAMES.sub("", "\n\n".join(["HloModule alone", *texts]))


def read(text: str) -> Module:
    """Read a program.

    Args:
        text: `compiled.as_text()`, or what XLA dumps after its optimisations.
    """
    computations, entry = {}, ""
    for header, lines in _blocks(text):
        instructions, root = {}, ""
        for line in lines:
            if match := _INSTRUCTION.match(line):
                is_root, name, result, operation, rest = match.groups()
                end = _END_OF_OPERANDS.search(rest)
                assert end is not None, f"{name}: {rest}"
                operands = tuple(_NAME.findall(rest[: end.start()]))
                instructions[name] = Instruction(name, result, operation, operands, rest)
                root = name if is_root else root
        whole = "\n".join([header[0].removeprefix("ENTRY "), *lines, "}"])
        computations[header[2]] = Computation(instructions, root, whole)
        entry = header[2] if header[1] else entry
    return Module(computations, entry)


def _blocks(text: str) -> Iterator[tuple[re.Match[str], list[str]]]:
    """The header of each computation and the lines of its body."""
    header: re.Match[str] | None = None
    lines: list[str] = []
    for line in text.splitlines():
        if header is None:
            header, lines = _COMPUTATION.match(line), []
        elif line == "}":
            yield header, lines
            header = None
        else:
            lines.append(line)


def _size(dtype: str, dimensions: str) -> int:
    bits = re.search(r"\d+", dtype)
    return math.ceil((int(bits[0]) if bits else 8) / 8 * math.prod(int(d) for d in dimensions.split(",") if d))
