"""Signals, in processes of their own."""

import os
import signal
from pathlib import Path

import pytest

from personalize_jax import interruption

ROOT = Path(__file__).parent.parent


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_first_signal_asks_and_a_second_acts_as_usual(number):
    usual = []
    before = signal.signal(number, lambda *_: usual.append(number))
    try:
        with interruption.on_signals():
            interruption.check()
            send(number)
            assert interruption.requested(0) and not usual
            with pytest.raises(interruption.Stopped):
                interruption.check()
            send(number)
            assert usual == [number]
        with interruption.on_signals():
            interruption.check()  # another command is not asked
    finally:
        signal.signal(number, before)


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruption.on_signals():
            send(signal.SIGINT)
            assert not interruption.requested(0)
    finally:
        signal.signal(signal.SIGINT, before)
