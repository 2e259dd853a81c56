"""What a finished run shows: samples, exact scores where a probe exists, gallery and report."""

import importlib.metadata
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from personalize_jax.evaluation import metric_registry
from personalize_jax.evaluation.report import Panel, gallery, read_metrics, report_html
from personalize_jax.evaluation.scoring import score, summary
from personalize_jax.method import personalization
from personalize_jax.method.class_images import own_files
from personalize_jax.method.configuration import num_steps
from personalize_jax.method.personalized import Personalized
from personalize_jax.metrics.metric import Picture
from personalize_jax.pipeline import Pipeline
from personalize_jax.pipeline.kept import sample_kept
from personalize_jax.pipeline.pictures import file_name
from personalize_jax.runtime import hosts
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import replacing, write_text
from personalize_jax.runtime.manifest import phase, phase_times
from personalize_jax.subject.dataset import SubjectDataset
from personalize_jax.subject.identifier import PLACEHOLDER, substitute
from personalize_jax.training.tracking import JSONL_ONLY, Tracking
from personalize_jax.world.probe import RESOLUTION, Probe

CLASS_PANEL = 8  # class pictures shown; all of them are measured
CLASS_SEED = 1000  # of the first class picture: not those of the class images, which the network was tuned on


def seeds(config: ConfigDict) -> dict[str, object]:
    """What is drawn by chance up to the report, for the manifest."""
    report = config.report
    return personalization.seeds(config) | {
        "samples": [0, report.images_per_context - 1],
        "class samples": [CLASS_SEED, CLASS_SEED + report.class_samples - 1],
    }


def check(pipeline: Pipeline, config: ConfigDict) -> None:
    """Refuse to have pictures read that the probe cannot read, before any is drawn.

    Raises:
        UserError: it cannot.
    """
    sides = {stage.name: stage.resolution for stage in pipeline.stages}
    if config.evaluation.probe and (wrong := [name for name, side in sides.items() if side % RESOLUTION]):
        raise UserError(
            f"config.evaluation.probe is True, and the probe reads sides of a multiple of {RESOLUTION} pixels, not the "
            f"{sides[wrong[0]]} of {wrong[0]}; give --config.evaluation.probe=false."
        )


def usage(subject: SubjectDataset, workdir: Path, context: str) -> dict[str, str]:
    """How the subject is called and drawn, in words by what they tell.

    Args:
        subject: the labelled dataset.
        workdir: run directory.
        context: of the prompt that is given as an example, such as "in the snow".
    """
    prompt = f"a {subject.phrase} {context}"
    return {
        "name": subject.labels[0],
        "identifier": f"{subject.identifier.text}: write {PLACEHOLDER} for it in prompts",
        "to draw it": f"python -m personalize_jax.sample --workdir={shlex.quote(str(workdir))} "
        f"--prompt={shlex.quote(prompt)} --out=out/",
    }


def show(
    pretrained: Pipeline,
    personalized: Personalized,
    without_prior: Pipeline | None,
    config: ConfigDict,
    workdir: Path,
    tracking: Tracking = JSONL_ONLY,
) -> None:
    """Draw the report's pictures, measure them, write them and `metrics.json`, `gallery.png` and `report.html`.

    Args:
        pretrained: the cascade before.
        personalized: the cascade after.
        without_prior: the cascade tuned without the prior term, to compare; or None.
        config: of the run; its `report` keys.
        workdir: run directory.
        tracking: where the pictures go besides.
    """
    subject = personalized.subject
    noun = subject.class_noun.noun
    pipelines = {"before": pretrained, "after": personalized.pipeline}
    if without_prior is not None:
        pipelines["after, without the prior term"] = without_prior

    with phase(workdir, "samples"):
        prompts = [f"a {subject.phrase} {context}" for context in config.report.contexts]
        in_context = _draw_contexts(personalized, prompts, config, workdir / "samples")
        of_class = {
            name: _draw_class(
                pipeline, subject.class_prompt, config, workdir / "class_samples" / re.sub(r"\W+", "_", name)
            )
            for name, pipeline in pipelines.items()
        }

    scores = {}
    if config.evaluation.probe:
        with phase(workdir, "metrics"):
            drawn = {"subject": _pictures("subject", prompts, in_context)}
            for name, (measured, _) in of_class.items():
                drawn[f"class {name}"] = _pictures("class", [subject.class_prompt], [measured])
            scores = exact_scores(subject, drawn)

    with phase(workdir, "report"):
        named = f'"{subject.labels[0]}"'
        panels = [Panel(f"The photos of {named}", f"a {subject.phrase}", subject.images_NHWC)]
        panels += [
            Panel(f"{named} in {len(prompts)} contexts: {PLACEHOLDER} is {subject.identifier.text}", prompt, images)
            for prompt, images in zip(prompts, in_context, strict=True)
        ]
        panels += [
            Panel(f'"{subject.class_prompt}" before and after', subject.class_prompt, shown, note=name)
            for name, (_, shown) in of_class.items()
        ]
        if tracking != JSONL_ONLY:
            tracking.of("pictures").pictures(num_steps(config), sheets(panels))
        curves = {file.parent.name: read_metrics(file) for file in sorted(workdir.glob("*/metrics.jsonl"))}
        about = usage(subject, workdir, config.report.contexts[0]) | {
            "token ids": list(subject.identifier.token_ids),
            f"their frequency ({config.subject.frequency})": list(subject.identifier.counts),
            "class noun": f"{noun} ({subject.class_noun.source}, score {subject.class_noun.score:.2f})",
            **own_class_images(config),
        }
        facts = {"seed": config.seed, "jax": importlib.metadata.version("jax")}
        title = f"{named}, personalised"
        page = report_html(title, panels, curves, scores, phase_times(workdir), facts, about)

        def write() -> None:
            write_text(workdir / "metrics.json", json.dumps({k: value for k, (value, _) in scores.items()}, indent=2))
            with replacing(workdir / "gallery.png") as temporary:
                gallery(panels).save(temporary, "PNG")
            write_text(workdir / "report.html", page)

        hosts.first_does(write)


