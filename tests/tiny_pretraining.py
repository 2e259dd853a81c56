"""The configuration of `configs/pretrain_world.py`, shrunk to the tiny cascade and a few pictures."""

from configs import pretrain_world
from tests import tiny

SMALLEST = {"channels": (16,), "patch": 2, "down_blocks": (1,), "up_blocks": (0,), "attention": (False,)}


def get_config(stage, num_steps=4, **changes):
    """The shipped configuration of a stage with small numbers; `changes` by key."""
    config = pretrain_world.get_config(stage).unlock()
    config.stage = {**{"base": tiny.BASE, "super_resolution": tiny.SUPER_RESOLUTION}[stage], "network": SMALLEST}
    if stage == "base":
        config.text_encoder.update(tiny.TEXT)
    config.dataset.update(resolution=16, count=8)
    config.training.update(num_steps=num_steps, batch_size=4, log_every=1, checkpoint_every=2)
    config.training.optimizer.update(warmup_steps=1, decay_steps=1)
    config.update(changes)
    return config.lock()
