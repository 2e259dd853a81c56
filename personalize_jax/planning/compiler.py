"""What the compiler says of a program, without waiting for its machine code.

XLA first optimises a program, places its exchanges and gives every array its place in memory, which takes a large
program minutes, and then writes machine code, which it had not done after forty minutes of a core. What a plan needs is
known in between, where XLA writes it down; so it is read there, and the compiler is stopped by ending its process. This
is kept too, so that nothing is asked twice: JAX's cache keeps programs for devices that are not there, but cannot read
them again.
"""

import hashlib
import importlib.metadata
import inspect
import json
import multiprocessing
import os
import re
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax

# The only way to XLA's own counts for a program that is not compiled to its end.
from jaxlib import _hlo, _jax  # type: ignore[attr-defined]

from personalize_jax.models.attention import flash_flops
from personalize_jax.planning import hlo
from personalize_jax.planning.hlo import Collective
from personalize_jax.runtime import interruption
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import write_text

_FOLDER = "plans"  # beside the compiled programs that JAX keeps
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
T = TypeVar("T")
_CACHE_FOLDER = "jax_compilation_cache_dir"
_SETTINGS = ("jax_platforms", _CACHE_FOLDER)
_PROGRAM, _MEMORY = "after_optimizations.txt", "after_optimizations-memory-usage-report.txt"
_WRITTEN = "after_optimizations_after_buffer_assignment.txt"  # what follows the other two
_TOTAL = re.compile(r"Memory Space: default.*\nTotal bytes: (\d+)")
_PAUSE = 0.2  # seconds


class Verdict(NamedTuple):
    """The compiler's figures for one device, or why it refuses the program.

    Attributes:
        memory: bytes that the program needs at once, with its arguments and results, without its own code.
        flops: operations.
        traffic: bytes read from memory and written to it, without those that fill up tiles.
        exchanges: what is sent between devices.
        refusal: the compiler's words, or "".
        seconds: of compiling, up to this.
    """

    memory: int = 0
    flops: float = 0.0
    traffic: float = 0.0
    exchanges: tuple[Collective, ...] = ()
    refusal: str = ""
    seconds: float = 0.0


def apart(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a process of its own, with which compilers end that `ask` no longer waits for.

    Args:
        function: of a module.
        arguments: for it; they and what it returns are sent between the processes.

    Raises:
        UserError: the function does, or its process was killed.
        Stopped: this one was asked to stop.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    settings = {name: getattr(jax.config, name) for name in _SETTINGS}
    process = context.Process(target=_answer, args=(theirs, settings, function, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        while not ours.poll(_PAUSE):
            interruption.check()
        answer = ours.recv()
    except EOFError:
        process.join()
        how = f"ended with status {process.exitcode}"
        raise UserError(f"The compiler {how}; -9 means too little memory here: large programs take it 10 GB.") from None
    finally:
        process.kill()
        process.join()
    if isinstance(answer, Exception):
        raise answer
    return answer


def _answer(
    connection: Connection, settings: dict[str, Any], function: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both, and is for the asking one
    for name, value in settings.items():
        jax.config.update(name, value)
    try:
        connection.send(function(*arguments))
    except Exception as error:
        connection.send(error)
    os._exit(0)  # without waiting for compilers


def ask(lowered: jax.stages.Lowered, devices: Sequence[jax.Device]) -> Verdict:
    """Compile a program as far as figures need, or read what was kept of the same one for devices and versions.

    The compiler goes on behind, until the process ends (see `apart`). A refusal is not kept: it comes early, and may be
    for another reason than the program.

    Args:
        lowered: the program.
        devices: that it is for.
    """
    file = _file(lowered, devices)
    if file is not None and file.exists():
        kept = json.loads(file.read_text())
        return Verdict(**kept | {"exchanges": tuple(Collective(*e) for e in kept["exchanges"])})
    verdict = _compile(lowered, len(devices))
    if file is not None and not verdict.refusal:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(verdict._asdict()))
    return verdict


def _compile(lowered: jax.stages.Lowered, num_devices: int) -> Verdict:
    start, refused = time.monotonic(), []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # the compiler may write there later

        def to_the_end() -> None:
            try:
                lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
            except jax.errors.JaxRuntimeError as error:
                refused.append(str(error))

        compiler = threading.Thread(target=to_the_end, daemon=True)
        compiler.start()
        while compiler.is_alive() and not _written(folder, _WRITTEN):
            compiler.join(_PAUSE)
        seconds = time.monotonic() - start
        if refused:
            return Verdict(refusal=refused[0], seconds=seconds)
        files = [_written(folder, name) for name in (_PROGRAM, _MEMORY)]
        program, memory = (file.read_text() if file else None for file in files)
    total = _TOTAL.search(memory or "")
    if program is None or total is None:
        known = "take the version of libtpu in tests/requirements.txt"
        raise UserError(f"The compiler of {', '.join(_compilers())} writes no {_PROGRAM}, or no {_MEMORY}; {known}.")
    counts = _jax.hlo_module_cost_analysis(
        jax.local_devices(backend="cpu")[0].client, _hlo.hlo_module_from_text(program)
    )
    return Verdict(
        memory=int(total[1]),
        flops=counts["flops"] + flash_flops(program),
        traffic=counts["bytes accessed"],
        exchanges=tuple(hlo.collectives(program)) if num_devices > 1 else (),
        seconds=seconds,
    )


def _written(folder: str, name: str) -> Path | None:
    return next(Path(folder).glob(f"*{name}"), None)


def _file(lowered: jax.stages.Lowered, devices: Sequence[jax.Device]) -> Path | None:
    """Where the verdict is kept; None where JAX keeps no programs."""
    if not (cache := getattr(jax.config, _CACHE_FOLDER)):
        return None
    named = [f"{device.device_kind} {device!r}" for device in devices]  # a v4 and a v5p look alike otherwise
    made_of = [lowered.as_text(), *named, *(os.environ.get(flag, "") for flag in _FLAGS)]
    made_of += [*_compilers(), *(inspect.getsource(reads) for reads in (_compile, flash_flops, hlo))]
    return Path(cache) / _FOLDER / f"{hashlib.sha256('|'.join(made_of).encode()).hexdigest()}.json"


def _compilers() -> list[str]:
    found = [d for name in ("jax", "jaxlib", "libtpu") for d in importlib.metadata.distributions(name=name)]
    return [f"{d.metadata['Name']}=={d.version}" for d in found]
