"""One of several processes that train together and ask at every step whether to stop."""

import contextlib
import sys
import time
from pathlib import Path

import jax

from personalize_jax import interruption


def main(process, coordinator, folder):
    """Say that steps are done until told to stop; say after which one that was."""
    with interruption.on_signals():
        jax.distributed.initialize(coordinator, num_processes=2, process_id=process)
        for step in range(2000):
            if interruption.requested():
                (folder / f"stopped_{process}").write_text(str(step))
                break
            (folder / f"going_{process}").touch()
            time.sleep(0.02)
        with contextlib.suppress(interruption.Stopped):  # drawing stops, too
            interruption.check()
            raise AssertionError("it was told to stop")
        jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
