"""Do the pretrained cascade's pictures show what prompts say?

    python -m experiments.pretrained_cascade --pipeline=world --out=runs/pretrained_cascade

Samples 200 prompts over classes, contexts and colours, reads the pictures with the probe, and writes `scores.json` and
a contact sheet for each stage. How sharp the last stage's pictures are is told by their amplitude at each spatial
frequency over that of held-out renders of the same classes and places (`world.detail`): 1 is as sharp, less is blurred,
more is noisy.

The same prompts are also sampled with a pattern in each: "pattern where asked" is the share of pictures in which the
probe reads it. Of scenes whose captions do not tell, .2 have it. A third set of prompts shows whether the cascade knows
the colours that ordinary words name (`world.captions`): one prompt for each pair of body and accent colour, named by
its most frequent word only; chance is .09.

`--against` names another cascade, which gets the same prompts and seeds: `scores.json` has its scores under "against",
and `side_by_side.png` its pictures beside the first one's, prompt by prompt.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from personalize_jax.evaluation.report import Panel, gallery
from personalize_jax.pipeline import Pipeline, load_pipeline
from personalize_jax.runtime import command
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import write_text
from personalize_jax.world.captions import prompt, words_for
from personalize_jax.world.detail import relative_amplitudes
from personalize_jax.world.probe import Probe
from personalize_jax.world.reading import accuracy
from personalize_jax.world.render import render
from personalize_jax.world.scene import CLASSES, COLOURS, CONTEXTS, PATTERNS, Scene, sample_subjects, sample_views

SHEET = 48  # pictures on a contact sheet


def define_flags() -> None:
    """The command line."""
    flags.DEFINE_string("pipeline", "world", "'world' or a folder.")
    flags.DEFINE_string("against", None, "Another cascade to compare with: 'world' or a folder.")
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


def pattern_prompts(count: int) -> tuple[list[str], dict[str, np.ndarray]]:
    """Prompts as of `prompt_grid` that ask for each pattern but the plain one equally often, and the true patterns."""
    i = np.arange(count)
    patterns = 1 + (i + i // len(CLASSES)) % (len(PATTERNS) - 1)
    rows = zip(*(column.tolist() for column in (*prompt_grid(count)[1].values(), patterns)), strict=True)
    prompts = [
        prompt(CLASSES[a], context=CONTEXTS[b], colour=tuple(COLOURS)[c], pattern=PATTERNS[d]) for a, b, c, d in rows
    ]
    return prompts, {"pattern": patterns}


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


def sample_stages(pipeline: Pipeline, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """One picture of each prompt, prompt i with seed i, by stage: uint8 [N, H, W, 3]."""
    with tqdm(total=len(prompts) * len(pipeline.stages), desc="sampling", unit="img") as bar:
        by_stage = pipeline.sample(prompts, range(len(prompts)), progress=bar.update)
    return dict(zip((stage.name for stage in pipeline.stages), by_stage, strict=True))


def measure(pipeline: Pipeline, probe: Probe, count: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The scores of a cascade, and its pictures of `prompt_grid(count)` by stage."""
    prompts, truth = prompt_grid(count)
    patterned, patterns = pattern_prompts(count)
    pictures, with_patterns = sample_stages(pipeline, prompts), sample_stages(pipeline, patterned)
    scores: dict[str, Any] = {}
    for stage, images in pictures.items():
        asked = accuracy(probe.read(with_patterns[stage]), **patterns)["pattern"]
        scores[stage] = accuracy(probe.read(images), **truth) | {"pattern where asked": asked}
    last = pipeline.stages[-1]
    scores["detail"] = relative_amplitudes(pictures[last.name], renders_like(truth, last.resolution))
    prompts, truth = word_prompts()
    images = pipeline.sample_stage(pipeline.stages[0], prompts, range(len(prompts)))
    scores["base, named by words"] = accuracy(probe.read(images), **truth)
    return scores, pictures


def side_by_side(prompts: Sequence[str], pictures: Mapping[str, Mapping[str, np.ndarray]]) -> list[Panel]:
    """Panels of the first prompts, of each a picture from every cascade, for each stage that all cascades have.

    Args:
        prompts: the prompts.
        pictures: the pictures of the prompts by cascade, then by stage.
    """
    first, *others = pictures.values()
    shared = [stage for stage in first if all(stage in by_stage for by_stage in others)]
    return [
        Panel(f"{stage}: {', then '.join(pictures)}", text, by_stage[stage][i][None], note=name)
        for stage in shared
        for i, text in enumerate(prompts[: SHEET // len(pictures)])
        for name, by_stage in pictures.items()
    ]


def main(_: list[str]) -> None:
    """Sample, read, write."""
    arguments = flags.FLAGS
    if arguments.against == arguments.pipeline:
        raise UserError(f"--pipeline and --against are both {arguments.against}; give two cascades to compare.")
    pipeline, probe, out = load_pipeline(arguments.pipeline), Probe.load(), Path(arguments.out)
    other = load_pipeline(arguments.against) if arguments.against else None
    prompts, _truth = prompt_grid(arguments.num_prompts)
    scores, pictures = measure(pipeline, probe, arguments.num_prompts)
    out.mkdir(parents=True, exist_ok=True)
    for stage in pipeline.stages:
        title = f"{stage.name}, {stage.resolution} pixels"
        shown = list(zip(prompts, pictures[stage.name], strict=True))[:SHEET]
        gallery([Panel(title, text, image[None]) for text, image in shown]).save(out / f"{stage.name}.png")
    if other is not None:
        others_scores, others = measure(other, probe, arguments.num_prompts)
        scores["against"] = {"pipeline": arguments.against, **others_scores}
        panels = side_by_side(prompts, {arguments.pipeline: pictures, arguments.against: others})
        gallery(panels).save(out / "side_by_side.png")
    write_text(out / "scores.json", json.dumps(scores, indent=2))
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    command.run(main, define_flags, required=("out",))
