"""An autoregressive model of pictures of 8x8 pixels that compiles in seconds, and configurations shrunk to it."""

import jax
import numpy as np

from configs import autoregressive, pretrain_autoregressive
from personalize_jax.families.autoregressive import Autoregressive
from personalize_jax.pipeline import Pipeline
from tests import tiny, tiny_world

TOKENIZER = {
    "name": "picture_tokenizer",
    "resolution": 8,
    "network": {"channels": (16,), "patch": 4, "blocks": 1, "levels": (3, 2)},
}
TRANSFORMER = {
    "name": "base",
    "network": {"width": 16, "num_layers": 2, "num_heads": 2},
    "sampling": {"sampler": "truncated", "num_steps": 4, "guidance_scale": 2.0, "temperature": 0.9, "top_k": 4},
}


def pipeline(tokenizer=None, transformer=None):
    """The model with random parameters that are nowhere zero; arguments change the networks."""
    specs = (
        {**TOKENIZER, "network": {**TOKENIZER["network"], **(tokenizer or {})}},
        {**TRANSFORMER, **(transformer or {})},
    )
    family = Autoregressive(tiny.tokenizer(), tiny.text_encoder(), Autoregressive.read_stages(specs), specs)
    rng = np.random.default_rng(0)
    shapes = {name: shapes for name, shapes in family.shapes().items() if name != "text_encoder"}
    params = jax.tree.map(lambda s: np.asarray(rng.normal(0, 0.3, s.shape), s.dtype), shapes)
    return Pipeline(family, {**params, "text_encoder": tiny.text_params()})


def pretraining(stage, num_steps=4, **changes):
    """The shipped configuration of a network's pretraining with small numbers; `changes` by key."""
    config = pretrain_autoregressive.get_config(stage).unlock()
    config.stage = {"picture_tokenizer": TOKENIZER, "base": TRANSFORMER}[stage]
    config.text_encoder.update(tiny.TEXT)
    config.dataset.update(resolution=16, count=8)
    config.training.update(num_steps=num_steps, batch_size=4, log_every=1, checkpoint_every=2)
    config.training.optimizer.update(warmup_steps=1, decay_steps=1)
    config.update(changes)
    return config.lock()


def get_config(folder, **changes):
    """Tune the model in `folder`; `changes` by dotted key with __ for the dots."""
    config = autoregressive.get_config().unlock()
    world = tiny_world.get_config(folder)
    for section in ("subject", "report", "evaluation"):
        config[section] = world[section]
    config.pretrained = str(folder)
    config.class_images.update(count=4, num_steps=4, batch_size=3)
    config.training.update(num_steps=6, batch_size=2, log_every=2, checkpoint_every=3)
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config.lock()
