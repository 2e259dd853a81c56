"""Class images: what the frozen cascade makes of "a [class noun]", drawn once and kept."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from personalize_jax.pictures import read_png, save_png
from personalize_jax.pipeline import Pipeline, Sampling, Stage


def class_images(
    pipeline: Pipeline,
    prompt: str,
    count: int,
    samplings: dict[str, Sampling],
    directory: Path,
    batch_size: int,
    progress: Callable[[int], object] = lambda pictures: None,
) -> dict[str, np.ndarray]:
    """Draw class images from the pretrained cascade, each stage enlarging the pictures of the one before.

    Pictures already in `directory` are used again if they were drawn from the same prompt, seed and sampling, so that
    a run that was cut short draws only what is missing. Picture i has seed i.

    Args:
        pipeline: the pretrained cascade.
        prompt: c_pr, "a [class noun]" (specification [0088]).
        count: number of pictures.
        samplings: how each stage is sampled, by its name; the method's ancestral sampler ([0040]).
        directory: gets a folder of PNG files for each stage, with prompt, seed and sampling in their metadata.
        batch_size: pictures drawn at once.
        progress: called with the number of pictures found or drawn.

    Returns:
        uint8 [count, H, W, 3] by stage name.
    """
    pictures: dict[str, np.ndarray] = {}
    low_res = None
    for i, stage in enumerate(pipeline.stages):
        # A picture depends on how those before it were sampled, too.
        how = {before.name: samplings[before.name]._asdict() for before in pipeline.stages[: i + 1]}
        drawn: list[np.ndarray] = []
        for start in range(0, count, batch_size):
            seeds = list(range(start, min(start + batch_size, count)))
            found = [_read(_file(directory, stage, seed), _metadata(prompt, seed, how)) for seed in seeds]
            if any(picture is None for picture in found):
                found = pipeline.sample_stage(
                    stage,
                    [prompt] * len(seeds),
                    seeds,
                    None if low_res is None else low_res[seeds],
                    batch_size,
                    samplings[stage.name],
                )
                for seed, picture in zip(seeds, found, strict=True):
                    save_png(picture, _file(directory, stage, seed), _metadata(prompt, seed, how))
            drawn.extend(found)
            progress(len(seeds))
        low_res = pictures[stage.name] = np.stack(drawn)
    return pictures


def _file(directory: Path, stage: Stage, seed: int) -> Path:
    return directory / stage.name / f"{seed:05d}.png"


def _metadata(prompt: str, seed: int, how: dict[str, dict]) -> dict[str, str]:
    return {"prompt": prompt, "seed": str(seed), "sampling": json.dumps(how, sort_keys=True)}


def _read(file: Path, expected: dict[str, str]) -> np.ndarray | None:
    """The picture, if it is there and was drawn as expected."""
    if not file.exists():
        return None
    picture, metadata = read_png(file)
    return picture if {k: metadata.get(k) for k in expected} == expected else None
