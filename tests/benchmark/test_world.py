import re

import numpy as np
import pytest

from personalize_jax.benchmark.prompts import world_prompts
from personalize_jax.benchmark.world import rendered_benchmark, settings_benchmark
from personalize_jax.world import photos
from personalize_jax.world.photos import heldout_subject
from personalize_jax.world.reading import IDENTITY
from personalize_jax.world.scene import CLASSES, SPLITS, split_of


@pytest.fixture
def subjects(monkeypatch):
    """All subjects; photos show no more than their subject's class, proportions and context."""

    def fake_render(scenes, resolution):
        subject, view = scenes
        telling = np.stack([subject.class_id, 255 * subject.shape[:, 0], view.context], axis=1).astype(np.uint8)
        return np.tile(np.pad(telling, ((0, 0), (0, 1)))[:, None, None], (1, resolution, resolution, 1))

    monkeypatch.setattr(photos, "render", fake_render)
    return list(rendered_benchmark())


def test_thirty_subjects_of_the_classes_in_turn(subjects):
    assert rendered_benchmark().names == tuple(subject.name for subject in subjects)
    assert len({subject.name for subject in subjects}) == 30
    assert all(re.fullmatch("[a-z0-9_]+", subject.name) for subject in subjects)
    assert [subject.class_noun for subject in subjects] == [*CLASSES, *CLASSES, *CLASSES[:6]]
    assert {subject.class_noun for subject in subjects if subject.is_live} == {"dog", "cat"}
    assert all(subject.prompts == world_prompts(subject.class_noun) for subject in subjects)


def test_the_truth_is_that_of_unseen_subjects(subjects):
    for subject in subjects:
        assert CLASSES[int(subject.truth.class_id[0])] == subject.class_noun
        assert split_of(subject.truth).tolist() == [SPLITS.index("heldout")]
    assert len({subject.truth.shape.tobytes() for subject in subjects}) == 30


def test_settings_are_chosen_on_other_subjects(subjects):
    others = list(settings_benchmark())
    assert len(others) == len({subject.class_noun for subject in others}) == 5
    assert {"teapot", "boot"} <= {subject.class_noun for subject in others}
    assert not {subject.name for subject in others} & {subject.name for subject in subjects}
    known = {tuple(int(getattr(subject.truth, name)[0]) for name in IDENTITY) for subject in subjects}
    for subject in others:
        assert tuple(int(getattr(subject.truth, name)[0]) for name in IDENTITY) not in known
        assert split_of(subject.truth).tolist() == [SPLITS.index("heldout")]
        assert subject.prompts == world_prompts(subject.class_noun) and len(subject.photos) == 5


def test_photos_are_five_views_of_the_held_out_subject(subjects):
    for i in (0, 13):
        assert [photo.shape for photo in subjects[i].photos] == [(128, 128, 3)] * 5
        np.testing.assert_array_equal(subjects[i].photos, heldout_subject(CLASSES[i % 12], i // 12).photos)
        assert len({photo.tobytes() for photo in subjects[i].photos}) == 5  # each in another context
