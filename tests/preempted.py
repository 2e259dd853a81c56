"""One of several processes that work together and ask all the time whether to stop."""

import contextlib
import time

import jax

from personalize_jax.runtime import hosts, interruption

FOREVER = 10**6  # steps, which no test waits for


def be_preempted(process, count, coordinator, folder, alone):
    """Say that work is done until told to stop; say after which step that was.

    Args:
        process: number of this one.
        count: of the processes.
        coordinator: host and port of process 0.
        folder: for what is said.
        alone: how often process 0 asks while the others wait, before all of them do the same steps.
    """

    def share():
        for _ in range(alone):
            interruption.check()
            (folder / f"alone_{process}").touch()
            time.sleep(0.02)

    with interruption.on_signals():
        jax.distributed.initialize(coordinator, num_processes=count, process_id=process)
        step = -1
        with contextlib.suppress(interruption.Stopped):
            hosts.first_does(share)
            while (step := step + 1) < FOREVER:
                interruption.check()
                (folder / f"together_{process}").touch()
                time.sleep(0.02)
            raise AssertionError("it was not told to stop")
        (folder / f"stopped_{process}").write_text(str(step))
        jax.distributed.shutdown()
