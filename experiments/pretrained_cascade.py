"""Does the pretrained cascade draw what prompts say?

    python -m experiments.pretrained_cascade --pipeline=world --out=runs/pretrained_cascade

Draws 200 prompts over classes, contexts and colours, reads the pictures with the probe, and writes `scores.json` and a
contact sheet for each stage.
"""

import json
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from personalize_jax import command
from personalize_jax.metrics.world import prompt_fidelity
from personalize_jax.pipeline import load_pipeline
from personalize_jax.pipeline.storage import write_text
from personalize_jax.report import Panel, gallery
from personalize_jax.world.captions import prompt
from personalize_jax.world.probe import Probe
from personalize_jax.world.scene import CLASSES, COLOURS, CONTEXTS

SHEET = 48


def define_flags() -> None:
    """The command line."""
    flags.DEFINE_string("pipeline", "world", "'world' or a folder.")
    flags.DEFINE_string("out", None, "Folder for the results.")
    flags.DEFINE_integer("num_prompts", 200, "How many prompts.", lower_bound=1)


def prompt_grid(count: int) -> tuple[list[str], dict[str, np.ndarray]]:
    """Prompts that go through classes, contexts and colours evenly, and the truth of each."""
    i = np.arange(count)
    # Steps such that no two properties go in step: 200 prompts hold nearly as many pairs as there are, of any two.
    truth = {
        "class_ids": i % len(CLASSES),
        "contexts": (11 * i + i // len(CLASSES)) % len(CONTEXTS),
        "colours": (i + i // len(CLASSES)) % len(COLOURS),
    }
    rows = zip(*(column.tolist() for column in truth.values()), strict=True)
    return [prompt(CLASSES[a], context=CONTEXTS[b], colour=tuple(COLOURS)[c]) for a, b, c in rows], truth


def main(_: list[str]) -> None:
    """Draw, read, write."""
    arguments = flags.FLAGS
    pipeline, probe, out = load_pipeline(arguments.pipeline), Probe.load(), Path(arguments.out)
    prompts, truth = prompt_grid(arguments.num_prompts)
    with tqdm(total=len(prompts) * len(pipeline.stages), desc="sampling", unit="img") as bar:
        pictures = pipeline.sample(prompts, range(len(prompts)), progress=bar.update)
    out.mkdir(parents=True, exist_ok=True)
    scores = {}
    for stage, images in zip(pipeline.stages, pictures, strict=True):
        scores[stage.name] = prompt_fidelity(probe.read(images), **truth)
        panels = [
            Panel(f"{stage.name}, {stage.resolution} pixels", text, image[None])
            for text, image in list(zip(prompts, images, strict=True))[:SHEET]
        ]
        gallery(panels).save(out / f"{stage.name}.png")
    write_text(out / "scores.json", json.dumps(scores, indent=2))
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    command.run(main, define_flags, required=("out",))
