"""Several subjects trained by one program: the step is mapped over what is theirs, and shares what is frozen."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personalize_jax.families.world import read_stage
from personalize_jax.training.parameterizations.base import Identifier
from personalize_jax.training.program import stage_program
from tests import tiny


class Network:
    """In place of a U-Net: linear in z_t and, by a layer that can be adapted, in the mean text embedding."""

    def apply(self, variables, z, t, text, mask):
        of_text = nn.Dense(3, use_bias=False).apply(variables, text.mean(1))
        return variables["params"]["scale"] * z + of_text[:, None, None, :]


def parameters():
    linear = tiny.linear_params()
    denoiser = {"scale": linear["denoiser"]["scale"], "kernel": linear["denoiser"]["text"]}
    return {"denoiser": denoiser, "text_encoder": linear["text_encoder"]}


STAGE = dataclasses.replace(read_stage(tiny.BASE), network=Network())
WAYS = {
    "full": {"trainable": (("denoiser/", True), (".*", False))},
    "rows": {"trainable": (("text_encoder/table", "identifier"), (".*", False))},
    "adapters": {
        "trainable": ((".*", False),),
        "lora__rank": 2,
        "lora__targets": (("denoiser/kernel", 1),),
    },
}


def subject_program(seed, noun, **changes):
    """A subject with pictures of its own, whose identifier is a word of its captions."""
    examples = {group: tiny.examples(seed=10 * seed + i) for i, group in enumerate(("instance", "prior"))}
    token = tiny.tokenizer().encode(noun)[0]
    identifier = Identifier(np.array([token], np.int32), np.array([[token, 7]], np.int32))
    config = tiny.training(prior__weight=0.5, prior__form="frozen_prediction", optimizer__learning_rate=0.1, **changes)
    return stage_program(STAGE, tiny.LinearFamily(), parameters(), examples, config, seed, identifier)


@pytest.mark.parametrize("way", ["full", "rows", pytest.param("adapters", marks=pytest.mark.slow)])
def test_two_subjects_in_one_program_are_trained_as_each_by_itself(way):
    """Each with examples, a key and an identifier of its own."""
    programs = [subject_program(seed, noun, **WAYS[way]) for seed, noun in ((1, "dog"), (2, "clock"))]
    states, examples = [program.init() for program in programs], [program.examples for program in programs]
    frozen, step = programs[0].frozen_params, programs[0].advance.__wrapped__
    alone = []
    for program, state, of_subject in zip(programs, states, examples, strict=True):
        for _ in range(2):
            state, metrics = jax.jit(program.advance.__wrapped__)(state, frozen, of_subject)
        alone.append((state, metrics))
    both, of_both = (jax.tree.map(lambda *a: jnp.stack(a), *each) for each in (states, examples))
    for _ in range(2):
        both, metrics = jax.jit(jax.vmap(step, in_axes=(0, None, 0)))(both, frozen, of_both)
    for i, expected in enumerate(alone):
        found = jax.tree.map(lambda a, i=i: a[i], (both, metrics))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), found, expected)
    before, after = (jnp.concatenate([a.ravel() for a in jax.tree.leaves(s.params)]) for s in (states[0], alone[0][0]))
    assert jnp.max(jnp.abs(after - before)) > 0.01
    assert not np.allclose(*(jax.tree.leaves(state.params)[0] for state, _ in alone))
