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
_times = 0  # that this one has asked


class Stopped(Exception):
    """What was being done has been stopped on request, after saving it."""


@contextlib.contextmanager
def on_signals() -> Iterator[None]:
    """Let the first SIGTERM or SIGINT ask to stop; a second one acts as usual.

    For the main thread; and before several processes join, so that JAX's own handler of SIGTERM has the last word.
    """
    global _asked
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    # Not what is to be ignored, nor what another library has taken, which shows as None.
    handlers = {number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def ask(number: int, _: FrameType | None) -> None:
        global _asked
        _asked = True
        restore()
        if jax.distributed.is_initialized():
            os.kill(os.getpid(), signal.SIGTERM)  # which tells the others, too
        # Printing is no option: the signal may have come in the midst of it.
        os.write(2, f"\n{signal.Signals(number).name}: stopping once it is saved; again to stop at once.\n".encode())

    for number in handlers:
        signal.signal(number, ask)
    try:
        yield
    finally:
        restore()
        _asked = False


def requested() -> bool:
    """Whether to save and stop now.

    Processes of one program ask equally often. They are told alike, at the same time of asking, even if the signal came
    to one of them only: by the preemption service of `jax.distributed`, which has a SIGTERM handler of its own.
    """
    global _agreed, _times
    if not jax.distributed.is_initialized():
        return _asked
    if not _agreed:
        _times += 1
        _agreed = multihost_utils.reached_preemption_sync_point(_times)
    return _agreed


def check() -> None:
    """Stop here, where there is nothing to save, if that is asked for.

    Raises:
        Stopped: it is.
    """
    if requested():
        raise Stopped
