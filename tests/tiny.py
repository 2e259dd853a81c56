"""A cascade that compiles in seconds, 8x8 to 16x16 pixels, with parameters that are random but nowhere zero."""

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import common
from personalize_jax.families.diffusion_loss import DiffusionFamily
from personalize_jax.families.objective import INSTANCE, PRIOR, Group, Objective
from personalize_jax.families.targets import PRIOR_FORMS
from personalize_jax.families.world import World, read_stage
from personalize_jax.formats.tokenizer import Tokenizer
from personalize_jax.models.text_encoder import TextEncoder
from personalize_jax.pipeline import Pipeline
from personalize_jax.runtime.files import ASSETS
from personalize_jax.training.examples import make_examples

TEXT = {"width": 16, "num_layers": 1, "num_heads": 2, "max_length": 8}
BASE = {
    "name": "base",
    "resolution": 8,
    "low_resolution": None,
    "network": {
        "channels": (16, 64),
        "patch": 2,
        "down_blocks": (1, 0),
        "up_blocks": (1, 0),
        "attention": (False, True),
    },
    "schedule": {"kind": "cosine"},
    "augmentation": {"kind": "cosine"},
    "prediction": "v",
    "sampling": {"sampler": "ddim", "num_steps": 3, "guidance_scale": 2.0},
}
SUPER_RESOLUTION = {
    **BASE,
    "name": "super_resolution",
    "resolution": 16,
    "low_resolution": 8,
    "network": {**BASE["network"], "patch": 4},
    "residual_std": 0.25,
    "sampling": {"sampler": "ddim", "num_steps": 2, "guidance_scale": 1.0, "augmentation_level": 0.05},
}
CAPTIONS = ["a dog", "a red teapot on the beach", "a clock in the snow"]


def tokenizer():
    return Tokenizer.read(ASSETS / "world" / "tokenizer.json", TEXT["max_length"])


def text_encoder():
    return TextEncoder(vocab_size=tokenizer().size, **TEXT)


def random_params(init, *args, seed=0):
    """Normal values in the shapes that `init` gives, without running it."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(init, jax.random.key(0), *args)
    return jax.tree.map(lambda s: jax.numpy.asarray(rng.normal(0, s.shape[0] ** -0.5, s.shape), s.dtype), shapes)


def text_params():
    return random_params(text_encoder().init, np.ones((1, TEXT["max_length"]), np.int32), seed=1)["params"]


def stage_params(stage):
    cond = jax.numpy.zeros((1, 1, TEXT["width"])), jax.numpy.ones((1, 1), bool)
    return random_params(lambda key: stage.init_params(key, cond), seed=2)


def pipeline(resolution=8, **network):
    """Both stages, the second of twice the resolution; `network` changes arguments of their U-Nets."""
    sizes = {"resolution": resolution}, {"resolution": 2 * resolution, "low_resolution": resolution}
    specs = [
        {**spec, **size, "network": {**spec["network"], **network}}
        for spec, size in zip((BASE, SUPER_RESOLUTION), sizes, strict=True)
    ]
    stages = tuple(read_stage(spec) for spec in specs)
    params = {"text_encoder": text_params(), **{stage.name: stage_params(stage) for stage in stages}}
    return Pipeline(World(tokenizer(), text_encoder(), stages, tuple(specs)), params)


def family():
    """The tiny cascade without its parameters."""
    return pipeline().family


def training(**changes):
    """The usual training, small; `changes` by dotted key with __ for the dots."""
    config = common.training()
    config.num_steps, config.batch_size, config.log_every, config.checkpoint_every = 6, 4, 1, 3
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return ConfigDict(config).lock()


def examples(resolution=8, low_resolution=None, seed=0, captions=CAPTIONS, count=6):
    """Random pictures with the captions, two each."""
    rng = np.random.default_rng(seed)
    pairs = np.array([[captions[(i + j) % len(captions)] for j in range(2)] for i in range(count)])
    low = None if low_resolution is None else rng.integers(0, 256, (count, low_resolution, low_resolution, 3), np.uint8)
    images = rng.integers(0, 256, (count, resolution, resolution, 3), np.uint8)
    return make_examples(images, pairs, tokenizer(), low)


def objective(weighting="none", prior_weight=1.0, form="sampled", **changes):
    """That of instance and class images, or with a prior weight of 0 of instance images alone."""
    groups = (Group(INSTANCE), Group(PRIOR, prior_weight, PRIOR_FORMS[form]))
    return Objective(groups if prior_weight > 0 else groups[:1], weighting, **changes)


class LinearNetwork:
    """In place of a U-Net where the network does not matter: linear in z_t and in the mean text embedding."""

    def apply(self, variables, z, t, text, mask, *low_res):
        params = variables["params"]
        return params["scale"] * z + (text.mean(1) @ params["text"])[:, None, None, :]


class LinearFamily(DiffusionFamily):
    """In place of a family where conditioning does not matter: a table of embeddings."""

    vocabulary_size = 8000
    encoders = ("text_encoder",)

    def condition(self, params, tokens):
        return params["text_encoder"]["table"][tokens], tokens > 0


def linear_params(seed=0):
    rng = np.random.default_rng(seed)
    values = {
        "denoiser": {"scale": rng.normal(size=(3,)), "text": rng.normal(size=(4, 3))},
        "text_encoder": {"table": rng.normal(size=(LinearFamily.vocabulary_size, 4))},
    }
    return jax.tree.map(lambda a: jax.numpy.asarray(a, jax.numpy.float32), values)
