"""Which recipe makes the embedded cascade's base best for the same cost?

    python -m experiments.pretraining_recipe --minutes=30 --workdir=runs/recipe

Trains the base anew by each recipe of `RECIPES` for as many minutes, compiling included, and measures what a recipe's
own loss does not tell: how well pictures that no training has seen are denoised, from hardly any noise to hardly
anything else, and what the probe reads in sampled pictures. On a CPU the minutes are those of its cores, whatever else
they do. `--recipes` names the recipes of one call; each call prints the table of all that are finished, and writes it
to `recipes.md`.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from configs import pretrain_world
from experiments.pretrained_cascade import prompt_grid
from personalize_jax.families.stage import Stage
from personalize_jax.pipeline import Pipeline
from personalize_jax.pretrain import Pretraining, pretrain_cascade, read_pictures, section_of
from personalize_jax.runtime import command
from personalize_jax.runtime.files import write_text
from personalize_jax.training import budget
from personalize_jax.training.examples import downsample_uint8
from personalize_jax.world.pictures import training_pictures
from personalize_jax.world.probe import Probe
from personalize_jax.world.reading import accuracy

RECIPES: Mapping[str, Mapping[str, object]] = {
    "as configured": {},
    "attention at 4x4 pixels alone": {"stage.network.attention": (False, False, True)},
    "a wider first level": {"stage.network.channels": (96, 128, 256)},
    "batches of 16": {"training.batch_size": 16},
    "batches of 64": {"training.batch_size": 64},
    "learning rate 2e-3": {"training.optimizer.learning_rate": 2e-3},
    "weights by min-SNR": {"training.weighting": "min_snr"},
    "less noise": {"stage.schedule.shift": 1.0},
    "more noise": {"stage.schedule.shift": -1.0},
}
NOISES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4)  # standard deviation over a picture's amplitude in [-1, 1]
PICTURE_STD = 0.5  # of the weights by which errors count, Karras et al. 2022
HELD_OUT = 256  # pictures that are denoised
PROMPTS = 200


def define_flags() -> None:
    """The command line."""
    flags.DEFINE_float("minutes", 30, "Time of each training.", lower_bound=0)
    flags.DEFINE_multi_enum("recipes", list(RECIPES), list(RECIPES), "Recipes of this call.")
    flags.DEFINE_string("workdir", None, "Run directory.")
    flags.DEFINE_string("data_dir", "runs/data", "Where the rendered world is kept.")


def config_of(recipe: str) -> ConfigDict:
    """The configuration of a recipe's pretraining, of the base alone."""
    config = pretrain_world.get_config("all").unlock()
    config.train = ("base",)
    config.base.training.ema_decay = 0.99  # a training of minutes has no thousand steps to average over
    config.base.training.optimizer.warmup_steps = 100
    stage, changes = config.base.stage, dict(RECIPES[recipe])
    for key in [key for key in changes if key.startswith("stage.")]:
        _, part, name = key.split(".")  # a stage's parts are plain dicts
        stage[part] = {**stage[part], name: changes.pop(key)}
    config.base.update_from_flattened_dict(changes)
    return config.lock()


def denoising_errors(
    pipeline: Pipeline, pictures: np.ndarray, object_weight: float, captions: list[str]
) -> dict[str, float]:
    """The root mean square error of denoised pictures at each of `NOISES`, in the unit of pixels in [-1, 1].

    Args:
        pipeline: a cascade, whose base denoises.
        pictures: uint8 [N, R, R, 4] at the base's resolution, with the object's mask as fourth channel.
        object_weight: added to the weight of the object's pixels, which is 1 elsewhere.
        captions: one a picture.
    """
    stage = pipeline.stages[0]
    sampling = stage.sampling._replace(guidance_scale=1.0, threshold_max=None)
    cond = pipeline.condition(captions)
    x = jnp.asarray(pictures[..., :3], jnp.float32) / 127.5 - 1
    weight = 1 + object_weight * jnp.asarray(pictures[..., 3:], jnp.float32) / 255
    noise = jax.random.normal(jax.random.key(0), x.shape)

    @jax.jit
    def error(t: jax.Array) -> jax.Array:
        z_t = stage.process.alpha(t) * x + stage.process.sigma(t) * noise
        denoised = stage.denoiser(pipeline.params[stage.name], cond, cond, sampling)(z_t, t)
        assert isinstance(denoised, jax.Array)
        return jnp.sqrt(jnp.mean(weight * jnp.square(denoised - x)) / jnp.mean(weight))

    return {f"at noise {noise}": float(error(time_of(stage, noise))) for noise in NOISES}


