"""The labelled dataset of one subject, kept as files that people can look at: 00.png, 01.png, ..., subject.json."""

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from personalize_jax.runtime.errors import UserError
from personalize_jax.subject.class_noun import ClassNoun, with_article
from personalize_jax.subject.identifier import PLACEHOLDER, Identifier
from personalize_jax.subject.images import SubjectImage

MANIFEST = "subject.json"


class SubjectDataset(NamedTuple):
    """Images of a subject with their labels.

    Attributes:
        images_NHWC: uint8 [N, R, R, 3].
        labels: the label of each image, usually "a [identifier] [class noun]".
        class_noun: the subject's class noun.
        identifier: the subject's identifier.
    """

    images_NHWC: np.ndarray
    labels: tuple[str, ...]
    class_noun: ClassNoun
    identifier: Identifier

    @property
    def phrase(self) -> str:
        """The name of the subject in prompts, as in its labels: "[V] [class noun]", or "[V]" alone."""
        named = re.search(rf"(?<!\w){re.escape(self.class_noun.noun)}(?!\w)", self.labels[0])
        return f"{PLACEHOLDER} {self.class_noun.noun}" if named else PLACEHOLDER

    @property
    def class_prompt(self) -> str:
        """The prompt of the prior-preservation term, "a [class noun]" or "an [class noun]" (c_pr in the paper)."""
        return with_article(self.class_noun.noun)


def write_dataset(
    directory: Path,
    images: Sequence[SubjectImage],
    class_noun: ClassNoun,
    identifier: Identifier,
    name_class: bool = True,
) -> SubjectDataset:
    """Label the images and write them, all or nothing.

    Args:
        directory: the folder to make; it may exist if it is empty.
        images: one or more, all of one resolution.
        class_noun: the subject's class noun.
        identifier: the subject's identifier.
        name_class: whether labels are "a [identifier] [class noun]", or "a [identifier]" alone.

    Raises:
        UserError: the directory holds something or cannot be written.
        ValueError: there are no images, or they differ in resolution.
    """
    if len({image.pixels.shape for image in images}) != 1:
        raise ValueError(f"{len(images)} images of one resolution were expected; load them in one call of load_images")
    label = f"a {identifier.text} {class_noun.noun}" if name_class else f"a {identifier.text}"
    pngs = [_encode_png(image.pixels) for image in images]
    entries = [
        {
            "file": f"{n:02d}.png",
            "sha256": hashlib.sha256(png).hexdigest(),
            "label": label,
            "source": image.path.name,
            "source_sha256": image.sha256,
        }
        for n, (image, png) in enumerate(zip(images, pngs, strict=True))
    ]
    manifest = {
        "class_noun": class_noun.noun,
        "class_score": class_noun.score,
        "class_source": class_noun.source,
        **identifier.to_json(),
        "images": entries,
    }
    temporary = directory.with_name(f".{directory.name}.tmp")  # a fixed name, so that a killed run leaves no heap
    try:
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise UserError(f"{directory} already exists; read the dataset there, or choose another directory.")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for entry, png in zip(entries, pngs, strict=True):
            (temporary / entry["file"]).write_bytes(png)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(temporary, directory)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"The dataset cannot be written to {directory} ({error.strerror}); check permissions and free space."
        ) from error
    return SubjectDataset(np.stack([image.pixels for image in images]), (label,) * len(images), class_noun, identifier)


def read_dataset(directory: Path) -> SubjectDataset:
    """Read a dataset that `write_dataset` wrote; every image must have its hash in `subject.json`.

    Raises:
        UserError: the directory holds no dataset, or one that is incomplete or was altered.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); name a directory that holds a subject's dataset."
        ) from error
    except ValueError as error:
        raise UserError(
            f"{path} is not valid JSON ({error}); delete {directory} and make the dataset again."
        ) from error
    try:
        class_noun = ClassNoun(str(manifest["class_noun"]), float(manifest["class_score"]), manifest["class_source"])
        identifier = Identifier.from_json(manifest)
        entries = [(entry["file"], entry["sha256"], str(entry["label"])) for entry in manifest["images"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} does not describe a subject ({error!r}); delete {directory} and make the dataset again."
        ) from error
    images = [_read_png(directory, file, sha256) for file, sha256, _ in entries]
    if len({image.shape for image in images}) != 1:
        raise UserError(
            f"{path} lists no images, or some of other sizes; delete {directory} and make the dataset again."
        )
    labels = tuple(label for _, _, label in entries)
    unlabelled = [label for label in labels if identifier.text not in label.split()]
    if unlabelled:
        raise UserError(
            f"The label {unlabelled[0]!r} in {path} lacks the identifier {identifier.text!r}; put it before the noun."
        )
    return SubjectDataset(np.stack(images), labels, class_noun, identifier)


def _encode_png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _read_png(directory: Path, file: str, sha256: str) -> np.ndarray:
    # The manifest is a file that people pass on: a name in it must not lead out of its directory.
    if not isinstance(file, str) or file != os.path.basename(file) or not file.endswith(".png"):
        raise UserError(f"{directory / MANIFEST} names the image {file!r}; a plain name such as '00.png' is expected.")
    path = directory / file
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); make the dataset again.") from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{path} is not the image that {MANIFEST} describes; put it back or make the dataset again.")
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        return np.array(image.convert("RGB"))
