import numpy as np
import pytest

from personalize_jax.metrics.similarity import diversity, interval, mean_similarity, prompt_similarity, self_similarity


def units(count: int, seed: int = 0, width: int = 7) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(count, width))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def absolute(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a.astype(float) - b).mean((1, 2, 3))


def test_mean_similarity_of_known_angles():
    a = np.array([[1.0, 0.0]])
    b = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.6, 0.8]])
    assert mean_similarity(a, b) == pytest.approx((1 + 0 - 1 + 0.6) / 4)


def test_a_set_is_similar_to_itself_by_its_different_pairs_only():
    assert self_similarity(np.repeat(units(1), 3, axis=0)) == pytest.approx(1)
    orthogonal = np.eye(4)
    assert self_similarity(orthogonal) == pytest.approx(0)
    assert mean_similarity(orthogonal, orthogonal) == pytest.approx(1 / 4)  # where self-pairs count


def test_order_does_not_matter():
    a, b = units(5), units(4, seed=1)
    images = np.random.default_rng(2).integers(0, 256, (4, 6, 6, 3), np.uint8)
    order = np.random.default_rng(3).permutation
    assert mean_similarity(a[order(5)], b[order(4)]) == pytest.approx(mean_similarity(a, b))
    assert self_similarity(a[order(5)]) == pytest.approx(self_similarity(a))
    assert diversity(images[order(4)], absolute) == pytest.approx(diversity(images, absolute))


def test_each_picture_counts_with_its_own_prompt():
    images = units(5)
    assert prompt_similarity(images, images) == pytest.approx(1)
    assert prompt_similarity(images, -images) == pytest.approx(-1)
    assert prompt_similarity(np.eye(3), np.roll(np.eye(3), 1, axis=0)) == pytest.approx(0)


def test_preservation_gets_worse_as_the_subject_leaks_into_its_class():
    real, others = units(1).repeat(4, axis=0), units(20, seed=4, width=7)
    leaking = [np.concatenate([real[:k].repeat(5, axis=0), others[: 20 - 5 * k]]) for k in range(5)]
    similarities = [mean_similarity(images, real) for images in leaking]
    assert similarities == sorted(similarities)
    assert similarities[-1] == pytest.approx(1)


def test_copies_are_not_diverse():
    image = np.random.default_rng(0).integers(0, 256, (6, 6, 3), np.uint8)
    assert diversity([image] * 3, absolute) == 0
    assert diversity([image, image, 255 - image], absolute) > 0


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


def test_too_few_pictures_are_refused():
    nothing, one = units(0), units(1)
    with pytest.raises(ValueError, match="at least one picture"):
        mean_similarity(nothing, one)
    with pytest.raises(ValueError, match="at least one picture"):
        prompt_similarity(nothing, nothing)
    with pytest.raises(ValueError, match="1 pictures and 2 prompts"):
        prompt_similarity(one, units(2))
    with pytest.raises(ValueError, match="two at least"):
        self_similarity(one)
    with pytest.raises(ValueError, match="two at least"):
        diversity(np.zeros((1, 4, 4, 3), np.uint8), absolute)
    with pytest.raises(ValueError, match="at least one"):
        interval([])
