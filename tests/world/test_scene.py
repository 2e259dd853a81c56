import itertools

import jax
import numpy as np
import pytest

from personalize_jax.world.scene import (
    ACCESSORIES,
    CLASSES,
    CLASSES_WITH_HEAD,
    COLOURS,
    CONTEXTS,
    PATTERNS,
    SPLITS,
    Subject,
    sample_subjects,
    sample_views,
    split_of,
)


def combinations(subject):
    return set(zip(subject.class_id, subject.body_colour, subject.accent_colour, subject.pattern, strict=True))


def every_combination():
    ids = itertools.product(range(len(CLASSES)), range(len(COLOURS)), range(len(COLOURS)), range(len(PATTERNS)))
    class_id, body, accent, pattern = np.array([row for row in ids if row[1] != row[2]], np.int32).T
    unused = np.zeros(len(class_id), np.float32)
    return Subject(class_id, unused, body, accent, unused, pattern, unused, unused)


def test_splits_share_no_combination():
    train, heldout, test = (combinations(sample_subjects(np.random.default_rng(0), 20_000, split)) for split in SPLITS)
    assert not train & heldout and not train & test and not heldout & test


def test_splits_have_their_shares_of_every_class_and_colour():
    subject = every_combination()
    split = split_of(subject)
    np.testing.assert_allclose(np.bincount(split) / len(split), [0.8, 0.1, 0.1], atol=0.02)
    for column in (subject.class_id, subject.body_colour, subject.accent_colour, subject.pattern):
        for value in np.unique(column):
            assert set(split[column == value]) == {0, 1, 2}


def test_splits_stay_what_they_were():
    """Weights trained on the training split are judged on the others: the partition must never change."""
    assert "".join(map(str, split_of(every_combination())[:40])) == "0020000000000100200001000000000010100000"
    assert np.bincount(split_of(every_combination())).tolist() == [4189, 557, 534]


def test_subjects_are_within_their_ranges():
    subject = sample_subjects(np.random.default_rng(1), 5_000)
    assert np.all(subject.body_colour != subject.accent_colour)
    assert subject.shape.min() >= 0 and subject.shape.max() <= 1 and np.abs(subject.colour_jitter).max() <= 0.08
    np.testing.assert_allclose(np.bincount(subject.pattern) / 5_000, [0.4, 0.2, 0.2, 0.2], atol=0.03)
    np.testing.assert_allclose(np.bincount(subject.class_id) / 5_000, 1 / len(CLASSES), atol=0.02)


def test_views_show_one_side_and_put_hats_on_heads_only():
    rng = np.random.default_rng(2)
    subject = sample_subjects(rng, 5_000)
    view = sample_views(rng, subject)
    assert view.yaw.min() > 0 and view.yaw.max() < np.pi / 2
    has_head = np.isin(subject.class_id, [CLASSES.index(name) for name in CLASSES_WITH_HEAD])
    assert not np.any(view.accessory[~has_head])
    assert set(view.accessory[has_head]) == set(range(len(ACCESSORIES)))
    assert set(view.context) == set(range(len(CONTEXTS)))


def test_the_generator_decides_all():
    def draw():
        rng = np.random.default_rng(3)
        subject = sample_subjects(rng, 100, "test", class_id=2)
        return subject, sample_views(rng, subject, context=5)

    for a, b in zip(jax.tree.leaves(draw()), jax.tree.leaves(draw()), strict=True):
        np.testing.assert_array_equal(a, b)
    subject, view = draw()
    assert set(subject.class_id) == {2} and set(view.context) == {5}


def test_wrong_requests_are_refused():
    rng = np.random.default_rng(4)
    with pytest.raises(ValueError, match="Unknown split 'dev'"):
        sample_subjects(rng, 1, "dev")
    with pytest.raises(ValueError, match="have one"):
        sample_views(rng, sample_subjects(rng, 1, class_id=CLASSES.index("vase")), accessory=1)
