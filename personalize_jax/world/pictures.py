"""Pictures for training with captions and truth: from the dataset on a CPU, rendered straight to memory elsewhere.

Rendering is slow on a CPU, so that its pictures are kept in files, see `dataset_builder`. An accelerator renders faster
than files are read.
"""

import os

import jax
import numpy as np
from tqdm import tqdm

from personalize_jax.world import dataset_builder
from personalize_jax.world.captions import in_words, sample_phrases
from personalize_jax.world.render import on_accelerator, render
from personalize_jax.world.scene import Scene, Split, select


def training_pictures(resolution: int, split: Split, count: int, data_dir: str | os.PathLike) -> dict[str, np.ndarray]:
    """The first pictures of a split, from wherever this machine has them soonest.

    Args:
        resolution: width and height in pixels.
        split: the split.
        count: number of pictures.
        data_dir: the folder of the dataset, for a CPU.

    Returns:
        See `dataset_builder.load`; on an accelerator also "phrases", see `rendered`.

    Raises:
        ValueError: the split is none of SPLITS, or the count is not positive.
    """
    if on_accelerator():
        return rendered(resolution, split, count)
    return dataset_builder.load(resolution, split, count, data_dir)


def rendered(resolution: int, split: Split, count: int) -> dict[str, np.ndarray]:
    """Render the first pictures of a split to memory.

    Args:
        resolution: width and height in pixels.
        split: the split.
        count: number of pictures.

    Returns:
        The arrays of `dataset_builder.load`, with the same values but for another device's rounding; and "phrases",
        int32 [count, 4, S], the captions as `captions.sample_phrases` gives them, from which `captions.in_tokens` makes
        tokens sooner than a tokenizer does from their words.

    Raises:
        ValueError: the split is none of SPLITS, or the count is not positive.
    """
    dataset_builder.check_request(split, count)
    starts = range(0, count, dataset_builder.BLOCK_SIZE)
    scenes, phrases = zip(*(_block(split, start, count) for start in starts), strict=True)
    all_scenes: Scene = jax.tree.map(lambda *columns: np.concatenate(columns), *scenes)
    all_phrases = np.concatenate(phrases)
    with tqdm(total=count, desc=f"rendering {split} at {resolution}x{resolution}", unit="img") as progress:
        images = render(all_scenes, resolution, progress.update)
    captions = np.array(in_words(all_phrases))
    return dataset_builder.columns_of(all_scenes) | {"image": images, "captions": captions, "phrases": all_phrases}


def _block(split: Split, start: int, count: int) -> tuple[Scene, np.ndarray]:
    """The scenes and the captions' phrases of the block that begins with a picture, up to the count of all pictures."""
    block = start // dataset_builder.BLOCK_SIZE
    scenes = select(dataset_builder.block_scenes(split, block), slice(count - start))
    rng = dataset_builder.block_rng(split, block, "captions")
    return scenes, sample_phrases(scenes, rng, dataset_builder.CAPTIONS_PER_IMAGE)
