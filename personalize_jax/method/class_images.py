"""Class images: pictures of "a [class noun]" that the frozen cascade samples once, or that the user brings."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from tqdm import tqdm

from personalize_jax.pipeline import Pipeline, Sampling, Stage
from personalize_jax.pipeline.kept import sample_missing
from personalize_jax.runtime.errors import UserError
from personalize_jax.subject.images import SUFFIXES, list_images, load_images

_ALWAYS_KEPT = {"prompt", "seed", "sampling"}  # metadata that class images of all versions have


def make_class_images(
    pipeline: Pipeline, class_prompt: str, names: Sequence[str], config: ConfigDict, workdir: Path
) -> dict[str, np.ndarray]:
    """Class images by stage, uint8 [N, H, W, 3].

    They are sampled by the method's ancestral sampler (specification [0040]), for the named stages and those before
    them, at each stage's resolution. If `class_images.folder` names a folder, they are its pictures, for the named
    stages, at the last stage's resolution.

    Args:
        pipeline: the pretrained cascade.
        class_prompt: c_pr, "a [class noun]" (specification [0088]).
        names: names of stages.
        config: configuration of the run.
        workdir: run directory, which keeps the pictures in `class_images/`.

    Raises:
        UserError: the folder has no pictures, or one that cannot be used; see also `sample_class_images`.
    """
    settings = config.class_images
    if settings.folder:
        return dict.fromkeys(names, own_class_images(settings.folder, pipeline.stages[-1].resolution))
    cascade = pipeline.up_to(max(names, key=[stage.name for stage in pipeline.stages].index))
    samplings = {stage.name: prior_sampling(stage, settings) for stage in cascade.stages}
    with tqdm(total=settings.count * len(samplings), desc="class images", unit="img") as bar:
        return sample_class_images(
            cascade,
            pipeline.fingerprint,
            class_prompt,
            settings.count,
            samplings,
            workdir / "class_images",
            settings.batch_size,
            bar.update,
        )


def sample_class_images(
    pipeline: Pipeline,
    weights: str,
    prompt: str,
    count: int,
    samplings: Mapping[str, Sampling],
    directory: Path,
    batch_size: int,
    progress: Callable[[int], object] = lambda pictures: None,
) -> dict[str, np.ndarray]:
    """Sample class images from the pretrained cascade, each stage from the pictures of the one before.

    Pictures that are in `directory` already, of the same weights, prompt, seed and sampling, are not sampled again.
    What is missing is sampled in batches of one size. Picture i has seed i.

    Args:
        pipeline: the pretrained cascade, or its first stages.
        weights: fingerprint of the whole cascade.
        prompt: prompt of all pictures.
        count: number of pictures.
        samplings: how each stage is sampled, by its name.
        directory: directory with a folder of PNG files for each stage, which have prompt, seed, sampling and weights as
            metadata.
        batch_size: number of pictures sampled at once.
        progress: called with the number of pictures found or sampled.

    Returns:
        uint8 [count, H, W, 3] by stage name.

    Raises:
        UserError: `directory` has pictures that were not sampled here, or a damaged one, or a picture is not finite.
    """
    _check_sampled_here(directory)
    pictures: dict[str, np.ndarray] = {}
    low_res = None
    for i, stage in enumerate(pipeline.stages):
        # A picture depends on the sampling of the stages before, too.
        sampled = {before.name: samplings[before.name]._asdict() for before in pipeline.stages[: i + 1]}
        same = {"prompt": prompt, "sampling": json.dumps(sampled, sort_keys=True), "weights": weights}
        metadata = [{**same, "seed": str(seed)} for seed in range(count)]
        files = [directory / stage.name / f"{seed:05d}.png" for seed in range(count)]

        def sample(seeds: list[int], stage: Stage = stage, low_res: np.ndarray | None = low_res) -> np.ndarray:
            low = None if low_res is None else low_res[seeds]
            prompts, sampling = [prompt] * len(seeds), samplings[stage.name]
            return pipeline.sample_stage(stage, prompts, seeds, low, batch_size, sampling, full_batches=True)

        low_res = pictures[stage.name] = np.stack(sample_missing(sample, files, metadata, batch_size, progress))
    return pictures


def _check_sampled_here(directory: Path) -> None:
    """Raises UserError if a directory for class images has other pictures, which somebody may have put there."""
    for file in sorted(directory.rglob("*")):
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and not _is_sampled(file):
            raise UserError(
                f"{file} was not sampled here, and class images are kept in {directory}. Move it elsewhere; pictures "
                "in a folder of their own take the place of sampled ones by --config.class_images.folder."
            )


def _is_sampled(file: Path) -> bool:
    try:
        with Image.open(file) as image:
            return image.info.keys() >= _ALWAYS_KEPT
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return re.fullmatch(r"\d{5,}\.png", file.name) is not None  # a damaged one, which reading refuses


def own_files(folder: str | Path) -> list[Path]:
    """The user's pictures in a folder, which take the place of sampled class images, in order of name.

    Raises:
        UserError: there are none.
    """
    folder = Path(folder)
    if not folder.is_dir() or not any(file.suffix.lower() in SUFFIXES for file in folder.glob("[!.]*")):
        raise UserError(
            f"config.class_images.folder is {str(folder)!r}, where no pictures are; put JPEG, PNG or WebP files of the "
            'class there, or give "" to have them sampled.'
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
    """How class images are sampled: as the stage is, but by the ancestral sampler."""
    sampling = stage.sampling
    if stage.low_resolution is not None:
        return sampling._replace(sampler="ancestral")
    return sampling._replace(sampler="ancestral", num_steps=settings.num_steps, guidance_scale=settings.guidance_scale)
