"""Stopping early without losing work.

SIGTERM, which a machine gets that is about to be taken away, or Ctrl-C asks a command to stop. It does so where nothing
is lost: a training saves its state after the steps that are under way, and drawing ends between two batches. Whatever
else a command was doing is done again by the next call, as after a crash.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

STATUS = os.EX_TEMPFAIL  # 75, the exit status that says: stopped after saving, start again

_asked = False  # signals reach the process, so this is the process's, too
_agreed = False  # likewise, where there are several processes
_count = 0  # how often this one has asked the others, or as often as the one that has most


class Stopped(Exception):
    """What was being done has been stopped on request, after saving it."""


@contextlib.contextmanager
def on_signals() -> Iterator[None]:
    """Let the first SIGTERM or SIGINT ask to stop; a second one acts as usual.

    For the main thread; and before several processes join. JAX then takes SIGTERM for itself, to tell all of them, and
    keeps it: only SIGINT is handled here from then on.
    """
    global _asked
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT) if _is_ours(number)}
    # Not what is to be ignored, nor what another library has taken, which shows as None.
    handlers = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}

    def restore() -> None:
        for number, handler in handlers.items():
            if _is_ours(number):
                signal.signal(number, handler)

    def ask(number: int, _: FrameType | None) -> None:
        global _asked
        _asked = True
        restore()
        # Printing is no option: the signal may have come in the midst of it.
        os.write(2, f"\n{signal.Signals(number).name}: stopping once it is saved; again to stop at once.\n".encode())

    for number in handlers:
        signal.signal(number, ask)
    try:
        yield
    finally:
        restore()
        _asked = False


def _is_ours(number: int) -> bool:
    """Whether a signal is not JAX's, which takes SIGTERM when processes join."""
    return number == signal.SIGINT or not jax.distributed.is_initialized()


def requested() -> bool:
    """Whether to save and stop now.

    Processes of one program are told alike, at the same time of asking, even if the signal came to one of them only: by
    the preemption service of `jax.distributed`, which has a SIGTERM handler of its own and, once there was a signal,
    names the time after the last one at which any of them has asked. So they must ask equally often, but within
    `hosts.each_does`, which makes the counts equal again.
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
    """How often this process has asked the others whether to stop."""
    return _count


def count_on_from(highest: int) -> None:
    """Count as the process does that has asked most often; for all of them at once.

    None has passed the time at which all stop, as that comes after the last one at which any of them had asked.
    """
    global _count
    _count = highest


def check() -> None:
    """Stop here, where there is nothing to save, if that is asked for.

    Raises:
        Stopped: it is.
    """
    if requested():
        raise Stopped
