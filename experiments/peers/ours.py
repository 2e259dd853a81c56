"""Our train step and our sampling, as `personalize` runs them on one device."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from configs import common
from experiments.peers.cases import CLIP_NORM, LAMBDA, LEARNING_RATE, REMAT, TOKENS, Case, embeddings, pictures, timed
from personalize_jax.families import public, registry
from personalize_jax.families.public import PublicFamily
from personalize_jax.families.text import Text
from personalize_jax.formats.port_weights import load_weights
from personalize_jax.pipeline.cascade import sample_pictures
from personalize_jax.training.examples import Examples
from personalize_jax.training.program import stage_program
from personalize_jax.training.tracking import peak_memory


def measure(case: Case, layout: str, phase: str, weights: Path) -> dict[str, float]:
    """Seconds of a step, of compiling, and the peak of memory in bytes.

    Args:
        case: the case.
        layout: one of its layouts that are ours.
        phase: "train" or "sample".
        weights: folder of the U-Net.
    """
    unet = json.loads((weights / "config.json").read_text())
    spec = {**case.shared, "stages": [{"class": case.pipeline, "unet": unet, "scheduler": case.scheduler}]}
    compute: dict[str, Any] = {"dtype": case.dtype, "attention": case.attention, "remat": REMAT in layout}
    family = public.build(registry.family_of(case.pipeline), spec, None, **compute)
    times = {"train": _train, "sample": _sample}[phase](case, family, weights)
    return times | {"peak": peak_memory()}


def _train(case: Case, family: PublicFamily, weights: Path) -> dict[str, float]:
    (stage,) = family.stages
    x = jnp.asarray(pictures(case, 8))
    examples = Examples(
        image=jnp.zeros((8, 1, 1, 3), jnp.uint8),
        caption=jnp.ones((8, 1), jnp.int32),
        tokens=jnp.zeros((2, TOKENS), jnp.int32),
        cond=_text(case, 2),
        latent=(x, jnp.zeros_like(x)),
    )
    config = common.public_training()
    config.batch_size, config.prior.weight, config.prior.caption_dropout = case.batch, LAMBDA, 0.0
    config.optimizer.learning_rate, config.optimizer.clip_norm = LEARNING_RATE, CLIP_NORM
    config.steps_per_dispatch = case.steps_per_dispatch
    shapes = jax.eval_shape(lambda key: stage.init_params(key, _text(case, 1)), jax.random.key(0))
    pretrained, groups = {"denoiser": shapes, "text_encoder": {}}, {"instance": examples, "prior": examples}
    program = stage_program(
        stage,
        family,
        pretrained,
        groups,
        config,
        0,
        read_float32=lambda name: load_weights(weights, pretrained[name], "unet"),
        devices=jax.devices()[:1],
    )
    state = program.init()

    def dispatch() -> None:
        nonlocal state
        state, metrics = program.advance(state, program.frozen_params, program.examples)
        float(metrics["loss"])

    times = timed(dispatch, max(1, case.train_steps // case.steps_per_dispatch))
    return times | {"seconds": times["seconds"] / case.steps_per_dispatch}


def _sample(case: Case, family: PublicFamily, weights: Path) -> dict[str, float]:
    (stage,) = family.stages
    params = load_weights(weights, family.shapes()[stage.name], "unet")
    sampling = stage.sampling._replace(num_steps=case.sampling_steps, guidance_scale=case.guidance_scale)
    keys, cond = jax.random.split(jax.random.key(0), case.samples), _text(case, case.samples)
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    sample = partial(sample_pictures, stage, sampling, mesh, params, keys, cond, cond, None)
    times = timed(lambda: jax.block_until_ready(sample()), count=2)
    return times | {"seconds": times["seconds"] / case.sampling_steps}


def _text(case: Case, count: int) -> Text:
    return Text(jnp.asarray(embeddings(case, count)), jnp.ones((count, TOKENS), bool))
