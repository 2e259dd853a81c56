"""Evaluation of a personalised cascade: sampling pictures of prompts and scoring them.

Every picture is kept in a file with its prompt and seed, beside the rows of scores, so that an evaluation that was
stopped continues. Pictures that were made elsewhere can be scored as well: see `read_pictures`.
"""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from personalize_jax.evaluation import metric_registry
from personalize_jax.evaluation.scoring import encoder_names, read_rows, score, write_rows
from personalize_jax.method.personalized import Personalized
from personalize_jax.metrics.metric import MetricEncoders, Picture
from personalize_jax.metrics.table import Row
from personalize_jax.pipeline import Pipeline
from personalize_jax.pipeline.kept import sample_kept
from personalize_jax.pipeline.pictures import file_name
from personalize_jax.runtime import hosts
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import write_text
from personalize_jax.subject.identifier import PLACEHOLDER, substitute
from personalize_jax.subject.images import list_images, read_image

CLASS_SEED = 10_000  # of the first class picture; differs from the seeds of the class images used in training
ROWS, RECORD = "rows.jsonl", "evaluation.json"  # the scores, and what they are of


def evaluate(
    personalized: Personalized,
    pretrained: Pipeline,
    name: str,
    prompts: Sequence[str],
    encoders: MetricEncoders,
    settings: ConfigDict,
    folder: Path,
    photos: Sequence[np.ndarray] | None = None,
    truth: Mapping[str, int | np.ndarray] | None = None,
    before: Path | None = None,
    progress: Callable[[int], object] = lambda pictures: None,
) -> list[Row]:
    """Sample pictures of the subject in prompts, and of its class before and after tuning, and score them.

    Args:
        personalized: the tuned cascade with its subject.
        pretrained: the cascade before tuning.
        name: the subject's name in the rows.
        prompts: prompts with "[V]".
        encoders: see `score`.
        settings: the configuration's `evaluation` keys.
        folder: folder of the pictures and of `rows.jsonl`.
        photos: real pictures of the subject, uint8 [H, W, 3]; by default those of its labelled dataset.
        truth: see `score`.
        before: folder of the class pictures before tuning, which runs may share; by default `folder`.
        progress: called with the number of pictures just found or sampled.

    Returns:
        A row for each photo and each picture; those of an earlier call, if nothing has changed since.

    Raises:
        UserError: a prompt lacks "[V]".
    """
    if plain := [prompt for prompt in prompts if PLACEHOLDER not in prompt]:
        raise UserError(f"The prompt {plain[0]!r} has no {PLACEHOLDER}; write it before the class noun.")
    tuned, untuned = personalized.pipeline.fingerprint, pretrained.fingerprint
    record = {
        "weights": {"after": tuned, "before": untuned},
        "prompts": list(prompts),
        "settings": json.loads(settings.to_json()),
    }
    recorded = _read_record(folder)
    definitions = recorded.pop("definitions", {})
    if recorded == record and metric_registry.up_to_date(definitions, encoders):
        return read_rows(folder / ROWS)

    subject = personalized.subject
    photos = list(subject.images_NHWC) if photos is None else photos
    pictures = [Picture("photo", "", None, f"{i:02d}", photo) for i, photo in enumerate(photos)]
    in_prompts = [(prompt, seed) for prompt in prompts for seed in range(settings.images_per_prompt)]
    of_class = [(subject.class_prompt, CLASS_SEED + i) for i in range(settings.class_samples)]
    size, identifier = settings.batch_size, subject.identifier.text
    cascade, before = personalized.pipeline, (before or folder) / "class_before"
    pictures += sample_role(cascade, "subject", in_prompts, tuned, identifier, folder / "subject", size, progress)
    pictures += sample_role(cascade, "class", of_class, tuned, identifier, folder / "class", size, progress)
    pictures += sample_role(pretrained, "class before", of_class, untuned, "", before, size, progress)
    rows = score(encoders, name, pictures, subject.class_noun.noun, truth)

    def write() -> None:
        write_rows(rows, folder / ROWS)
        definitions = metric_registry.metric_versions(encoders)
        write_text(folder / RECORD, json.dumps({"definitions": definitions, **record}, indent=2))

    hosts.first_does(write)
    return rows


