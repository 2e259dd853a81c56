"""How often each computation of a compiled program runs: XLA's own counts take the body of a loop once.

XLA for TPUs writes no number of rounds into a program. It is found as the device would find it, by computing: the few
integers that a loop's condition depends on start as constants, and each round gives their next values.
"""

import operator
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from personalize_jax.planning.hlo import Computation, Instruction, Module

# An integer, a tuple, or None for all that is not followed: arrays, fractions, what depends on a device or on data.
Value = int | tuple["Value", ...] | None

_LIMIT = 100_000  # rounds that are followed
_STATED = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SCALAR = re.compile(r"(pred|[su]\d+)\[\]")
_COPIES = ("copy", "bitcast", "convert", "optimization-barrier")
_COMPARISONS = {"EQ": "eq", "NE": "ne", "LT": "lt", "LE": "le", "GT": "gt", "GE": "ge"}
_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "and": operator.and_,
    "or": operator.or_,
    "minimum": min,
    "maximum": max,
}


class Runs(NamedTuple):
    """How often the computations of a program run.

    Attributes:
        times: number of runs by name, for the entry, bodies of loops, branches and whatever is called; without what
            fusions compute.
        repeats: of bodies of loops, how many of these runs XLA's counts leave out.
        unknown: loops whose rounds cannot be told from the program, counted as one.
    """

    times: Counter[str]
    repeats: Counter[str]
    unknown: tuple[str, ...]


def count_runs(module: Module) -> Runs:
    """Follow a program from its entry. Of a condition, every branch is taken."""
    times: Counter[str] = Counter()
    repeats: Counter[str] = Counter()
    unknown: dict[str, None] = {}

    def run(name: str, argument_values: list[Value], often: int) -> None:
        times[name] += often
        values = _Values(module, module.computations[name], argument_values)
        for instruction in values.computation.instructions.values():
            operation, operands = instruction.operation, instruction.operands
            if operation == "while":
                loop = values.loop(instruction)
                if loop.rounds is None:
                    unknown[instruction.name] = None
                rounds = 1 if loop.rounds is None else loop.rounds
                repeats[loop.body] += often * (rounds - 1)
                run(loop.body, [loop.constant], often * rounds)
            elif operation == "conditional":
                for branch, argument in zip(instruction.branches, operands[1:], strict=True):
                    run(branch, [values[argument]], often)
            elif operation == "call" and (called := instruction.called("to_apply")):
                run(called, [values[operand] for operand in operands], often)
            else:
                values[instruction.name]  # operands before their users, so that chains of any length can be followed

    run(module.entry, [None] * len(module.computations[module.entry].parameters), 1)
    return Runs(times, repeats, tuple(unknown))


class _Loop(NamedTuple):
    """A loop: its body, its rounds if they can be told, its state before it, and that in all rounds and after it."""

    body: str
    rounds: int | None
    constant: Value
    after: Value


class _Values:
    """The integers that a computation computes from its arguments, each found when it is asked for."""

    def __init__(self, module: Module, computation: Computation, arguments: list[Value]) -> None:
        self.module = module
        self.computation = computation
        self.arguments = arguments
        self.found: dict[str, Value] = {}
        self.loops: dict[str, _Loop] = {}

    def __getitem__(self, name: str) -> Value:
        if name not in self.found:
            instruction = self.computation.instructions[name]
            followed = instruction.result.startswith("(") or _SCALAR.match(instruction.result)
            self.found[name] = self._compute(instruction) if followed else None
        return self.found[name]

    def _compute(self, instruction: Instruction) -> Value:
        operation, text = instruction.operation, instruction.text
        if operation == "parameter":
            return self.arguments[int(text.split(")")[0])]
        if operation == "constant":
            literal = text.split(")")[0]
            return int(literal) if literal.lstrip("-").isdigit() else {"true": 1, "false": 0}.get(literal)
        if operation == "while":
            return self.loop(instruction).after
        if operation not in ("tuple", "get-tuple-element", "fusion", "call", "compare", *_COPIES, *_ARITHMETIC):
            return None
        values = [self[operand] for operand in instruction.operands]
        if operation == "tuple":
            return tuple(values)
        if operation == "get-tuple-element":
            return values[0][int(text.split("index=")[1].split(",")[0])] if isinstance(values[0], tuple) else None
        if operation in _COPIES:
            return values[0]
        if called := instruction.called("calls") or instruction.called("to_apply"):
            return self._result(called, values)
        a, b = values
        if not isinstance(a, int) or not isinstance(b, int):
            return None
        if operation == "compare":
            return int(getattr(operator, _COMPARISONS[text.split("direction=")[1][:2]])(a, b))
        return _ARITHMETIC[operation](a, b)

    def _result(self, called: str, arguments: list[Value]) -> Value:
        computation = self.module.computations[called]
        return _Values(self.module, computation, arguments)[computation.root]

    def loop(self, instruction: Instruction) -> _Loop:
        """What can be told of a loop; the state of a round that differs between rounds cannot."""
        if instruction.name not in self.loops:
            self.loops[instruction.name] = self._follow(instruction)
        return self.loops[instruction.name]

    def _follow(self, instruction: Instruction) -> _Loop:
        body, condition = instruction.called("body"), instruction.called("condition")
        assert body is not None and condition is not None
        before = self[instruction.operands[0]]
        constant = before
        while (after := _common(constant, self._result(body, [constant]))) != constant:
            constant = after
        if stated := _STATED.search(instruction.text):
            return _Loop(body, int(stated[1]), constant, constant)
        state = before
        for rounds in range(_LIMIT):
            goes_on = self._result(condition, [state])
            if goes_on is None:
                break
            if not goes_on:
                return _Loop(body, rounds, constant, state)
            state = self._result(body, [state])
        return _Loop(body, None, constant, constant)


def _common(a: Value, b: Value) -> Value:
    """What two states have in common."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return tuple(map(_common, a, b))
    return a if a == b else None
