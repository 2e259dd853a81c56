"""The paper's metrics, defined on embeddings and distances (Ruiz et al. 2023, sections 4.1, 4.3 and 5).

    DINO     mean_similarity of generated pictures of a subject and real ones, ViT-S/16 of DINO
    CLIP-I   the same, CLIP's pictures
    CLIP-T   prompt_similarity of generated pictures and their prompts, CLIP
    PRES     mean_similarity of pictures of "a class", generated without the identifier, and real ones of the subject,
             DINO: the lower, the less the class has become the subject
    DIV      diversity of pictures of one subject generated for one prompt, LPIPS; the mean over prompts
    real     self_similarity of a subject's real pictures

Each is computed for a subject first; tables give the mean over subjects with an `interval` over them. `DEFINITIONS`
counts versions of all this: figures of different versions cannot be compared.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

DEFINITIONS = 1


class Estimate(NamedTuple):
    """A mean over subjects.

    Attributes:
        mean: of the values.
        low: lower end of its 95 % interval; equal to the mean where there is one subject.
        high: upper end.
    """

    mean: float
    low: float
    high: float


def mean_similarity(a_ND: np.ndarray, b_MD: np.ndarray) -> float:
    """Mean cosine over all N M pairs, in [-1, 1].

    Args:
        a_ND: embeddings of unit length.
        b_MD: others.

    Raises:
        ValueError: one of the sets is empty.
    """
    _check_some(a_ND, b_MD)
    return float(np.mean(a_ND @ b_MD.T))


def self_similarity(a_ND: np.ndarray) -> float:
    """Mean cosine over the N (N - 1) / 2 pairs of different pictures, in [-1, 1]: no picture is compared with itself.

    Args:
        a_ND: embeddings of unit length.

    Raises:
        ValueError: fewer than two.
    """
    N = len(a_ND)
    if N < 2:
        raise ValueError(f"A set's similarity to itself was asked for {N} picture(s); give two at least.")
    return float(np.mean((a_ND @ a_ND.T)[np.triu_indices(N, k=1)]))


def prompt_similarity(images_ND: np.ndarray, texts_ND: np.ndarray) -> float:
    """Mean cosine of each picture and its own prompt, in [-1, 1].

    Args:
        images_ND: embeddings of unit length.
        texts_ND: of the prompts, one for each picture.

    Raises:
        ValueError: no pictures, or another number of prompts.
    """
    _check_some(images_ND)
    if images_ND.shape != texts_ND.shape:
        raise ValueError(f"{len(images_ND)} pictures and {len(texts_ND)} prompts were given; give each its prompt.")
    return float(np.mean(np.sum(images_ND * texts_ND, axis=-1)))


def diversity(images: Sequence[np.ndarray], distance: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> float:
    """Mean distance over all pairs of different pictures; 0 where all are copies of one.

    Args:
        images: uint8 [H, W, 3], of one size.
        distance: of two batches of them, as `encoders.load_lpips` gives.

    Raises:
        ValueError: fewer than two pictures.
    """
    pairs = list(itertools.combinations(range(len(images)), 2))
    if not pairs:
        raise ValueError(f"The diversity of {len(images)} picture(s) was asked for; give two at least.")
    first, second = (np.stack([images[pair[k]] for pair in pairs]) for k in (0, 1))
    return float(np.mean(distance(first, second)))


def interval(values: Sequence[float], seed: int = 0) -> Estimate:
    """The mean over subjects with its 95 % percentile-bootstrap interval, 10,000 resamples of subjects.

    Args:
        values: one of each subject.
        seed: of the resampling.

    Raises:
        ValueError: no values.
    """
    _check_some(values)
    mean = float(np.mean(values))
    if len(values) == 1 or np.ptp(values) == 0:
        return Estimate(mean, mean, mean)
    result = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=seed)
    return Estimate(mean, *map(float, result.confidence_interval))


def _check_some(*sets: Sequence) -> None:
    if any(not len(items) for items in sets):
        raise ValueError("A mean over nothing was asked for; give at least one picture, or subject, in each set.")
