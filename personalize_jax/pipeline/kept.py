"""Sampled pictures that are kept in files, so that a call which was cut short loses a batch at most."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np

from personalize_jax.pipeline.cascade import Pipeline, batch_of
from personalize_jax.pipeline.pictures import read_png, save_png
from personalize_jax.runtime import hosts


def sample_kept(
    pipeline: Pipeline,
    weights: str,
    prompts: Sequence[str],
    seeds: Sequence[int],
    files: Sequence[Path],
    batch_size: int,
    progress: Callable[[int], object] = lambda pictures: None,
) -> list[np.ndarray]:
    """Pictures of a pipeline's last stage: those that are missing, or of other weights, are sampled.

    Args:
        pipeline: the cascade, or its first stages.
        weights: fingerprint of the whole cascade, kept with every picture.
        prompts: one a picture.
        seeds: one a picture.
        files: one a picture.
        batch_size: number of pictures that are sampled at once, and written before the next ones.
        progress: called with the number of pictures found or sampled.
    """
    metadata = [
        {"prompt": prompt, "seed": str(seed), "weights": weights} for prompt, seed in zip(prompts, seeds, strict=True)
    ]

    def sample(rows: list[int]) -> np.ndarray:
        some = [prompts[i] for i in rows], [seeds[i] for i in rows]
        return pipeline.sample(*some, batch_size, full_batches=True)[-1]  # of one size, whatever is missing

    return sample_missing(sample, files, metadata, batch_size, progress)


def sample_missing(
    sample: Callable[[list[int]], np.ndarray],
    files: Sequence[Path],
    metadata: Sequence[Mapping[str, str]],
    batch_size: int,
    progress: Callable[[int], object] = lambda pictures: None,
) -> list[np.ndarray]:
    """Read the pictures that are there, and sample the others.

    Of several processes each writes its share of the files.

    Args:
        sample: samples the pictures of given numbers; each must be the same whatever others are sampled with it.
        files: one a picture.
        metadata: one a picture: what determines it. A picture whose file has other metadata is sampled again.
        batch_size: number of pictures that are sampled at once, and written before the next ones.
        progress: called with the number of pictures found or sampled.

    Returns:
        The pictures, uint8 [H, W, 3] each.

    Raises:
        UserError: a file that is there is damaged.
    """
    pictures = {}
    for i, file in enumerate(files):
        if file.exists():
            pixels, found = read_png(file)
            if found == metadata[i]:
                pictures[i] = pixels
    found_by_all = hosts.true_in_all([i in pictures for i in range(len(files))])
    missing = [i for i, is_found in enumerate(found_by_all) if not is_found]
    progress(len(files) - len(missing))
    size = batch_of(batch_size, batch_size)
    for start in range(0, len(missing), size):
        batch = missing[start : start + size]
        pictures |= zip(batch, sample(batch), strict=True)
        share = batch[jax.process_index() :: jax.process_count()]
        hosts.each_does(partial(_save, [(pictures[i], files[i], metadata[i]) for i in share]))
        progress(len(batch))
    return [pictures[i] for i in range(len(files))]


def _save(pictures: Sequence[tuple[np.ndarray, Path, Mapping[str, str]]]) -> None:
    for picture in pictures:
        save_png(*picture)