def time_of(stage: Stage, noise: float) -> float:
    """The time at which noise has that standard deviation, over the picture's amplitude."""
    t = jnp.linspace(0, 1, 10_001)
    ratio = stage.process.sigma(t) / stage.process.alpha(t)
    return float(t[jnp.argmin(jnp.abs(jnp.log(ratio) - np.log(noise)))])


def weighted(errors: Mapping[str, float]) -> float:
    """The mean square error over all noises, weighted as in training by Karras et al. 2022 (table 1, lambda)."""
    weights = [(noise**2 + PICTURE_STD**2) / (noise * PICTURE_STD) ** 2 for noise in NOISES]
    return float(np.mean([weight * error**2 for weight, error in zip(weights, errors.values(), strict=True)]))


def measure(recipe: str, minutes: float, workdir: Path, data_dir: str) -> dict[str, float]:
    """Train by one recipe and measure the base.

    Args:
        recipe: a key of `RECIPES`.
        minutes: time of the training.
        workdir: the recipe's run directory.
        data_dir: where the rendered world is kept.

    Returns:
        Pictures seen, `weighted` errors, shares of sampled pictures with the prompt's properties, and
        `denoising_errors`.
    """
    config = config_of(recipe)
    data = read_pictures(section_of(config, "base"), data_dir)
    clock = time.process_time if jax.default_backend() == "cpu" else time.monotonic
    pipeline = pretrain_cascade(Pretraining(config, workdir, lambda section: data, minutes, clock=clock))
    held_out = training_pictures(config.base.dataset.resolution, "heldout", HELD_OUT, data_dir)
    pictures = downsample_uint8(held_out["image"], pipeline.stages[0].resolution)
    weight = config.base.training.object_weight
    errors = denoising_errors(pipeline, pictures, weight, held_out["captions"][:, 0].tolist())
    prompts, truth = prompt_grid(PROMPTS)
    images = pipeline.sample_stage(pipeline.stages[0], prompts, range(len(prompts)))
    length = json.loads((workdir / "base" / budget.FILE).read_text())
    seen = length["num_steps"] * config.base.training.batch_size
    return {
        "pictures seen": seen,
        "weighted error": weighted(errors),
        **accuracy(Probe.load().read(images), **truth),
        **errors,
    }


def table(measured: Mapping[str, Mapping[str, float]]) -> str:
    """A Markdown table with a row for each recipe."""
    columns = list(next(iter(measured.values())))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for recipe, values in measured.items():
        lines.append(f"| {recipe} | " + " | ".join(f"{values[column]:.4g}" for column in columns) + " |")
    return "\n".join(lines) + "\n"


def main(_: list[str]) -> None:
    """Train, measure, write."""
    arguments, workdir = flags.FLAGS, Path(flags.FLAGS.workdir)
    files = {recipe: workdir / recipe.replace(" ", "_") / "measured.json" for recipe in RECIPES}
    for recipe in arguments.recipes:
        if not files[recipe].exists():
            measured = measure(recipe, arguments.minutes, files[recipe].parent, arguments.data_dir)
            write_text(files[recipe], json.dumps(measured, indent=2))
    text = table({recipe: json.loads(file.read_text()) for recipe, file in files.items() if file.exists()})
    write_text(workdir / "recipes.md", text)
    print(text)


if __name__ == "__main__":
    command.run(main, define_flags, required=("workdir",))
