import numpy as np
import pytest

from personalize_jax.world.reading import (
    Reading,
    accuracy,
    fidelities,
    is_subject,
    subject_truth,
)

SIZES = {
    "class_id": 12,
    "body_colour": 11,
    "accent_colour": 11,
    "pattern": 4,
    "finish": 2,
    "context": 18,
    "accessory": 4,
}


@pytest.fixture
def truth():
    rng = np.random.default_rng(0)
    return {name: rng.integers(size, size=40) for name, size in SIZES.items()} | {
        "shape": rng.random((40, 4), np.float32)
    }


def reading_of(truth, certainty=0.9):
    """A probe that is right about everything, with the given probability of each true value."""

    def probabilities(values, size):
        right = np.eye(size, dtype=np.float32)[values]
        return certainty * right + (1 - certainty) * (1 - right) / (size - 1)

    shape = truth.get("shape", np.full((len(truth["class_id"]), 4), 0.5, np.float32))
    return Reading(**{name: probabilities(truth[name], size) for name, size in SIZES.items()}, shape=shape)


def coloured(colours):
    colours = np.asarray(colours)
    return reading_of({name: np.zeros_like(colours) for name in SIZES} | {"body_colour": colours})


def test_perfect_pictures_have_fidelity_one(truth):
    reading = reading_of(truth)
    assert set(accuracy(reading, **truth).values()) == {1.0}


def test_fidelity_is_the_share_of_right_pictures(truth):
    reading = reading_of(truth)
    wrong = {name: np.where(np.arange(40) < 10, (truth[name] + 1) % size, truth[name]) for name, size in SIZES.items()}
    assert set(accuracy(reading, **wrong).values()) == {0.75}
    for scores in fidelities(reading, **wrong).values():
        np.testing.assert_array_equal(scores, np.arange(40) >= 10)


def test_every_picture_is_scored_by_itself(truth):
    reading = reading_of(truth)
    asked = {name: values[0] for name, values in truth.items()}
    together = fidelities(reading, **asked)
    for i in (0, 7, 39):
        alone = fidelities(Reading(*(values[i : i + 1] for values in reading)), **asked)
        assert {name: scores[0] for name, scores in alone.items()} == {name: s[i] for name, s in together.items()}
    means = accuracy(reading, **asked)
    assert means == {name: pytest.approx(scores.mean()) for name, scores in together.items()}


def test_likeness_of_proportions_is_linear_in_their_distance(truth):
    reading = reading_of(truth)
    half = truth["shape"] / 2
    scores = fidelities(reading, class_id=truth["class_id"], shape=half)["shape"]
    np.testing.assert_allclose(scores, 1 - half.mean(axis=1), atol=1e-6)


def test_unrelated_proportions_score_two_thirds():
    """Two uniform numbers are a third apart on the average."""
    rng = np.random.default_rng(3)
    scene = {name: np.zeros(4000, int) for name in SIZES} | {"shape": rng.random((4000, 4))}
    score = accuracy(reading_of(scene), class_id=0, shape=rng.random((4000, 4)))["shape"]
    assert score == pytest.approx(2 / 3, abs=0.01)


def test_proportions_of_another_class_count_nothing(truth):
    right = np.arange(40) < 30
    other = np.where(right, truth["class_id"], (truth["class_id"] + 1) % 12)
    scores = fidelities(reading_of(truth), class_id=other, shape=truth["shape"])["shape"]
    np.testing.assert_array_equal(scores, right)


def test_proportions_that_are_unknown_or_cannot_be_told_do_not_count(truth):
    reading = reading_of(truth | {"shape": np.tile(np.float32([0.5, 0.5, np.nan, 0.5]), (40, 1))})
    scores = fidelities(reading, class_id=truth["class_id"], shape=np.array([0.4, 0.5, 0.9, np.nan]))["shape"]
    np.testing.assert_allclose(scores, 0.95, atol=1e-6)
    nothing = fidelities(reading, class_id=truth["class_id"], shape=np.full(4, np.nan))["shape"]
    assert np.isnan(nothing).all()


