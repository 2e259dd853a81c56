"""Bytes between a device's processor and its main memory, read from a compiled program.

XLA's own "bytes accessed" takes an array that was copied into the processor's memory (VMEM on TPUs) as read from main
memory wherever it is used. Here a layout's memory space decides. Every instruction reads its operands and writes its
result once. A fusion's intermediate values are never written; what only a slice is taken of is read as far as the
slice; and what is updated in place is written as far as the update. Padding of tiles is left out.
"""

import re
from collections import Counter

from personalize_jax.planning.exchanges import KINDS
from personalize_jax.planning.hlo import Computation, Instruction, Module
from personalize_jax.planning.loops import Runs

# Other names for the same bytes, and instructions whose computations are counted by themselves.
_NAMES = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "optimization-barrier"}
_FREE = _NAMES | {"while", "conditional", "call", "async-update"}
_FREE_KERNELS = re.compile(r'custom_call_target="(?:AllocateBuffer|ConcatBitcast)"')
_SLICES = ("slice", "dynamic-slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # the operand that is written into the first
# A fusion that begins, carries on or ends an exchange passes the exchange's arrays on as results that alias operands.
_STARTS, _ENDS = 'custom_call_target="AsyncCollectiveStart"', 'custom_call_target="AsyncCollectiveDone"'
_ALIASES = re.compile(r"\{(\d*)\}: \((\d+), \{\}")


def traffic(module: Module, runs: Runs) -> int:
    """Bytes read from main memory and written to it in a run of a program.

    Args:
        module: the program.
        runs: how often its computations run.
    """
    return sum(times * _of_computation(module, module.computations[name]) for name, times in runs.times.items())


def _of_computation(module: Module, computation: Computation) -> int:
    """Bytes of a computation's own instructions and their fusions."""
    total = 0
    for instruction in computation.instructions.values():
        operation = instruction.operation
        if operation in _FREE or (operation == "custom-call" and _FREE_KERNELS.search(instruction.text)):
            continue
        # An asynchronous instruction has read its operands by its end, and only its end yields the result.
        if not operation.endswith("-done"):
            total += _read(module, computation, instruction)
        if not operation.endswith("-start"):
            total += _written(module, computation, instruction)
    return total


def _read(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Bytes of main memory that an instruction reads, each operand once."""
    passed_on, _ = _passed_on(module, instruction)
    in_memory = {}
    needed: Counter[str] = Counter()
    for i, name in enumerate(instruction.operands):
        in_memory[name] = sum(array.bytes for array in computation.instructions[name].arrays if array.in_memory)
        if in_memory[name] and i not in passed_on:
            needed[name] += _needed_of_operand(module, computation, instruction, i)
    return sum(min(in_memory[name], needed[name]) for name in in_memory)


def _needed_of_operand(module: Module, computation: Computation, instruction: Instruction, i: int) -> int:
    """Bytes of its i-th operand that an instruction needs, if the result is written in place where that is possible."""
    if called := instruction.called("calls"):
        inner = module.computations[called]
        return _needed(module, inner, inner.parameters[i].name)
    if i == 0 and instruction.operation in _SLICES:
        return instruction.bytes
    if i == 0 and instruction.operation in _UPDATES:
        return 0
    return computation.instructions[instruction.operands[i]].bytes


def _needed(module: Module, fused: Computation, name: str) -> int:
    """Bytes of a value that is used inside a fusion."""
    whole = fused.instructions[name].bytes
    if name == fused.root:
        return whole
    total = 0
    for user in fused.instructions.values():
        for i, operand in enumerate(user.operands):
            if operand != name:
                continue
            if user.operation == "bitcast":
                total += _needed(module, fused, user.name)
            elif user.operation in _UPDATES and i == 0 and user.name not in _results(fused):
                total += whole  # not in place: what is updated is used further
            else:
                total += _needed_of_operand(module, fused, user, i)
    return min(whole, total)


def _written(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Bytes of main memory that an instruction writes."""
    maker = instruction
    if instruction.operation.endswith("-done"):
        maker = computation.instructions[instruction.operands[0]]
    _, passed_on = _passed_on(module, maker)
    arrays = instruction.arrays
    sizes = [array.bytes for array in arrays]
    if called := maker.called("calls"):
        fused = module.computations[called]
        results = _results(fused)
        if len(results) == len(arrays):
            sizes = [_updated_by_fusion(module, fused, name) for name in results]
    elif instruction.operation in _UPDATES:
        sizes = [_updated(module, computation, instruction.name)]
    written = zip(arrays, sizes, strict=True)
    return sum(size for i, (array, size) in enumerate(written) if array.in_memory and i not in passed_on)


def _updated(module: Module, computation: Computation, name: str) -> int:
    """Bytes of a value that are written: of an update in place only the new ones."""
    instruction = computation.instructions[name]
    if instruction.operation in _UPDATES:
        return computation.instructions[instruction.operands[_UPDATES[instruction.operation]]].bytes
    if (called := instruction.called("calls")) and len(results := _results(module.computations[called])) == 1:
        return _updated_by_fusion(module, module.computations[called], results[0])
    return instruction.bytes


def _updated_by_fusion(module: Module, fused: Computation, name: str) -> int:
    """The same of a fusion's result; what the fusion itself makes cannot be updated in place."""
    instruction = fused.instructions[name]
    if instruction.operation in _UPDATES:
        base = fused.instructions[_original(fused, instruction.operands[0])]
        if base.operation != "parameter":
            return instruction.bytes
    return _updated(module, fused, name)


def _results(computation: Computation) -> list[str]:
    """Names of what a computation yields; those of a tuple's parts where it yields one."""
    root = computation.instructions[computation.root]
    names = root.operands if root.operation == "tuple" else [root.name]
    return [_original(computation, name) for name in names]


def _original(computation: Computation, name: str) -> str:
    """What a value is another name of."""
    while computation.instructions[name].operation == "bitcast":
        name = computation.instructions[name].operands[0]
    return name


def _passed_on(module: Module, instruction: Instruction) -> tuple[set[int], set[int]]:
    """Operands and results of a fusion that are arrays of an exchange under way."""
    called = instruction.called("calls")
    aliases = _ALIASES.findall(instruction.text) if called else []
    if not aliases or called is None:
        return set(), set()
    fused = module.computations[called]
    if not any(i.operation in KINDS or _ENDS in i.text for i in fused.instructions.values()):
        return set(), set()
    root = fused.instructions[fused.root].text
    operands = {int(i) for _, i in aliases}
    if _STARTS in root:
        operands = set()  # what is sent is read once, here
    elif _ENDS in root:
        operands = set(range(len(instruction.operands)))
    return operands, {int(result or 0) for result, _ in aliases}