def own_class_images(config: ConfigDict) -> dict[str, str]:
    """What the report says of class images that were not drawn; nothing of others."""
    folder = config.class_images.folder
    return {"class images": f"{len(own_files(folder))} pictures of {folder}, in place of drawn ones"} if folder else {}


def sheets(panels: Sequence[Panel]) -> dict[str, np.ndarray]:
    """A contact sheet of each panel, uint8 [H, W, 3], by what it shows."""
    return {", ".join(filter(None, (panel.prompt, panel.note))): np.asarray(gallery([panel])) for panel in panels}


def exact_scores(subject: SubjectDataset, drawn: Mapping[str, Sequence[Picture]]) -> dict[str, tuple[float, str]]:
    """The scores of the rendered world: (value, what it is) by pictures and metric, as in "class after: leakage".

    The subject's properties are those that the probe reads in the photos; its class is known.

    Args:
        subject: the subject, with its photos.
        drawn: pictures by what the scores call them; those of "class before" are what a class is compared with.
    """
    encoders = {"probe": Probe.load()}
    photos = [Picture("photo", "", None, f"{i:02d}", photo) for i, photo in enumerate(subject.images_NHWC)]
    before = [picture._replace(role="class before") for picture in drawn.get("class before", ())]
    scores = {}
    for called, pictures in drawn.items():
        known = [*photos, *pictures, *(before if called != "class before" else ())]
        rows = score(encoders, subject.labels[0], known, subject.class_noun.noun)
        (metrics,) = summary(rows).values()
        for metric in metric_registry.measured(encoders):
            if metric.name in metrics:
                counted = sum(metric.name in row.scores for row in rows)
                of_pictures = f"; {counted} pictures" if counted else ""
                meaning = f"{metric.definition} ({metric.unit}{of_pictures})"
                scores[f"{called}: {metric.name}"] = (metrics[metric.name], meaning)
    return scores


def _pictures(role: str, prompts: Sequence[str], images: Sequence[np.ndarray]) -> list[Picture]:
    """Pictures to be scored, of several prompts."""
    of_prompt = zip(prompts, images, strict=True)
    return [
        Picture(role, prompt, None, f"{role} {i}", pixels)
        for prompt, images_NHWC in of_prompt
        for i, pixels in enumerate(images_NHWC)
    ]


def _draw_contexts(
    personalized: Personalized, prompts: Sequence[str], config: ConfigDict, folder: Path
) -> list[np.ndarray]:
    """Pictures of each prompt, saved with prompt and seed."""
    count = config.report.images_per_context
    pipeline, identifier = personalized.pipeline, personalized.subject.identifier.text
    jobs = [(prompt, seed) for prompt in prompts for seed in range(count)]
    files = [folder / file_name(prompt, seed) for prompt, seed in jobs]
    texts = [substitute(prompt, identifier, pipeline.tokenizer) for prompt, _ in jobs]
    pictures = _draw(pipeline, pipeline.fingerprint, texts, [seed for _, seed in jobs], files, config, "samples")
    return list(pictures.reshape(len(prompts), count, *pictures.shape[1:]))


def _draw_class(pipeline: Pipeline, prompt: str, config: ConfigDict, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Class pictures of the base stage, to measure, and the first few of them as the whole cascade draws them."""
    seeds = range(CLASS_SEED, CLASS_SEED + config.report.class_samples)
    base = pipeline.up_to(pipeline.stages[0].name)

    def draw(cascade: Pipeline, seeds: Sequence[int]) -> np.ndarray:
        files = [folder / cascade.stages[-1].name / file_name(prompt, seed) for seed in seeds]
        title = f'samples of "{prompt}"'
        return _draw(cascade, pipeline.fingerprint, [prompt] * len(seeds), seeds, files, config, title)

    return draw(base, seeds), draw(pipeline, seeds[:CLASS_PANEL])


def _draw(
    pipeline: Pipeline,
    weights: str,
    texts: Sequence[str],
    seeds: Sequence[int],
    files: Sequence[Path],
    config: ConfigDict,
    title: str,
) -> np.ndarray:
    """`pipeline.kept.sample_kept` with a progress bar."""
    with tqdm(total=len(files), desc=title, unit="img") as bar:
        return np.stack(sample_kept(pipeline, weights, texts, seeds, files, config.report.batch_size, bar.update))
