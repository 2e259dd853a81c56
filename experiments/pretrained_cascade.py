"""Do the pretrained cascade's pictures show what prompts say?

    python -m experiments.pretrained_cascade --pipeline=world --out=runs/pretrained_cascade

Samples 200 prompts over classes, contexts and colours, reads the pictures with the probe, and writes `scores.json` and
a contact sheet for each stage. How sharp the last stage's pictures are is told by their amplitude at each spatial
frequency over that of held-out renders of the same classes and places (`world.detail`): 1 is as sharp, less is blurred,
more is noisy. A second set of prompts shows whether the cascade knows the colours that ordinary words
name (`world.captions`): one prompt for each pair of body and accent colour, named by its most frequent word only;
chance is .09.
"""

import json
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from personalize_jax.evaluation.report import Panel, gallery
from personalize_jax.pipeline import load_pipeline
from personalize_jax.runtime import command
from personalize_jax.runtime.files import write_text
from personalize_jax.world.captions import prompt, words_for
from personalize_jax.world.detail import relative_amplitudes
from personalize_jax.world.probe import Probe
from personalize_jax.world.reading import accuracy
from personalize_jax.world.render import render
from personalize_jax.world.scene import CLASSES, COLOURS, CONTEXTS, Scene, sample_subjects, sample_views

SHEET = 48  # pictures on a contact sheet


def define_flags() -> None:
    """The command line."""
    flags.DEFINE_string("pipeline", "world", "'world' or a folder.")
    flags.DEFINE_string("out", None, "Folder for the results.")
    flags.DEFINE_integer("num_prompts", 200, "How many prompts.", lower_bound=1)


def prompt_grid(count: int) -> tuple[list[str], dict[str, np.ndarray]]:
    """Prompts that have all classes, contexts and colours equally often, and the true properties of each."""
    i = np.arange(count)
    # The strides keep properties independent: 200 prompts have nearly all pairs of any two properties.
    truth = {
        "class_id": i % len(CLASSES),
        "context": (11 * i + i // len(CLASSES)) % len(CONTEXTS),
        "body_colour": (i + i // len(CLASSES)) % len(COLOURS),
    }
    rows = zip(*(column.tolist() for column in truth.values()), strict=True)
    return [prompt(CLASSES[a], context=CONTEXTS[b], colour=tuple(COLOURS)[c]) for a, b, c in rows], truth


def word_prompts() -> tuple[list[str], dict[str, np.ndarray]]:
    """A prompt for each pair of colours, with the most frequent word that names it, and the true colours of each."""
    pairs = [(body, accent) for body in range(len(COLOURS)) for accent in range(len(COLOURS)) if body != accent]
    prompts = [
        prompt(CLASSES[i % len(CLASSES)], context=CONTEXTS[i % len(CONTEXTS)], identifier=words_for(*pair)[0])
        for i, pair in enumerate(pairs)
    ]
    body, accent = np.array(pairs).T
    return prompts, {"body_colour": body, "accent_colour": accent}


def renders_like(truth: dict[str, np.ndarray], resolution: int) -> np.ndarray:
    """Renders of held-out subjects of the same classes in the same places: uint8 [N, R, R, 3]."""
    rng = np.random.default_rng(0)
    subjects = sample_subjects(rng, len(truth["class_id"]), "heldout", truth["class_id"])
    views = sample_views(rng, subjects, truth["context"], accessory=0)
    return render(Scene(subjects, views), resolution)[..., :3]


def main(_: list[str]) -> None:
    """Sample, read, write."""
    arguments = flags.FLAGS
    pipeline, probe, out = load_pipeline(arguments.pipeline), Probe.load(), Path(arguments.out)
    prompts, truth = prompt_grid(arguments.num_prompts)
    with tqdm(total=len(prompts) * len(pipeline.stages), desc="sampling", unit="img") as bar:
        by_stage = pipeline.sample(prompts, range(len(prompts)), progress=bar.update)
    out.mkdir(parents=True, exist_ok=True)
    scores = {}
    for stage, images in zip(pipeline.stages, by_stage, strict=True):
        scores[stage.name] = accuracy(probe.read(images), **truth)
        panels = [
            Panel(f"{stage.name}, {stage.resolution} pixels", text, image[None])
            for text, image in list(zip(prompts, images, strict=True))[:SHEET]
        ]
        gallery(panels).save(out / f"{stage.name}.png")
    renders = renders_like(truth, pipeline.stages[-1].resolution)
    scores["detail"] = relative_amplitudes(by_stage[-1], renders)
    prompts, truth = word_prompts()
    images = pipeline.sample_stage(pipeline.stages[0], prompts, range(len(prompts)))
    scores["base, named by words"] = accuracy(probe.read(images), **truth)
    write_text(out / "scores.json", json.dumps(scores, indent=2))
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    command.run(main, define_flags, required=("out",))
