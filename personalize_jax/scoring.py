"""Scores of pictures one by one, by the paper's metrics and, on the rendered world, by exact ones.

What reads the pictures are `Judges`: DINO, CLIP and LPIPS, or what stands for them on the rendered world, and there the
probe, too.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from personalize_jax.errors import UserError
from personalize_jax.files import write_text
from personalize_jax.metrics.encoders import (
    ClipEncoder,
    ImageEncoder,
    cosine_distance,
    find_clip,
    find_dino,
    find_lpips,
    label,
    load_clip,
    load_dino,
    load_lpips,
)
from personalize_jax.metrics.similarity import (
    distances_within,
    prompt_similarities,
    similarities,
    similarities_within,
)
from personalize_jax.metrics.table import Row, Scores, SubjectScores, subject_scores
from personalize_jax.subject.class_noun import class_prompt
from personalize_jax.subject.images import from_pixels
from personalize_jax.world import exact_metrics
from personalize_jax.world.probe import RESOLUTION, Probe
from personalize_jax.world.reading import Reading, subject_truth

Truth = Mapping[str, int | np.ndarray]


class Judges(NamedTuple):
    """What reads pictures.

    Attributes:
        dino: embeds pictures for DINO and PRES.
        clips: by name, for CLIP-I and CLIP-T; the first is the one that bears these names alone.
        distance: of two batches of pictures, for DIV.
        probe: the world's; None where pictures are not of the rendered world.
    """

    dino: ImageEncoder
    clips: Mapping[str, ClipEncoder]
    distance: Callable[[np.ndarray, np.ndarray], np.ndarray]
    probe: Probe | None


class Picture(NamedTuple):
    """A picture to be scored, uint8 [H, W, 3]; for the rest see `metrics.table.Row`."""

    role: str
    prompt: str
    seed: int | None
    file: str
    pixels: np.ndarray


def find_judges(settings: ConfigDict) -> None:
    """See that what `load_judges` reads is there, after downloading it if need be: before anything else is begun.

    Raises:
        UserError: a model that is not there or cannot be used, none for CLIP, or two that have the same name.
    """
    if not settings.clips:
        raise UserError('config.evaluation.clips is empty; name one CLIP at least, such as ("world",).')
    names = [label(source) for source in settings.clips]
    if len(set(names)) < len(names):
        raise UserError(f"config.evaluation.clips has two CLIPs of one name among {', '.join(names)}; rename a folder.")
    find_dino(settings.dino)
    for source in settings.clips:
        find_clip(source)
    if settings.lpips:
        find_lpips(settings.lpips)


def load_judges(settings: ConfigDict) -> Judges:
    """Read what a configuration's `evaluation` keys name: hub names, folders, or "world".

    Raises:
        UserError: see `find_judges`.
    """
    find_judges(settings)
    dino = load_dino(settings.dino)
    clips = {label(source): load_clip(source) for source in settings.clips}
    distance = load_lpips(settings.lpips) if settings.lpips else cosine_distance(dino)
    return Judges(dino, clips, distance, Probe.load() if settings.probe else None)


def score(judges: Judges, subject: str, pictures: Sequence[Picture], truth: Truth | None = None) -> list[Row]:
    """Score the pictures of one subject, of all roles.

    Photos are compared with each other; drawn pictures of the subject with photos, prompts and each other; pictures of
    the class with photos. Scores of photos end in " (real)", those of "class before" in " before".

    Args:
        judges: what reads the pictures.
        subject: its name.
        pictures: with at least one photo.
        truth: a rendered subject's true properties; by default what the probe reads off the photos.

    Raises:
        UserError: no photos.
    """
    roles = dict.fromkeys(picture.role for picture in pictures)
    rows_of = {role: [i for i, picture in enumerate(pictures) if picture.role == role] for role in roles}
    photos = rows_of.pop("photo", [])
    if not photos:
        raise UserError(f"No photos of {subject} were given; pictures are compared with one at least.")
    scores: list[Scores] = [{} for _ in pictures]
    _add_similarities(judges, pictures, photos, rows_of, scores)
    for prompt in dict.fromkeys(pictures[i].prompt for i in rows_of.get("subject", [])):
        alike = [i for i in rows_of["subject"] if pictures[i].prompt == prompt]
        if len(alike) > 1:
            _add(scores, alike, "DIV", distances_within([pictures[i].pixels for i in alike], judges.distance))
    if judges.probe is not None:
        truth = truth or subject_truth(_read(judges.probe, [pictures[i] for i in photos]))
        for role, rows in rows_of.items():
            _add_exact(judges.probe, [pictures[i] for i in rows], role, truth, [scores[i] for i in rows])
    suffixes = {"photo": " (real)", "class before": " before"}
    return [
        Row(subject, p.role, p.prompt, p.seed, p.file, {k + suffixes.get(p.role, ""): v for k, v in of_one.items()})
        for p, of_one in zip(pictures, scores, strict=True)
    ]


def summary(rows: Sequence[Row]) -> SubjectScores:
    """`subject_scores`, and "diversity kept": entropy of the class's colours after, as a share of that before."""
    scores = subject_scores(rows)
    for metrics in scores.values():
        if metrics.get("colours before"):
            metrics["diversity kept"] = metrics["colours"] / metrics["colours before"]
    return scores


