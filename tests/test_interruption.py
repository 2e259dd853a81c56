import os
import signal
import socket
import subprocess
import sys
import time
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
            assert interruption.requested() and not usual
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
            assert not interruption.requested()
    finally:
        signal.signal(signal.SIGINT, before)


def test_processes_of_one_program_stop_at_the_same_step_though_one_was_signalled(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "tests.preempted"]
    together = [subprocess.Popen([*command, str(i), coordinator, str(tmp_path)], cwd=ROOT) for i in range(2)]
    try:
        while not all((tmp_path / f"going_{i}").exists() for i in range(2)):
            assert all(process.poll() is None for process in together)
            time.sleep(0.05)
        together[1].terminate()
        assert [process.wait(timeout=120) for process in together] == [0, 0]
    finally:
        for process in together:
            process.kill()
    steps = {(tmp_path / f"stopped_{i}").read_text() for i in range(2)}
    assert len(steps) == 1
