"""Every random key is used once: in a step, over the steps, in both stages, and in pictures of the same seed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from personalize_jax.families.text import Text
from personalize_jax.families.world import read_stage
from personalize_jax.pipeline.cascade import _picture_key
from personalize_jax.training.program import stage_program
from tests import tiny

SEED, MANY = 7, 1000
STAGES = [
    dataclasses.replace(read_stage(spec), network=tiny.LinearNetwork()) for spec in (tiny.BASE, tiny.SUPER_RESOLUTION)
]


class Keys:
    """Remembers the keys that are given to `jax.random`: those used up, and those that others are folded from."""

    def __init__(self, monkeypatch, read):
        self.used, self.folded = [], []
        for name in ("split", "normal", "uniform", "randint", "bernoulli"):
            monkeypatch.setattr(jax.random, name, self.recording(getattr(jax.random, name), self.used, read))
        monkeypatch.setattr(jax.random, "fold_in", self.recording(jax.random.fold_in, self.folded, read))

    def recording(self, function, keys, read):
        def recorded(key, *args, **options):
            read(jax.random.key_data(key), keys)
            return function(key, *args, **options)

        return recorded


def keys_of_steps(stage, monkeypatch):
    """[steps, keys, 2] of those used up and of those folded, in a training in which all is drawn that can be."""
    latent = tuple(np.ones((6, *stage.shape), np.float32) for _ in range(2))
    group = jax.tree.map(jnp.asarray, tiny.examples(stage.resolution, stage.low_resolution)._replace(latent=latent))
    config = tiny.training(batch_size=1, prior__weight=1.0, offset_noise=0.1, augmentation_levels=(0.0, 0.1))
    examples = {"instance": group, "prior": group}
    made = stage_program(stage, tiny.LinearFamily(), tiny.linear_params(), examples, config, SEED)
    state = made.init()
    with monkeypatch.context() as patch:
        keys = Keys(patch, lambda data, keys: keys.append(data))

        def keys_of_step(n):
            keys.used.clear(), keys.folded.clear()
            made.advance.__wrapped__(state._replace(step=n), made.frozen_params, made.examples)
            return jnp.stack(keys.used), jnp.stack(keys.folded)

        return jax.jit(jax.vmap(keys_of_step))(jnp.arange(MANY))


def keys_of_pictures(i, stage, monkeypatch):
    """Those of a few pictures, among them the one whose seed is the training's."""
    text = Text(jnp.zeros((10, 1, 4)), jnp.ones((10, 1), bool))
    low = None if stage.low_resolution is None else jnp.zeros((10, stage.low_resolution, stage.low_resolution, 3))
    sampling = stage.sampling._replace(sampler="ancestral", guidance_scale=1.0)
    picture_keys = jnp.stack([_picture_key(seed, i) for seed in range(10)])
    with monkeypatch.context() as patch:
        keys = Keys(patch, lambda data, keys: jax.debug.callback(lambda data: keys.append(data), data))
        drawn = stage.sample(tiny.linear_params()["denoiser"], picture_keys, text, text, sampling, low)
        jax.block_until_ready(drawn)
        jax.effects_barrier()
    return keys.used, keys.folded


def rows(*arrays):
    return [tuple(row) for array in arrays for row in np.asarray(array).reshape(-1, 2).tolist()]


def test_no_key_is_used_twice_by_trainings_and_pictures_of_a_seed(monkeypatch):
    used, folded, pictures = [], [], []
    for i, stage in enumerate(STAGES):
        of_steps, of_pictures = keys_of_steps(stage, monkeypatch), keys_of_pictures(i, stage, monkeypatch)
        assert of_steps[0].shape[1] > 10 and len(of_pictures[0]) > 10
        used += rows(of_steps[0], *of_pictures[0])
        folded += rows(of_steps[1][:1], *of_pictures[1])
        pictures += rows(jax.vmap(lambda seed, i=i: jax.random.key_data(_picture_key(seed, i)))(jnp.arange(MANY)))
    twice = len(used + pictures) - len({*used, *pictures})
    assert twice == 0
    assert not set(used) & set(folded)
