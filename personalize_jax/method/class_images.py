"""Class images: what the frozen cascade makes of "a [class noun]", drawn once and kept; or pictures of one's own."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from personalize_jax.pipeline import Pipeline, Sampling, Stage
from personalize_jax.pipeline.pictures import sample_missing
from personalize_jax.runtime.errors import UserError
from personalize_jax.subject.images import SUFFIXES, list_images, load_images

_ALWAYS_KEPT = {"prompt", "seed", "sampling"}  # in the metadata of every class image that was ever drawn


def class_images(
    pipeline: Pipeline,
    weights: str,
    prompt: str,
    count: int,
    samplings: dict[str, Sampling],
    directory: Path,
    batch_size: int,
    progress: Callable[[int], object] = lambda pictures: None,
) -> dict[str, np.ndarray]:
    """Draw class images from the pretrained cascade, each stage enlarging the pictures of the one before.

    Pictures already in `directory` are used again if they were drawn by the same weights from the same prompt, seed
    and sampling, so that a run that was cut short draws only what is missing, in batches of constant size. Picture i
    has seed i.

    Args:
        pipeline: the pretrained cascade, or its first stages.
        weights: the whole cascade's fingerprint.
        prompt: c_pr, "a [class noun]" (specification [0088]).
        count: number of pictures.
        samplings: how each stage is sampled, by its name; the method's ancestral sampler ([0040]).
        directory: gets a folder of PNG files for each stage, with prompt, seed, sampling and weights in their metadata.
        batch_size: pictures drawn at once.
        progress: called with the number of pictures found or drawn.

    Returns:
        uint8 [count, H, W, 3] by stage name.

    Raises:
        UserError: `directory` holds pictures that were not drawn for it, or damaged ones, or a picture is not finite.
    """
    _check_drawn(directory)
    pictures: dict[str, np.ndarray] = {}
    low_res = None
    for i, stage in enumerate(pipeline.stages):
        # A picture depends on how those before it were sampled, too.
        how = {before.name: samplings[before.name]._asdict() for before in pipeline.stages[: i + 1]}
        files = [directory / stage.name / f"{seed:05d}.png" for seed in range(count)]
        sampled = json.dumps(how, sort_keys=True)
        same = {"prompt": prompt, "sampling": sampled, "weights": weights}
        metadata = [{**same, "seed": str(seed)} for seed in range(count)]

        def draw(seeds: list[int], stage: Stage = stage, low_res: np.ndarray | None = low_res) -> np.ndarray:
            before = None if low_res is None else low_res[seeds]
            how = before, batch_size, samplings[stage.name]
            return pipeline.sample_stage(stage, [prompt] * len(seeds), seeds, *how, full_batches=True)

        low_res = pictures[stage.name] = np.stack(sample_missing(draw, files, metadata, batch_size, progress))
    return pictures


def _check_drawn(directory: Path) -> None:
    """Raises UserError if a folder for class images holds other pictures, which somebody may have put there."""
    for file in sorted(directory.rglob("*")):
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and not _is_drawn(file):
            raise UserError(
                f"{file} was not drawn here, and class images are kept in {directory}. Move it elsewhere; pictures in "
                "a folder of their own take the place of drawn ones by --config.class_images.folder."
            )


def _is_drawn(file: Path) -> bool:
    try:
        with Image.open(file) as image:
            return image.info.keys() >= _ALWAYS_KEPT
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return re.fullmatch(r"\d{5,}\.png", file.name) is not None  # a damaged one, which reading it will tell


def own_files(folder: str | Path) -> list[Path]:
    """The pictures of a folder that are to take the place of drawn class images, in order of name.

    Raises:
        UserError: there are none.
    """
    folder = Path(folder)
    if not folder.is_dir() or not any(file.suffix.lower() in SUFFIXES for file in folder.glob("[!.]*")):
        raise UserError(
            f"config.class_images.folder is {str(folder)!r}, where no pictures are; put JPEG, PNG or WebP files of the "
            'class there, or give "" to have them drawn.'
        )
    return list_images(folder)


def own_hashes(folder: str | Path) -> list[str]:
    """SHA-256 of each file of `own_files`, hexadecimal."""
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in own_files(folder)]


def own_class_images(folder: str | Path, resolution: int) -> np.ndarray:
    """The pictures of `own_files`, cropped and resized as a subject's are: uint8 [N, resolution, resolution, 3].

    Raises:
        UserError: there are none, or one cannot be used.
    """
    return np.stack([load_images([file], resolution)[0].pixels for file in own_files(folder)])


def prior_sampling(stage: Stage, settings: ConfigDict) -> Sampling:
    """How class images are drawn: the stage's own sampling with the ancestral sampler."""
    sampling = stage.sampling
    if stage.low_resolution is not None:
        return sampling._replace(sampler="ancestral")
    return sampling._replace(sampler="ancestral", num_steps=settings.num_steps, guidance_scale=settings.guidance_scale)
