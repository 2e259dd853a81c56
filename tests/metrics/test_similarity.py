import itertools

import numpy as np
import pytest

from personalize_jax.metrics.similarity import (
    distances_within,
    interval,
    prompt_similarities,
    similarities,
    similarities_within,
)


def units(count: int, seed: int = 0, width: int = 7) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(count, width))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def absolute(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a.astype(float) - b).mean((1, 2, 3))


def test_similarity_of_known_angles():
    a = np.array([[1.0, 0.0], [0.0, 1.0]])
    b = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.6, 0.8]])
    assert similarities(a, b) == pytest.approx([(1 + 0 - 1 + 0.6) / 4, (0 + 1 + 0 + 0.8) / 4])


def test_a_set_is_similar_to_itself_by_its_different_pairs_only():
    assert similarities_within(np.repeat(units(1), 3, axis=0)) == pytest.approx([1, 1, 1])
    orthogonal = np.eye(4)
    assert similarities_within(orthogonal) == pytest.approx([0] * 4)
    assert similarities(orthogonal, orthogonal) == pytest.approx([1 / 4] * 4)  # where self-pairs count


def test_means_over_pictures_are_means_over_pairs():
    a, images = units(5), np.random.default_rng(2).integers(0, 256, (4, 6, 6, 3), np.uint8)
    cosines = [a[i] @ a[j] for i, j in itertools.combinations(range(5), 2)]
    assert similarities_within(a).mean() == pytest.approx(np.mean(cosines))
    distances = [absolute(x[None], y[None])[0] for x, y in itertools.combinations(images, 2)]
    assert distances_within(images, absolute).mean() == pytest.approx(np.mean(distances))


def test_order_does_not_matter():
    a, b = units(5), units(4, seed=1)
    images = np.random.default_rng(2).integers(0, 256, (4, 6, 6, 3), np.uint8)
    shuffled = np.random.default_rng(3).permutation(5)
    assert similarities(a[shuffled], b[::-1]) == pytest.approx(similarities(a, b)[shuffled])
    assert similarities_within(a[shuffled]) == pytest.approx(similarities_within(a)[shuffled])
    assert distances_within(images[::-1], absolute) == pytest.approx(distances_within(images, absolute)[::-1])


def test_each_picture_counts_with_its_own_prompt():
    images = units(5)
    assert prompt_similarities(images, images) == pytest.approx([1] * 5)
    assert prompt_similarities(images, -images) == pytest.approx([-1] * 5)
    assert prompt_similarities(np.eye(3), np.eye(3)[[0, 2, 1]]) == pytest.approx([1, 0, 0])


def test_preservation_gets_worse_as_the_subject_leaks_into_its_class():
    real, others = units(1).repeat(4, axis=0), units(20, seed=4, width=7)
    leaking = [np.concatenate([real[:k].repeat(5, axis=0), others[: 20 - 5 * k]]) for k in range(5)]
    means = [similarities(images, real).mean() for images in leaking]
    assert means == sorted(means)
    assert means[-1] == pytest.approx(1)


def test_copies_are_not_diverse():
    image = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)
    assert not distances_within([image] * 3, absolute).any()
    copy, _, other = distances_within([image, image, 255 - image], absolute)
    assert other == pytest.approx(2 * copy) and copy > 0


def test_interval_holds_the_mean_and_narrows_with_subjects():
    few, many = (np.random.default_rng(0).normal(0.5, 0.1, count) for count in (5, 500))
    for values in (few, many):
        estimate = interval(values)
        assert estimate.low < estimate.mean < estimate.high
        assert estimate.mean == pytest.approx(values.mean())
    assert np.subtract(*interval(many)[2:0:-1]) < np.subtract(*interval(few)[2:0:-1])
    # Normal theory: 1.96 standard errors to either side.
    assert np.subtract(*interval(many)[2:0:-1]) == pytest.approx(2 * 1.96 * many.std() / 500**0.5, rel=0.1)
    assert interval(few) == interval(few)
    assert interval([0.3]) == interval([0.3, 0.3]) == (0.3, 0.3, 0.3)


def test_interval_lies_between_quantiles_of_resampled_means():
    """Of four values 0, 0, 0, 1, resampled sums are binomial: 0 with .32, at most 2 with .949, at most 3 with .996."""
    assert interval([0.0, 0.0, 0.0, 1.0]) == (0.25, 0.0, 0.75)


def test_too_few_pictures_are_refused():
    nothing, one = units(0), units(1)
    with pytest.raises(ValueError, match="at least one picture"):
        similarities(nothing, one)
    with pytest.raises(ValueError, match="at least one picture"):
        prompt_similarities(nothing, nothing)
    with pytest.raises(ValueError, match="1 pictures and 2 prompts"):
        prompt_similarities(one, units(2))
    with pytest.raises(ValueError, match="two at least"):
        similarities_within(one)
    with pytest.raises(ValueError, match="two at least"):
        distances_within(np.zeros((1, 4, 4, 3), np.uint8), absolute)
    with pytest.raises(ValueError, match="one size"):
        distances_within([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)], absolute)
    with pytest.raises(ValueError, match="at least one"):
        interval([])
