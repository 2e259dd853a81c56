"""The report of a finished run: sampled pictures, exact scores where the probe can read them, gallery and page."""

import importlib.metadata
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from personalize_jax.evaluation import metric_registry
from personalize_jax.evaluation.protocol import sample_role
from personalize_jax.evaluation.report import Panel, gallery, read_metrics, report_html
from personalize_jax.evaluation.scoring import score, summary
from personalize_jax.method import personalization
from personalize_jax.method.class_images import own_files
from personalize_jax.method.configuration import num_steps
from personalize_jax.method.finished import usage
from personalize_jax.method.personalized import Personalized
from personalize_jax.metrics.metric import Picture
from personalize_jax.pipeline import Pipeline
from personalize_jax.runtime import hosts
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import replacing, write_text
from personalize_jax.runtime.manifest import phase, phase_times
from personalize_jax.subject.dataset import SubjectDataset
from personalize_jax.subject.identifier import PLACEHOLDER
from personalize_jax.training.tracking import JSONL_ONLY, Tracking
from personalize_jax.world.probe import RESOLUTION, Probe

CLASS_PANEL = 8  # class pictures in the report; all of them are scored
CLASS_SEED = 1000  # of the first class picture; differs from the seeds of the class images used in training


def seeds(config: ConfigDict) -> dict[str, object]:
    """The seeds of everything random in a run, up to its report, for the manifest."""
    report = config.report
    return personalization.seeds(config) | {
        "samples": [0, report.images_per_context - 1],
        "class samples": [CLASS_SEED, CLASS_SEED + report.class_samples - 1],
    }


def check(pipeline: Pipeline, config: ConfigDict) -> None:
    """Refuse a configuration whose pictures the probe could not read, before any is sampled.

    Raises:
        UserError: the probe is asked for and cannot read a stage's resolution.
    """
    sides = {stage.name: stage.resolution for stage in pipeline.stages}
    if config.evaluation.probe and (wrong := [name for name, side in sides.items() if side % RESOLUTION]):
        raise UserError(
            f"config.evaluation.probe is True, and the probe reads sides of a multiple of {RESOLUTION} pixels, not the "
            f"{sides[wrong[0]]} of {wrong[0]}; give --config.evaluation.probe=false."
        )


def make_report(
    pretrained: Pipeline,
    personalized: Personalized,
    without_prior: Pipeline | None,
    config: ConfigDict,
    workdir: Path,
    tracking: Tracking = JSONL_ONLY,
) -> None:
    """Sample the report's pictures, score them, and write `metrics.json`, `gallery.png` and `report.html`.

    Args:
        pretrained: the cascade before tuning.
        personalized: the cascade after tuning.
        without_prior: the cascade tuned without the prior term, to compare with; or None.
        config: the run's configuration, of which `report` says what is sampled.
        workdir: run directory.
        tracking: additional destinations of the pictures.
    """
    subject = personalized.subject
    pipelines = {"before": pretrained, "after": personalized.pipeline}
    if without_prior is not None:
        pipelines["after, without the prior term"] = without_prior

    with phase(workdir, "samples"):
        in_contexts = _sample_contexts(personalized, config, workdir / "samples")
        of_class, enlarged = {}, {}
        for name, pipeline in pipelines.items():
            folder = workdir / "class_samples" / re.sub(r"\W+", "_", name)
            base = pipeline.up_to(pipeline.stages[0].name)
            count = config.report.class_samples
            of_class[name] = _sample_class(base, pipeline.fingerprint, subject, count, config, folder)
            count = min(count, CLASS_PANEL)
            enlarged[name] = _sample_class(pipeline, pipeline.fingerprint, subject, count, config, folder)

    scores = {}
    if config.evaluation.probe:
        with phase(workdir, "metrics"):
            scores = exact_scores(subject, {"subject": in_contexts} | {f"class {k}": v for k, v in of_class.items()})

    with phase(workdir, "report"):
        panels = _panels(subject, in_contexts, enlarged)
        if tracking != JSONL_ONLY:
            tracking.for_part("pictures").write(num_steps(config), sheets(panels))
        curves = {file.parent.name: read_metrics(file) for file in sorted(workdir.glob("*/metrics.jsonl"))}
        noun = subject.class_noun
        about = usage(subject, workdir, config.report.contexts[0]) | {
            "token ids": list(subject.identifier.token_ids),
            f"their frequency ({config.subject.frequency})": list(subject.identifier.counts),
            "class noun": f"{noun.noun} ({noun.source}, score {noun.score:.2f})",
            **own_class_images(config),
        }
        facts = {"seed": config.seed, "jax": importlib.metadata.version("jax")}
        title = f'"{subject.labels[0]}", personalised'
        page = report_html(title, panels, curves, scores, phase_times(workdir), facts, about)

        def write() -> None:
            write_text(workdir / "metrics.json", json.dumps({k: value for k, (value, _) in scores.items()}, indent=2))
            with replacing(workdir / "gallery.png") as temporary:
                gallery(panels).save(temporary, "PNG")
            write_text(workdir / "report.html", page)

        hosts.first_does(write)


