"""A training that compiles at once, on machines of any speed, also as one of two processes."""

import dataclasses
import json

import jax

from personalize_jax.families.world import read_stage
from personalize_jax.training.budget import Budget, train_until_length_is_known
from personalize_jax.training.program import stage_program
from tests import tiny

STAGE = dataclasses.replace(read_stage(tiny.BASE), network=tiny.LinearNetwork())
STARTING = 10.0  # seconds until a program is compiled


class Machine:
    """A clock for a training on a machine that compiles in `STARTING` seconds and does steps of the same length.

    It is read before the training, at its start, and after each dispatch.
    """

    def __init__(self, step_seconds=1.0, dispatch=1):
        self.step_seconds, self.dispatch, self.reads = step_seconds, dispatch, 0

    def __call__(self):
        steps = max(0, self.reads - 2) * self.dispatch
        self.reads += 1
        return STARTING * (self.reads > 2) + steps * self.step_seconds


def linear_program(**changes):
    config = tiny.training(**{"ema_decay": 0.9, "checkpoint_every": 7, "log_every": 3, **changes})
    return stage_program(STAGE, tiny.LinearFamily(), tiny.linear_params(), {"instance": tiny.examples()}, config, 0)


def choose_together(process, coordinator, folder):
    """As one of two processes, the second of which has a slower clock, say which length is chosen."""
    jax.distributed.initialize(coordinator, num_processes=2, process_id=process)
    machine = Machine(step_seconds=(1.0, 3.0)[process])
    length = train_until_length_is_known(linear_program(), folder / "training", Budget(100.0, 0.5, machine))
    (folder / f"chosen_{process}").write_text(json.dumps(length))
    jax.distributed.shutdown()
