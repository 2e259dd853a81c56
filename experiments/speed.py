"""How fast are training and sampling here, and how much of the machine do they use?

    python -m experiments.speed --config=configs/world.py --out=runs/speed

Measures for each stage: pictures trained and sampled a second; model FLOPs utilisation, as a share of the rate of a
plain float32 matrix product on the same devices; and the share of training time in which the devices wait for the host.
Before them, the rate of a convolution with the channels last, as in the networks, and first; and where the model is of
the rendered world, pictures of it rendered a second. Needs an otherwise idle machine.
XLA_FLAGS=--xla_force_host_platform_device_count=2 tries two host devices, --config.training.batch_size= and
--config.super_resolution_training.batch_size= other batches.
"""

import functools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from personalize_jax.families.world import World
from personalize_jax.method.configuration import check_values, stage_trainings
from personalize_jax.method.personalization import stage_examples, with_embeddings
from personalize_jax.pipeline import Pipeline, Stage, load_pipeline
from personalize_jax.runtime import command
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import write_text
from personalize_jax.training.loop import train
from personalize_jax.training.program import stage_program
from personalize_jax.world.render import on_accelerator, render
from personalize_jax.world.scene import Scene, sample_subjects, sample_views

MATRIX = 2048
CONVOLUTION = {"batch": 16, "side": 16, "channels": 128}
STEPS = 20
PICTURES = 32
RENDER_RESOLUTIONS = (64, 128)  # of the pictures that the stages of the embedded cascade are pretrained on


def define_flags() -> None:
    """The command line."""
    config_flags.DEFINE_config_file("config", None, "Configuration, such as configs/world.py.")
    flags.DEFINE_string("out", None, "Folder for the results.")


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def matmul_rate() -> float:
    """FLOP/s of a float32 matrix product."""
    a = jnp.ones((MATRIX, MATRIX))
    product = jax.jit(jnp.matmul)
    return 2 * MATRIX**3 / seconds(lambda: product(a, a), repeats=9)


def convolution_rate(layout: str) -> float:
    """FLOP/s of a 3x3 convolution and its two gradients; `layout` orders batch N, height H, width W and channels C."""
    side, channels = CONVOLUTION["side"], CONVOLUTION["channels"]
    sizes = {"N": CONVOLUTION["batch"], "H": side, "W": side, "C": channels}
    x, kernel = jnp.ones([sizes[axis] for axis in layout]), jnp.ones((3, 3, channels, channels))

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=(layout, "HWIO", layout))

    @jax.jit
    def with_gradients(x: jax.Array, kernel: jax.Array) -> object:
        y, pull_back = jax.vjp(convolve, x, kernel)
        return y, pull_back(y)

    flops = 3 * 2 * 9 * channels * x.size
    return flops / seconds(lambda: with_gradients(x, kernel), repeats=9)


def rendering_speed() -> dict[str, float]:
    """Pictures rendered a second, of all classes and contexts, at each resolution."""
    count = 2**15 if on_accelerator() else 128
    rng = np.random.default_rng(0)
    subjects = sample_subjects(rng, count)
    scenes = Scene(subjects, sample_views(rng, subjects))
    times = {r: seconds(functools.partial(render, scenes, r), repeats=3) for r in RENDER_RESOLUTIONS}
    return {f"pictures of {r} pixels a second": count / time for r, time in times.items()}


def forward_flops(pipeline: Pipeline, stage: Stage) -> float:
    """FLOPs of the network for one picture, as the compiler counts them."""
    z, one = jnp.zeros((1, stage.resolution, stage.resolution, 3)), jnp.ones((1,))
    low_res = None if stage.low_resolution is None else (z, one)
    lowered = jax.jit(stage.apply).lower(pipeline.params[stage.name], z, one, pipeline.condition([""]), low_res)
    counts = lowered.compile().cost_analysis()
    if counts is None:
        raise UserError(f"The compiler counts no operations on {jax.default_backend()}; measure on another device.")
    return counts["flops"]


def training_times(pipeline: Pipeline, stage: Stage, config: ConfigDict, folder: Path) -> tuple[float, float]:
    """Seconds of a step in the training loop, and of the compiled program alone."""
    pictures = np.random.default_rng(0).integers(0, 256, (8, *[pipeline.stages[-1].resolution] * 2, 3), np.uint8)
    examples = with_embeddings(pipeline, stage_examples(pipeline, stage, pictures, ["a dog"] * len(pictures)))
    groups = {"instance": examples} | ({"prior": examples} if config.prior.weight > 0 else {})
    start = pipeline.networks(stage.name)
    config = config.copy_and_resolve_references().unlock()
    config.num_steps, config.checkpoint_every = STEPS, STEPS

    program = stage_program(stage, pipeline.family, start, groups, config, 0)
    advance, state = program.lower().compile(), program.init()

    def step() -> object:
        nonlocal state
        state, metrics = advance(state, program.frozen_params, program.examples)
        return metrics

    alone, stamps = seconds(step, STEPS), []
    train(program, folder / "loop", lambda *_: stamps.append(time.perf_counter()))
    # Between logged steps, at which the host waits for the devices; the first of them compiles.
    logged = stamps[config.log_every - 1 :: config.log_every]
    return (logged[-1] - logged[0]) / ((len(logged) - 1) * config.log_every), alone


def stage_speed(pipeline: Pipeline, stage: Stage, config: ConfigDict, rate: float, folder: Path) -> dict[str, float]:
    """All measurements of one stage."""
    flops = forward_flops(pipeline, stage)
    in_loop, program = training_times(pipeline, stage, config, folder)
    trained = config.batch_size * (2 if config.prior.weight > 0 else 1) / in_loop
    low = None
    if stage.low_resolution is not None:
        low = np.zeros((PICTURES, stage.low_resolution, stage.low_resolution, 3), np.uint8)
    sampled = PICTURES / seconds(
        lambda: pipeline.sample_stage(stage, ["a dog"] * PICTURES, range(PICTURES), low), repeats=2
    )
    evaluations = stage.sampling.num_steps * (2 if stage.sampling.guidance_scale != 1 else 1)
    return {
        "million FLOPs a forward pass": flops / 1e6,
        "pictures trained a second": trained,
        "training utilisation": 3 * flops * trained / rate,  # a backward pass costs two forward passes
        "pictures sampled a second": sampled,
        "sampling utilisation": flops * evaluations * sampled / rate,
        "share of training time outside the devices": max(0.0, 1 - program / in_loop),
    }


def main(_: list[str]) -> None:
    """Measure and print."""
    config, out = flags.FLAGS.config, Path(flags.FLAGS.out)
    check_values(config)
    pipeline, rate = load_pipeline(config.pretrained), matmul_rate()
    results: dict[str, object] = {
        "devices": [str(device) for device in jax.devices()],
        "matrix product, GFLOP/s": rate / 1e9,
        "convolution, GFLOP/s": {layout: convolution_rate(layout) / 1e9 for layout in ("NHWC", "NCHW")},
    }
    if isinstance(pipeline.family, World):
        results["rendering"] = rendering_speed()
    for stage in pipeline.stages:
        with tempfile.TemporaryDirectory() as folder:
            results[stage.name] = stage_speed(pipeline, stage, stage_trainings(config)[stage.name], rate, Path(folder))
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "speed.json", json.dumps(results, indent=2))
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    command.run(main, define_flags, required=("config", "out"))
