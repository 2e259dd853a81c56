"""Cosines of embeddings and distances of pictures, from which the paper's metrics are computed: one value a picture.

A subject's value is the mean over its pictures, which is the mean over pairs, too; tables give the mean over subjects
with an `interval` over them.
"""

from collections.abc import Callable, Sequence, Sized
from typing import NamedTuple

import numpy as np

# Two batches of pictures, uint8 [N, H, W, 3] -> how far each is from its counterpart, float32 [N].
Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Estimate(NamedTuple):
    """A mean over subjects.

    Attributes:
        mean: the mean.
        low: the lower end of its 95 % interval; equal to the mean where there is one subject.
        high: the upper end.
    """

    mean: float
    low: float
    high: float


def similarities(a_ND: np.ndarray, b_MD: np.ndarray) -> np.ndarray:
    """Mean cosine of each picture to all of another set: float [N] in [-1, 1].

    Args:
        a_ND: embeddings of unit length.
        b_MD: embeddings of the other set.

    Raises:
        ValueError: one of the sets is empty.
    """
    _check_some(a_ND, b_MD)
    return np.mean(a_ND @ b_MD.T, axis=1)


def similarities_within(a_ND: np.ndarray) -> np.ndarray:
    """Mean cosine of each picture to the others of its set, never to itself: float [N] in [-1, 1].

    Args:
        a_ND: embeddings of unit length.

    Raises:
        ValueError: fewer than two.
    """
    N = len(a_ND)
    if N < 2:
        raise ValueError(f"A set's similarity to itself was asked for {N} picture(s); give two at least.")
    return (np.sum(a_ND @ a_ND.T, axis=1) - np.sum(a_ND * a_ND, axis=1)) / (N - 1)


def prompt_similarities(images_ND: np.ndarray, texts_ND: np.ndarray) -> np.ndarray:
    """Cosine of each picture and its own prompt: float [N] in [-1, 1].

    Args:
        images_ND: embeddings of the pictures, of unit length.
        texts_ND: embeddings of the prompts, one for each picture.

    Raises:
        ValueError: no pictures, or another number of prompts.
    """
    _check_some(images_ND)
    if images_ND.shape != texts_ND.shape:
        raise ValueError(f"{len(images_ND)} pictures and {len(texts_ND)} prompts were given; give each its prompt.")
    return np.sum(images_ND * texts_ND, axis=-1)


def distances_within(images: Sequence[np.ndarray], distance: Distance) -> np.ndarray:
    """Mean distance of each picture to the others of its set: float [N], 0 where all are copies of one.

    Args:
        images: uint8 [H, W, 3], of one size.
        distance: a symmetric distance, such as `encoders.load_lpips` or `encoders.cosine_distance` gives.

    Raises:
        ValueError: fewer than two pictures, or pictures of several sizes.
    """
    N = len(images)
    if N < 2:
        raise ValueError(f"The diversity of {N} picture(s) was asked for; give two at least.")
    if len(sizes := {image.shape for image in images}) > 1:
        raise ValueError(f"The diversity of pictures of sizes {sorted(sizes)} was asked for; give them one size.")
    first, second = np.triu_indices(N, k=1)
    images_NHWC = np.stack(images)
    table_NN = np.zeros((N, N))
    table_NN[first, second] = distance(images_NHWC[first], images_NHWC[second])
    return np.sum(table_NN + table_NN.T, axis=1) / (N - 1)


def interval(values: Sequence[float]) -> Estimate:
    """The mean of the values of subjects with its 95 % percentile-bootstrap interval, of 10,000 resamples.

    Raises:
        ValueError: no values.
    """
    _check_some(values)
    mean = float(np.mean(values))
    if len(values) == 1 or np.ptp(values) == 0:
        return Estimate(mean, mean, mean)
    from scipy import stats  # slow to import, and needed by tables alone

    result = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=0)
    return Estimate(mean, *map(float, result.confidence_interval))


def _check_some(*sets: Sized) -> None:
    if any(not len(items) for items in sets):
        raise ValueError("A mean over nothing was asked for; give at least one picture, or subject, in each set.")
