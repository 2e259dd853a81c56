"""Evaluation of a personalised cascade: it draws pictures of prompts, and they are scored.

Every picture lies in a folder, with prompt and seed, so that a call goes on where the last one stopped; rows of scores
lie beside them. Pictures that are there already are scored all the same: `read_pictures`.
"""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from personalize_jax.evaluation import metric_registry
from personalize_jax.evaluation.scoring import read_rows, score, write_rows
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

CLASS_SEED = 10_000  # of the first picture of a class: not those of the class images, which the network was tuned on


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
    """Draw pictures of the subject in prompts, and of its class before and after, and score them.

    Args:
        personalized: the tuned cascade with its subject.
        pretrained: the cascade before.
        name: the subject's, in the rows.
        prompts: with "[V]".
        encoders: what reads the pictures; see `score`.
        settings: the configuration's `evaluation` keys.
        folder: for the pictures and `rows.jsonl`.
        photos: real pictures of the subject, uint8 [H, W, 3]; by default those of its labelled dataset.
        truth: see `score`.
        before: folder for the pictures of the class before, which runs may share; by default `folder`.
        progress: called with the number of pictures just found or drawn.

    Returns:
        A row for each photo and each picture; those of an earlier call, if nothing has changed since.

    Raises:
        UserError: a prompt lacks "[V]".
    """
    if plain := [prompt for prompt in prompts if PLACEHOLDER not in prompt]:
        raise UserError(f"The prompt {plain[0]!r} has no {PLACEHOLDER}; write it before the class noun.")
    tuned, untuned = personalized.pipeline.fingerprint, pretrained.fingerprint
    made_of = {
        "definitions": metric_registry.definitions(encoders),
        "weights": {"after": tuned, "before": untuned},
        "prompts": list(prompts),
        "settings": json.loads(settings.to_json()),
    }
    file = folder / "evaluation.json"
    if file.exists() and json.loads(file.read_text()) == made_of:
        return read_rows(folder / "rows.jsonl")

    subject = personalized.subject
    photos = list(subject.images_NHWC) if photos is None else photos
    pictures = [Picture("photo", "", None, f"{i:02d}", photo) for i, photo in enumerate(photos)]
    in_prompts = [(prompt, seed) for prompt in prompts for seed in range(settings.images_per_prompt)]
    of_class = [(subject.class_prompt, CLASS_SEED + i) for i in range(settings.class_samples)]
    size, identifier = settings.batch_size, subject.identifier.text
    pictures += draw(personalized.pipeline, "subject", in_prompts, tuned, identifier, folder, size, progress)
    pictures += draw(personalized.pipeline, "class", of_class, tuned, identifier, folder, size, progress)
    pictures += draw(pretrained, "class before", of_class, untuned, "", before or folder, size, progress)
    rows = score(encoders, name, pictures, subject.class_noun.noun, truth)

    def write() -> None:
        write_rows(rows, folder / "rows.jsonl")
        write_text(file, json.dumps(made_of, indent=2))

    hosts.first_does(write)
    return rows


def draw(
    pipeline: Pipeline,
    role: str,
    jobs: Sequence[tuple[str, int]],
    weights: str,
    identifier: str,
    folder: Path,
    batch_size: int,
    progress: Callable[[int], object] = lambda pictures: None,
) -> list[Picture]:
    """Draw what is not there yet.

    Args:
        pipeline: the cascade.
        role: of the pictures.
        jobs: prompts, with "[V]", and seeds.
        weights: the cascade's fingerprint, kept with every picture.
        identifier: for "[V]".
        folder: for the pictures.
        batch_size: pictures drawn at once, and kept before the next ones.
        progress: called with the number of pictures found or drawn.
    """
    files = [folder / role.replace(" ", "_") / file_name(prompt, seed) for prompt, seed in jobs]
    texts = [substitute(prompt, identifier, pipeline.tokenizer) for prompt, _ in jobs]
    seeds = [seed for _, seed in jobs]
    found = sample_kept(pipeline, weights, texts, seeds, files, batch_size, progress)
    return [
        Picture(role, prompt, seed, file.relative_to(folder).as_posix(), pixels)
        for (prompt, seed), file, pixels in zip(jobs, files, found, strict=True)
    ]


def read_pictures(images: Path, prompts: Path, photos: Path) -> dict[str, list[Picture]]:
    """Read pictures that were drawn elsewhere, with their prompts, and the photos that they are compared with.

    Args:
        images: the folder of the pictures.
        prompts: a CSV file with the columns "file", below `images`, "prompt", and "subject" where there are several. A
            prompt without "[V]" asks for the class.
        photos: the subject's, or where there are several, folders that bear their names.

    Returns:
        Pictures by subject, photos among them.

    Raises:
        UserError: a file that is missing or no picture, a column or a prompt that is missing, or a name that leads out
            of its folder.
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
