"""Class images: what the frozen cascade makes of "a [class noun]", drawn once and kept."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from personalize_jax.pictures import draw_missing
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
        files = [directory / stage.name / f"{seed:05d}.png" for seed in range(count)]
        sampled = json.dumps(how, sort_keys=True)
        metadata = [{"prompt": prompt, "seed": str(seed), "sampling": sampled} for seed in range(count)]

        def draw(seeds: list[int], stage: Stage = stage, low_res: np.ndarray | None = low_res) -> np.ndarray:
            before = None if low_res is None else low_res[seeds]
            return pipeline.sample_stage(stage, [prompt] * len(seeds), seeds, before, batch_size, samplings[stage.name])

        low_res = pictures[stage.name] = np.stack(draw_missing(draw, files, metadata, batch_size, progress))
    return pictures


def prior_sampling(stage: Stage, settings: ConfigDict) -> Sampling:
    """How class images are drawn: the stage's own sampling with the ancestral sampler."""
    sampling = stage.sampling
    if stage.low_resolution is not None:
        return sampling._replace(sampler="ancestral")
    return sampling._replace(sampler="ancestral", num_steps=settings.num_steps, guidance_scale=settings.guidance_scale)
