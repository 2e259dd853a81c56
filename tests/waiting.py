"""Waiting for what happens sooner or later, however slow the machine is."""

import time

PATIENCE = 1800  # seconds after which it will not happen any more


def until(condition):
    """Wait until a function without arguments returns something true."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < PATIENCE, "it has not happened"
        time.sleep(0.02)
