"""Commands and functions in processes of their own, forked from one that has imported what takes seconds to import."""

import multiprocessing
import os
import runpy
import socket
import sys
from pathlib import Path
from typing import NamedTuple

import jax

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    ["orbax.checkpoint", "tests.tiny", "personalize_jax.method.personalization", "personalize_jax.evaluation.showcase"]
)


class Finished(NamedTuple):
    """Exit status, and what was written to standard output and standard error."""

    status: int
    output: str
    error: str


def free_address():
    """Host and port at which several processes can find each other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def start(function, *arguments):
    """A process that calls a function of a module."""
    process = _SERVER.Process(target=function, args=arguments)
    process.start()
    return process


def call(function, *arguments):
    """The exit status of a process that calls a function of a module; -9 if it was killed by signal 9."""
    process = start(function, *arguments)
    process.join()
    return process.exitcode


def command(folder, module, *arguments, before=None):
    """Run `python -m module arguments`.

    Args:
        folder: for what the command prints.
        module: its name.
        *arguments: flags.
        before: a function of a module, called in the new process first.
    """
    files = Path(folder) / "output", Path(folder) / "error"
    status = call(run_module, module, [str(a) for a in arguments], files, before)
    return Finished(status, *(file.read_text() for file in files))


def run_module(module, arguments, files, before=None):
    """Become `python -m module arguments`, with standard output and standard error going to two files."""
    for descriptor, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    if before is not None:
        before()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def without_wandb():
    """Have Weights & Biases not installed in this process."""
    sys.modules["wandb"] = None


def use_devices(count):
    """Have so many CPU devices in this process."""
    jax.config.update("jax_num_cpu_devices", count)
