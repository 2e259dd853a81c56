import numpy as np
import pytest

from personalize_jax.metrics.world import (
    Reading,
    accuracy,
    chance,
    colour_entropy,
    leakage,
    prompt_fidelity,
    subject_fidelity,
    subject_truth,
)

SIZES = Reading(class_id=12, body_colour=11, accent_colour=11, pattern=4, context=18, accessory=4)


@pytest.fixture
def truth():
    rng = np.random.default_rng(0)
    return {name: rng.integers(size, size=40) for name, size in SIZES._asdict().items()}


def reading_of(truth, certainty=0.9):
    """A probe that is right about everything, with the given probability of each true value."""

    def probabilities(values, size):
        right = np.eye(size, dtype=np.float32)[values]
        return certainty * right + (1 - certainty) * (1 - right) / (size - 1)

    return Reading(**{name: probabilities(truth[name], size) for name, size in SIZES._asdict().items()})


def coloured(colours):
    colours = np.asarray(colours)
    return reading_of({name: np.zeros_like(colours) for name in SIZES._fields} | {"body_colour": colours})


def test_perfect_pictures_have_fidelity_one(truth):
    reading = reading_of(truth)
    assert set(accuracy(reading, **truth).values()) == {1.0}
    prompt = prompt_fidelity(reading, truth["class_id"], contexts=truth["context"], colours=truth["body_colour"])
    assert prompt == {"class_id": 1.0, "context": 1.0, "body_colour": 1.0}
    asked = ("body_colour", "accent_colour", "pattern", "class_id")
    assert subject_fidelity(reading, **{name: truth[name] for name in asked}) == dict.fromkeys(asked, 1.0)


def test_only_what_prompts_name_is_scored(truth):
    assert prompt_fidelity(reading_of(truth), truth["class_id"]).keys() == {"class_id"}


def test_fidelity_is_the_share_of_right_pictures(truth):
    reading = reading_of(truth)
    wrong = {
        name: np.where(np.arange(40) < 10, (values + 1) % SIZES._asdict()[name], values)
        for name, values in truth.items()
    }
    assert set(accuracy(reading, **wrong).values()) == {0.75}


def test_the_order_of_pictures_does_not_matter(truth):
    reading = reading_of(truth)
    order = np.random.default_rng(1).permutation(40)
    shuffled = Reading(*(p[order] for p in reading))
    assert accuracy(shuffled, class_id=3, pattern=1) == accuracy(reading, class_id=3, pattern=1)
    assert colour_entropy(shuffled) == pytest.approx(colour_entropy(reading), abs=1e-12)
    assert leakage(shuffled, 4) == leakage(reading, 4)
    assert subject_truth(shuffled) == subject_truth(reading)


def test_entropy_of_copies_of_uniform_and_of_two_colours():
    assert colour_entropy(coloured([5] * 9)) == 0.0
    assert colour_entropy(coloured(np.tile(np.arange(11), 3))) == pytest.approx(np.log2(11))
    assert colour_entropy(coloured([2, 2, 2, 7])) == pytest.approx(2 - 0.75 * np.log2(3))


def test_entropy_counts_colours_and_not_doubts():
    doubtful = reading_of({name: np.zeros(8, int) for name in SIZES._fields}, certainty=0.2)
    assert colour_entropy(doubtful) == 0.0


def test_entropy_has_the_bias_it_states():
    rng = np.random.default_rng(2)
    measured = np.mean([colour_entropy(coloured(rng.integers(11, size=64))) for _ in range(400)])
    assert np.log2(11) - measured == pytest.approx(10 / (2 * 64 * np.log(2)), rel=0.15)


def test_leakage_between_none_chance_and_all():
    everything = coloured(np.arange(11))
    assert [leakage(everything, k) for k in range(11)] == pytest.approx([chance(everything, "body_colour")] * 11)
    assert leakage(coloured([3] * 6), 3) == 1.0 and leakage(coloured([3] * 6), 4) == 0.0


def test_truth_of_photos_pools_evidence():
    truth = {"class_id": 3, "body_colour": 9, "accent_colour": 0, "pattern": 2}
    scene = {name: np.full(5, truth.get(name, 0)) for name in SIZES._fields}
    assert subject_truth(reading_of(scene)) == truth
    # Two clear photos outvote three doubtful ones.
    doubtful = reading_of(scene | {"class_id": np.full(5, 7)}, certainty=0.3).class_id
    mixed = reading_of(scene)
    mixed.class_id[2:] = doubtful[2:]
    assert subject_truth(mixed)["class_id"] == 3


def test_accents_differ_from_the_body():
    same = {name: np.full(4, 6 if name.endswith("colour") else 0) for name in SIZES._fields}
    truth = subject_truth(reading_of(same))
    assert truth["body_colour"] == 6 != truth["accent_colour"]


@pytest.mark.parametrize("values", [12, -1, [0, 1, 2], np.zeros((40, 1), int)])
def test_truths_that_do_not_fit_are_named(truth, values):
    with pytest.raises(ValueError, match="truth of class_id.*40 pictures, in 0 to 11"):
        accuracy(reading_of(truth), class_id=values)


def test_no_pictures_no_metric(truth):
    empty = Reading(*(p[:0] for p in reading_of(truth)))
    for metric in (colour_entropy, subject_truth, lambda reading: leakage(reading, 0)):
        with pytest.raises(ValueError, match="no p"):
            metric(empty)