def read_scored(folder: Path, settings: ConfigDict) -> list[Row] | None:
    """The rows that `evaluate` wrote; None where they are missing, or of other keys or of other metrics.

    Args:
        folder: the folder of the evaluation.
        settings: the configuration's `evaluation` keys.
    """
    record = _read_record(folder)
    current = metric_registry.up_to_date(record.get("definitions", {}), encoder_names(settings))
    return read_rows(folder / ROWS) if current and record.get("settings") == json.loads(settings.to_json()) else None


def _read_record(folder: Path) -> dict[str, Any]:
    file = folder / RECORD
    return json.loads(file.read_text()) if file.exists() else {}


def sample_role(
    pipeline: Pipeline,
    role: str,
    jobs: Sequence[tuple[str, int]],
    weights: str,
    identifier: str,
    folder: Path,
    batch_size: int,
    progress: Callable[[int], object] = lambda pictures: None,
) -> list[Picture]:
    """Sample the pictures of one role, unless they are in their folder already.

    Args:
        pipeline: the cascade, or its first stages.
        role: the role of the pictures.
        jobs: (prompt, seed) of each picture; prompts may have "[V]".
        weights: the whole cascade's fingerprint, kept with every picture.
        identifier: the text that replaces "[V]".
        folder: folder of the pictures.
        batch_size: pictures sampled at once, and saved before the next ones.
        progress: called with the number of pictures just found or sampled.
    """
    files = [folder / file_name(prompt, seed) for prompt, seed in jobs]
    texts = [substitute(prompt, identifier, pipeline.tokenizer) for prompt, _ in jobs]
    sampled = sample_kept(pipeline, weights, texts, [seed for _, seed in jobs], files, batch_size, progress)
    return [
        Picture(role, prompt, seed, file.relative_to(folder.parent).as_posix(), pixels)
        for (prompt, seed), file, pixels in zip(jobs, files, sampled, strict=True)
    ]


def read_pictures(images: Path, prompts: Path, photos: Path) -> dict[str, list[Picture]]:
    """Read pictures that were made elsewhere, with their prompts, and the photos that they are compared with.

    Args:
        images: the folder of the pictures.
        prompts: a CSV file with the columns "file", below `images`, "prompt", and "subject" where there are several. A
            prompt without "[V]" asks for the class.
        photos: the subject's photos; where there are several subjects, the folder of a folder of photos for each.

    Returns:
        Pictures by subject, photos among them.

    Raises:
        UserError: a file is missing or no picture, a column or a prompt is missing, or a name leads out of its folder.
    """
    by_subject: dict[str, list[Picture]] = {}
    for row in _read_list(prompts):
        subject = row.get("subject") or photos.name
        if subject not in by_subject:
            folder = _inside(photos, row["subject"], prompts) if row.get("subject") else photos
            by_subject[subject] = [Picture("photo", "", None, f.name, read_image(f)) for f in list_images(folder)]
        role = "subject" if PLACEHOLDER in row["prompt"] else "class"
        pixels = read_image(_inside(images, row["file"], prompts))
        by_subject[subject].append(Picture(role, row["prompt"], None, row["file"], pixels))
    return by_subject


def _read_list(file: Path) -> list[dict[str, str]]:
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines, strict=True))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{file} cannot be read as CSV ({error}); give the columns file and prompt.") from error
    if not rows:
        raise UserError(f"{file} lists no pictures; give a line with the file and the prompt of each.")
    for number, row in enumerate(rows, start=2):
        if not row.get("file") or not row.get("prompt"):
            raise UserError(f"Line {number} of {file} lacks a file or a prompt; give the columns file and prompt.")
    if not any(PLACEHOLDER in row["prompt"] for row in rows):
        raise UserError(f"No prompt of {file} has {PLACEHOLDER}; write it where the subject's identifier stood.")
    return rows


def _inside(folder: Path, name: str, origin: Path) -> Path:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{origin} names {name!r}, which lies outside {folder}; give names below it.")
    return path
