"""Pictures of a pipeline that are kept in files, so that a call which was cut short goes on where it was stopped."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from personalize_jax.pipeline.cascade import Pipeline
from personalize_jax.pipeline.pictures import sample_missing


def sample_kept(
    pipeline: Pipeline,
    weights: str,
    texts: Sequence[str],
    seeds: Sequence[int],
    files: Sequence[Path],
    batch_size: int,
    progress: Callable[[int], object] = lambda pictures: None,
) -> list[np.ndarray]:
    """A pipeline's pictures, of its last stage, drawn where they are missing or of other weights.

    Args:
        pipeline: the cascade, or its first stages.
        weights: the whole cascade's fingerprint, kept with every picture.
        texts: what each picture is of.
        seeds: one a picture.
        files: where each of them lies.
        batch_size: pictures drawn at once, and kept before the next ones.
        progress: called with the number of pictures found or drawn.
    """
    wanted = [{"prompt": t, "seed": str(s), "weights": weights} for t, s in zip(texts, seeds, strict=True)]

    def sample(rows: list[int]) -> np.ndarray:
        some = [texts[i] for i in rows], [seeds[i] for i in rows]
        return pipeline.sample(*some, batch_size, full_batches=True)[-1]  # of one size, whatever is missing

    return sample_missing(sample, files, wanted, batch_size, progress)