def write_rows(rows: Sequence[Row], file: Path) -> None:
    """Write a line of JSON for each picture."""
    write_text(file, "".join(json.dumps(row._asdict()) + "\n" for row in rows))


def read_rows(file: Path) -> list[Row]:
    """Read what `write_rows` wrote.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return [Row(**json.loads(line)) for line in file.read_text().splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} is no file of scores ({error}); delete its folder and evaluate again.") from error


def _add(scores: Sequence[Scores], rows: Sequence[int], metric: str, values: Sequence[float]) -> None:
    for i, value in zip(rows, values, strict=True):
        scores[i][metric] = float(value)


def _add_similarities(
    judges: Judges,
    pictures: Sequence[Picture],
    photos: Sequence[int],
    rows_of: Mapping[str, Sequence[int]],
    scores: Sequence[Scores],
) -> None:
    """DINO, CLIP-I, CLIP-T and PRES; those of further CLIPs carry its name."""
    images = [picture.pixels for picture in pictures]
    embedded = {"DINO": judges.dino(images)}
    for i, (name, clip) in enumerate(judges.clips.items()):
        label = f" ({name})" if i else ""
        images_ND = embedded[f"CLIP-I{label}"] = clip.images(images)
        if rows := rows_of.get("subject"):
            texts_ND = clip.texts([class_prompt(pictures[i].prompt) for i in rows])
            _add(scores, rows, f"CLIP-T{label}", prompt_similarities(images_ND[rows], texts_ND))
    for metric, images_ND in embedded.items():
        if len(photos) > 1:
            _add(scores, photos, metric, similarities_within(images_ND[photos]))
        if rows := rows_of.get("subject"):
            _add(scores, rows, metric, similarities(images_ND[rows], images_ND[photos]))
    for role in rows_of.keys() - {"subject"}:
        _add(scores, rows_of[role], "PRES", similarities(embedded["DINO"][rows_of[role]], embedded["DINO"][photos]))


def _add_exact(probe: Probe, pictures: Sequence[Picture], role: str, truth: Truth, scores: Sequence[Scores]) -> None:
    reading = _read(probe, pictures)
    if role == "subject":
        found = exact_metrics.subject_scores(reading, truth, [picture.prompt for picture in pictures])
    else:
        found = exact_metrics.class_scores(reading, truth)
    for of_one, more in zip(scores, found, strict=True):
        of_one |= more


def _read(probe: Probe, pictures: Sequence[Picture]) -> Reading:
    """What the probe reads off pictures of any size: their middle squares, in the sides that it takes."""
    least = min(min(picture.pixels.shape[:2]) for picture in pictures)
    side = max(least // RESOLUTION, 1) * RESOLUTION
    return probe.read(np.stack([from_pixels(p.file, p.pixels, side).pixels for p in pictures]))
