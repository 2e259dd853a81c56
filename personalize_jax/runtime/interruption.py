"""Stopping early without losing work.

SIGTERM, which a machine gets before it is preempted, or Ctrl-C asks a command to stop. It stops where nothing is lost:
a training saves its state after the current dispatch, and sampling ends between two batches. Any other work is done
again by the next call, as after a crash.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

STATUS = os.EX_TEMPFAIL  # 75, the exit status that says: stopped after saving, start again

# Signals reach the process, so its state is global, too.
_asked = False  # whether a signal has asked this process to stop
_agreed = False  # whether several processes have agreed to stop
_count = 0  # the number of times that this process has asked the others


class Stopped(Exception):
    """The work has been stopped on request, after saving."""


@contextlib.contextmanager
def on_signals() -> Iterator[None]:
    """Have the first SIGTERM or SIGINT ask to stop; a second one acts as usual.

    To be entered in the main thread, and before several processes join: JAX then takes over SIGTERM, to tell all of
    them, and only SIGINT is handled here from then on.
    """
    global _asked
    # Not signals that are ignored, nor those that another library has taken, whose handler shows as None.
    handlers = {
        number: handler
        for number in (signal.SIGTERM, signal.SIGINT)
        if _is_ours(number) and (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None)
    }

    def restore() -> None:
        for number, handler in handlers.items():
            if _is_ours(number):
                signal.signal(number, handler)

    def ask(number: int, _: FrameType | None) -> None:
        global _asked
        _asked = True
        restore()
        # Not print, which the signal may have interrupted.
        os.write(2, f"\n{signal.Signals(number).name}: stopping once it is saved; again to stop at once.\n".encode())

    for number in handlers:
        signal.signal(number, ask)
    try:
        yield
    finally:
        restore()
        _asked = False


def _is_ours(number: int) -> bool:
    """Whether a signal is handled here: JAX takes over SIGTERM when processes join."""
    return number == signal.SIGINT or not jax.distributed.is_initialized()


def requested() -> bool:
    """Whether to save and stop now.

    All processes of a program get the same answer at the same call, even if only one of them got the signal: the
    preemption service of `jax.distributed` handles SIGTERM, and then chooses a call that none of them has made yet. So
    all must call this equally often, except within `hosts.each_does`, which makes their counts equal again.
    """
    global _agreed, _asked, _count
    if not jax.distributed.is_initialized():
        return _asked
    if _asked:  # by Ctrl-C, or before the processes have joined
        _asked = False
        os.kill(os.getpid(), signal.SIGTERM)
    if not _agreed:
        _count += 1
        _agreed = multihost_utils.reached_preemption_sync_point(_count)
    return _agreed


def count() -> int:
    """The number of times that this process has asked the others whether to stop."""
    return _count


def set_count(highest: int) -> None:
    """Set this process's count to the highest of all processes, in all of them at once.

    None of them misses the call at which all stop, as that comes after the latest call of any of them.
    """
    global _count
    _count = highest


def check() -> None:
    """Stop here, where there is nothing to save, if a stop is requested.

    Raises:
        Stopped: a stop is requested.
    """
    if requested():
        raise Stopped