def own_class_images(config: ConfigDict) -> dict[str, str]:
    """The report's line about class images that the user brought; empty where they are sampled."""
    folder = config.class_images.folder
    return (
        {"class images": f"{len(own_files(folder))} pictures of {folder}, in place of sampled ones"} if folder else {}
    )


def sheets(panels: Sequence[Panel]) -> dict[str, np.ndarray]:
    """A contact sheet of each panel, uint8 [H, W, 3], by the panel's prompt and note."""
    return {", ".join(filter(None, (panel.prompt, panel.note))): np.asarray(gallery([panel])) for panel in panels}


def exact_scores(subject: SubjectDataset, pictures: Mapping[str, Sequence[Picture]]) -> dict[str, tuple[float, str]]:
    """The scores of the rendered world: (value, definition) by group of pictures and metric, as in "subject: context".

    The class noun is given; the subject's other properties are those that the probe reads in the photos.

    Args:
        subject: the subject with its photos.
        pictures: pictures by the group's name; groups of the class are compared with "class before".
    """
    encoders = {"probe": Probe.load()}
    photos = [Picture("photo", "", None, f"{i:02d}", photo) for i, photo in enumerate(subject.images_NHWC)]
    before = [picture._replace(role="class before") for picture in pictures.get("class before", ())]
    scores = {}
    for name, group in pictures.items():
        compared = before if name != "class before" else []
        rows = score(encoders, subject.labels[0], [*photos, *group, *compared], subject.class_noun.noun)
        (metrics,) = summary(rows).values()
        for metric in metric_registry.metrics_for(encoders):
            if metric.name in metrics:
                count = sum(metric.name in row.scores for row in rows)
                unit = f"{metric.unit}; {count} pictures" if count else metric.unit
                scores[f"{name}: {metric.name}"] = (metrics[metric.name], f"{metric.definition} ({unit})")
    return scores


def _sample_contexts(personalized: Personalized, config: ConfigDict, folder: Path) -> list[Picture]:
    """Pictures of the subject in each of the report's contexts."""
    pipeline, subject, report = personalized.pipeline, personalized.subject, config.report
    prompts = [f"a {subject.phrase} {context}" for context in report.contexts]
    jobs = [(prompt, seed) for prompt in prompts for seed in range(report.images_per_context)]
    with tqdm(total=len(jobs), desc="samples", unit="img") as bar:
        settings = subject.identifier.text, folder, report.batch_size, bar.update
        return sample_role(pipeline, "subject", jobs, pipeline.fingerprint, *settings)


def _sample_class(
    pipeline: Pipeline, weights: str, subject: SubjectDataset, count: int, config: ConfigDict, folder: Path
) -> list[Picture]:
    """Pictures of the class, in a folder that is named by the pipeline's last stage."""
    jobs = [(subject.class_prompt, seed) for seed in range(CLASS_SEED, CLASS_SEED + count)]
    folder /= pipeline.stages[-1].name
    with tqdm(total=count, desc=f'samples of "{subject.class_prompt}"', unit="img") as bar:
        return sample_role(pipeline, "class", jobs, weights, "", folder, config.report.batch_size, bar.update)


def _panels(
    subject: SubjectDataset, in_contexts: Sequence[Picture], of_class: Mapping[str, Sequence[Picture]]
) -> list[Panel]:
    name, prompts = f'"{subject.labels[0]}"', list(dict.fromkeys(picture.prompt for picture in in_contexts))
    title = f"{name} in {len(prompts)} contexts: {PLACEHOLDER} is {subject.identifier.text}"
    panels = [Panel(f"The photos of {name}", f"a {subject.phrase}", subject.images_NHWC)]
    for prompt in prompts:
        pictures = np.stack([picture.pixels for picture in in_contexts if picture.prompt == prompt])
        panels.append(Panel(title, prompt, pictures))
    title = f'"{subject.class_prompt}" before and after'
    for note, group in of_class.items():
        panels.append(Panel(title, subject.class_prompt, np.stack([picture.pixels for picture in group]), note))
    return panels
