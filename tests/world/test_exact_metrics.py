import numpy as np
import pytest

from personalize_jax.metrics.table import entropy
from personalize_jax.world.captions import requested_properties
from personalize_jax.world.exact_metrics import class_scores, subject_scores
from tests.world.test_reading import SIZES, coloured, reading_of

TRUTH = {name: 0 for name in SIZES if name not in ("context", "accessory")} | {"body_colour": 3}


def test_what_a_prompt_changes_counts_for_the_prompt_and_not_against_the_subject():
    changed, unchanged = "a red [V] dog", "a [V] dog"
    red = requested_properties(changed)["body_colour"]
    own, other = subject_scores(coloured([3, red]), TRUTH, [unchanged, unchanged])
    assert (own["body colour"], other["body colour"]) == pytest.approx((1, 0)) and "property" not in own
    kept, followed = subject_scores(coloured([3, red]), TRUTH, [changed, changed])
    assert (kept["property"], followed["property"]) == pytest.approx((0, 1))
    assert "body colour" not in kept | followed and kept["accent colour"] == 1


def test_a_prompt_of_two_changes_is_followed_where_both_are_seen():
    prompt = "a shiny red [V] dog"
    wanted = {name: requested_properties(prompt)[name] for name in ("body_colour", "finish")}
    colours, finishes = np.meshgrid([3, wanted["body_colour"]], [1 - wanted["finish"], wanted["finish"]])
    seen = {name: np.zeros(4, int) for name in SIZES} | {"body_colour": colours.ravel(), "finish": finishes.ravel()}
    found = subject_scores(reading_of(seen), TRUTH, [prompt] * 4)
    assert [one["property"] for one in found] == [0, 0, 0, 1]


def colours(reading):
    return [scores["colours"] for scores in class_scores(reading, TRUTH)]


def leakage(reading, body_colour):
    return np.mean([scores["leakage"] for scores in class_scores(reading, TRUTH | {"body_colour": body_colour})])


def test_diversity_of_copies_of_uniform_and_of_two_colours():
    assert entropy(colours(coloured([5] * 9))) == 0.0
    assert entropy(colours(coloured(np.tile(np.arange(11), 3)))) == pytest.approx(np.log2(11))
    assert entropy(colours(coloured([2, 2, 2, 7]))) == pytest.approx(2 - 0.75 * np.log2(3))


def test_diversity_counts_colours_and_not_doubts():
    doubtful = reading_of({name: np.zeros(8, int) for name in SIZES}, certainty=0.2)
    assert entropy(colours(doubtful)) == 0.0


def test_diversity_has_the_bias_it_states():
    rng = np.random.default_rng(2)
    measured = np.mean([entropy(colours(coloured(rng.integers(11, size=64)))) for _ in range(400)])
    assert np.log2(11) - measured == pytest.approx(10 / (2 * 64 * np.log(2)), rel=0.15)


def test_leakage_between_none_chance_and_all():
    everything = coloured(np.arange(11))
    assert [leakage(everything, k) for k in range(11)] == pytest.approx([1 / 11] * 11)
    assert leakage(coloured([3] * 6), 3) == 1.0 and leakage(coloured([3] * 6), 4) == 0.0


def test_only_what_has_all_of_the_subjects_identity_is_the_subject():
    own, other = class_scores(coloured([3, 4]), TRUTH)
    assert (own["is subject"], other["is subject"]) == (1.0, 0.0)
