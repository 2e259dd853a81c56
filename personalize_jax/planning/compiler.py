"""The compiler's analysis of a program, without waiting for its machine code.

XLA first optimises a program, places its exchanges and gives every array its place in memory, which takes minutes for a
large program. Then it generates machine code, which had not ended after forty minutes on one core. A plan only needs
the results of the first part, which XLA dumps to files: they are read there, and the compiler is stopped by killing its
process. The analysis is cached, because JAX's own cache cannot read back programs for devices that are not there.
"""

import hashlib
import importlib.metadata
import inspect
import json
import multiprocessing
import os
import re
import signal
import sys
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

from personalize_jax.models import attention
from personalize_jax.planning import exchanges, hlo, loops, traffic
from personalize_jax.planning.exchanges import Collective
from personalize_jax.runtime import interruption
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import write_text

_FOLDER = "plans"  # in the folder of JAX's compilation cache
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
T = TypeVar("T")
_CACHE_FOLDER = "jax_compilation_cache_dir"
_SETTINGS = ("jax_platforms", _CACHE_FOLDER)
_PROGRAM, _MEMORY = "after_optimizations.txt", "after_optimizations-memory-usage-report.txt"
_LAST_DUMP = "after_optimizations_after_buffer_assignment.txt"  # written after the other two
_TOTAL = re.compile(r"Memory Space: default.*\nTotal bytes: (\d+)")
_PAUSE = 0.2  # seconds


class Analysis(NamedTuple):
    """The compiler's figures for one device, or the reason why it refuses the program.

    Attributes:
        memory: peak memory in bytes, arguments and results included, the program's code excluded.
        flops: number of operations.
        traffic: bytes read from memory and written to it, padding of tiles excluded.
        exchanges: the collectives between devices.
        unknown_loops: number of loops that are counted once, because the program does not tell how often they run.
        refusal: the compiler's error message, or "".
        seconds: time spent compiling.
    """

    memory: int = 0
    flops: float = 0.0
    traffic: float = 0.0
    exchanges: tuple[Collective, ...] = ()
    unknown_loops: int = 0
    refusal: str = ""
    seconds: float = 0.0


def run_in_subprocess(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function in a new process, which is killed afterwards together with the compilers that `analyse` left.

    Args:
        function: a module-level function.
        arguments: its arguments; they and the result must be picklable.

    Raises:
        UserError: the function raised it, or its process was killed.
        Stopped: this process was asked to stop.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    settings = {name: getattr(jax.config, name) for name in _SETTINGS}
    process = context.Process(target=_send_result, args=(theirs, settings, function, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        while not ours.poll(_PAUSE):
            interruption.check()
        result = ours.recv()
    except EOFError:
        process.join()
        raise UserError(
            f"The compiler ended with status {process.exitcode}; -9 means too little memory here: large programs take "
            "it 10 GB."
        ) from None
    finally:
        process.kill()
        process.join()
    if isinstance(result, Exception):
        raise result
    return result


def _send_result(
    connection: Connection, settings: dict[str, Any], function: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both processes, and the parent handles it
    for name, value in settings.items():
        jax.config.update(name, value)
    try:
        connection.send(function(*arguments))
    except Exception as error:
        connection.send(error)
    os._exit(0)  # without waiting for compilers


def analyse(lowered: jax.stages.Lowered, devices: Sequence[jax.Device]) -> Analysis:
    """Compile a program until its figures are known, or read them from the cache.

    The compiler goes on in a thread until its process ends (see `run_in_subprocess`). A refusal is not cached: it comes
    early, and may have another cause than the program.

    Args:
        lowered: the program.
        devices: the devices that it is lowered for.
    """
    file = _cache_file(lowered, devices)
    if file is not None and file.exists():
        cached = json.loads(file.read_text())
        return Analysis(**cached | {"exchanges": tuple(Collective(*e) for e in cached["exchanges"])})
    analysis = _compile(lowered, len(devices))
    if file is not None and not analysis.refusal:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(analysis._asdict()))
    return analysis


def _compile(lowered: jax.stages.Lowered, num_devices: int) -> Analysis:
    start, refusals = time.monotonic(), []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # the compiler may write there later

        def compile_fully() -> None:
            try:
                lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
            except jax.errors.JaxRuntimeError as error:
                refusals.append(str(error))

        compiler = threading.Thread(target=compile_fully, daemon=True)
        compiler.start()
        while compiler.is_alive() and not _dump(folder, _LAST_DUMP):
            compiler.join(_PAUSE)
        seconds = time.monotonic() - start
        if refusals:
            return Analysis(refusal=refusals[0], seconds=seconds)
        files = [_dump(folder, name) for name in (_PROGRAM, _MEMORY)]
        program, memory = (file.read_text() if file else None for file in files)
    total = _TOTAL.search(memory or "")
    if program is None or total is None:
        raise UserError(
            f"The compiler of {', '.join(_versions())} writes no {_PROGRAM}, or no {_MEMORY}; take the version of "
            "libtpu in tests/requirements.txt."
        )
    module = hlo.read(program)
    runs = loops.count_runs(module)
    return Analysis(
        memory=int(total[1]),
        flops=_flops(module, runs),
        traffic=traffic.traffic(module, runs),
        exchanges=tuple(exchanges.collectives(module, runs)) if num_devices > 1 else (),
        unknown_loops=len(runs.unknown),
        seconds=seconds,
    )


def _flops(module: hlo.Module, runs: loops.Runs) -> float:
    """Operations as XLA counts them, with all rounds of loops and the kernels of attention."""
    kernels = sum(times * attention.flash_flops(module.computations[name].text) for name, times in runs.times.items())
    again = sum(left_out * counted_flops(module.alone(body)) for body, left_out in runs.repeats.items())
    return counted_flops(module.alone(module.entry)) + again + kernels


def counted_flops(program: str) -> float:
    """Operations as XLA counts them, with one round of each loop and without kernels.

    Args:
        program: the text of an HLO module.
    """
    client = jax.local_devices(backend="cpu")[0].client
    return _jax.hlo_module_cost_analysis(client, _hlo.hlo_module_from_text(program)).get("flops", 0.0)


def _dump(folder: str, name: str) -> Path | None:
    return next(Path(folder).glob(f"*{name}"), None)


def _cache_file(lowered: jax.stages.Lowered, devices: Sequence[jax.Device]) -> Path | None:
    """The file that caches a program's analysis; None where JAX's compilation cache is off."""
    if not (cache := getattr(jax.config, _CACHE_FOLDER)):
        return None
    kinds = [f"{device.device_kind} {device!r}" for device in devices]  # the repr alone is the same for v4 and v5p
    options = lowered._lowering._compiler_options_kvs  # type: ignore[attr-defined]  # nothing public tells
    key = [lowered.as_text(), repr(options), *kinds, *(os.environ.get(flag, "") for flag in _FLAGS)]
    sources = (sys.modules[__name__], attention, exchanges, hlo, loops, traffic)
    key += [*_versions(), *(inspect.getsource(code) for code in sources)]
    return Path(cache) / _FOLDER / f"{hashlib.sha256('|'.join(key).encode()).hexdigest()}.json"


def _versions() -> list[str]:
    packages = [d for name in ("jax", "jaxlib", "libtpu") for d in importlib.metadata.distributions(name=name)]
    return [f"{d.metadata['Name']}=={d.version}" for d in packages]
