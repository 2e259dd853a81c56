import os
import signal
import time

import pytest

from personalize_jax.runtime import interruption
from tests import processes
from tests.preempted import FOREVER, be_preempted
from tests.waiting import PATIENCE


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


@pytest.mark.parametrize(
    ("number", "count", "alone"),
    [
        (signal.SIGINT, 1, 0),
        (signal.SIGTERM, 2, 7),  # then all of them go on, and are told later
        (signal.SIGTERM, 2, FOREVER),  # while one works alone
    ],
)
def test_processes_of_one_program_stop_at_the_same_step_though_one_was_signalled(tmp_path, number, count, alone):
    coordinator = processes.free_address()
    together = [processes.start(be_preempted, i, count, coordinator, tmp_path, alone) for i in range(count)]
    going = {"alone_0"} if alone == FOREVER else {f"together_{i}" for i in range(count)}
    try:
        while not going <= {file.name for file in tmp_path.iterdir()}:
            assert all(process.is_alive() for process in together)
            time.sleep(0.05)
        os.kill(together[-1].pid, number)
        for process in together:
            process.join(PATIENCE)
        assert [process.exitcode for process in together] == [0] * count
    finally:
        for process in together:
            process.kill()
    steps = [int((tmp_path / f"stopped_{i}").read_text()) for i in range(count)]
    assert len(set(steps)) == 1 and (steps[0] < 0) == (alone == FOREVER)
