"""The configurations of `configs/pretrain_world.py`, shrunk to the tiny cascade, and a few pictures for it."""

import numpy as np

from configs import pretrain_world
from personalize_jax.world import probe
from tests import tiny

SMALLEST = {"channels": (16,), "patch": 2, "down_blocks": (1,), "up_blocks": (0,), "attention": (False,)}


STAGES = {"base": tiny.BASE, "super_resolution": tiny.SUPER_RESOLUTION}


def get_config(stage, num_steps=4, **changes):
    """The shipped configuration of a stage, or of "all", with small numbers; `changes` by key."""
    config = pretrain_world.get_config(stage).unlock()
    for name in STAGES if stage == "all" else [stage]:
        section = config[name] if stage == "all" else config
        section.stage = {**STAGES[name], "network": SMALLEST}
        if name == "base":
            section.text_encoder.update(tiny.TEXT)
        section.dataset.update(resolution=16, count=8)
        section.training.update(num_steps=num_steps, batch_size=4, log_every=1, checkpoint_every=2)
        section.training.optimizer.update(warmup_steps=1, decay_steps=1)
    config.update(changes)
    return config.lock()


def data():
    """Ten pictures of 16 pixels with the object in their left half, and two captions each."""
    image = np.random.default_rng(0).integers(0, 256, (10, 16, 16, 4), np.uint8)
    image[..., 3] = 0
    image[:, :, :8, 3] = 255
    captions = np.array([[tiny.CAPTIONS[(i + j) % 3] for j in range(2)] for i in range(10)])
    return {"image": image, "captions": captions}


def train_no_probe():
    """Have this process leave a file where it would train the probe, which takes long."""

    def train_probe(output, data_dir):
        output.mkdir()
        (output / "probe.json").touch()

    probe.train_probe = train_probe