def test_the_shape_needs_its_class_and_proportions(truth):
    reading = reading_of(truth)
    with pytest.raises(ValueError, match="give class_id beside shape"):
        fidelities(reading, shape=truth["shape"])
    for shape in (np.zeros(3), np.full(4, 1.5), 0.5):
        with pytest.raises(ValueError, match="truth of shape.*proportions in"):
            fidelities(reading, class_id=0, shape=shape)


def test_only_what_agrees_in_all_four_is_the_subject():
    own = {"class_id": 3, "body_colour": 9, "accent_colour": 0, "pattern": 2}
    others = [{**own, name: (value + 1) % SIZES[name]} for name, value in own.items()]
    scenes = [own, *others]
    scene = {name: np.array([s.get(name, 0) for s in scenes]) for name in SIZES}
    np.testing.assert_array_equal(is_subject(reading_of(scene), **own), [True, False, False, False, False])


def test_the_order_of_pictures_does_not_matter(truth):
    reading = reading_of(truth)
    order = np.random.default_rng(1).permutation(40)
    shuffled = Reading(*(p[order] for p in reading))
    assert accuracy(shuffled, class_id=3, pattern=1) == accuracy(reading, class_id=3, pattern=1)
    truths = subject_truth(shuffled), subject_truth(reading)
    np.testing.assert_allclose(*(truth.pop("shape") for truth in truths), atol=1e-6)
    assert truths[0] == truths[1]


def test_truth_of_photos_pools_evidence():
    truth = {"class_id": 3, "body_colour": 9, "accent_colour": 0, "pattern": 2, "finish": 1}
    scene = {name: np.full(5, truth.get(name, 0)) for name in SIZES}
    shape = np.linspace(0, 1, 20, dtype=np.float32).reshape(5, 4)
    read = subject_truth(reading_of(scene | {"shape": shape}))
    np.testing.assert_allclose(read.pop("shape"), shape.mean(axis=0), atol=1e-6)
    assert read == truth
    # Two clear photos outvote three doubtful ones, and proportions are of the former alone.
    doubtful = reading_of(scene | {"class_id": np.full(5, 7)}, certainty=0.3).class_id
    mixed = reading_of(scene | {"shape": shape})
    mixed.class_id[2:] = doubtful[2:]
    assert subject_truth(mixed)["class_id"] == 3
    np.testing.assert_allclose(subject_truth(mixed)["shape"], shape[:2].mean(axis=0), atol=1e-6)


def test_a_known_class_is_not_read():
    scene = reading_of({name: np.full(5, 1) for name in SIZES})
    assert subject_truth(scene, class_id=1)["class_id"] == 1
    other = subject_truth(scene, class_id=4)
    assert other["class_id"] == 4 and "shape" not in other
    assert {name: other[name] for name in ("body_colour", "pattern", "finish")} == {
        "body_colour": 1,
        "pattern": 1,
        "finish": 1,
    }


def test_accents_differ_from_the_body():
    same = {name: np.full(4, 6 if name.endswith("colour") else 0) for name in SIZES}
    truth = subject_truth(reading_of(same))
    assert truth["body_colour"] == 6 != truth["accent_colour"]


@pytest.mark.parametrize("values", [12, -1, [0, 1, 2], np.zeros((40, 1), int)])
def test_truths_that_do_not_fit_are_named(truth, values):
    with pytest.raises(ValueError, match="truth of class_id.*40 pictures, in 0 to 11"):
        accuracy(reading_of(truth), class_id=values)


def test_no_pictures_no_metric(truth):
    empty = Reading(*(p[:0] for p in reading_of(truth)))
    for metric in (subject_truth, lambda reading: accuracy(reading, body_colour=0)):
        with pytest.raises(ValueError, match="no p"):
            metric(empty)
