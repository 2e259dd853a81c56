from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict

from personalize_jax import showcase
from personalize_jax.metrics.world import Reading
from personalize_jax.world.dataset_builder import LABELS
from personalize_jax.world.scene import CLASSES, CONTEXTS

SUBJECT = {"class_id": 2, "body_colour": 3, "accent_colour": 5, "pattern": 1, "finish": 0}


def pictures_of(count, shape=0, **properties):
    """Pictures whose first bytes say what a probe is to read in them: values by name, then four proportions."""
    images = np.zeros((count, 4, 4, 3), np.uint8)
    values = {**SUBJECT, "context": 0, "accessory": 0, **properties}
    images.reshape(count, -1)[:, : len(LABELS) + 4] = [*(values[name] for name in LABELS), *[shape] * 4]
    return images


class PixelProbe:
    """Reads what `pictures_of` wrote."""

    @classmethod
    def load(cls):
        return cls()

    def read(self, images):
        columns = images.reshape(len(images), -1).T
        values = {
            name: np.eye(len(LABELS[name]), dtype=np.float32)[column]
            for name, column in zip(LABELS, columns, strict=False)
        }
        return Reading(**values, shape=columns[len(LABELS) : len(LABELS) + 4].T / np.float32(255))


LOOK_LIKE_ANOTHER_CLASS = pictures_of(3, class_id=7)  # what the subject is was said, not read


@pytest.fixture
def score(monkeypatch):
    """Scores of pictures in contexts and of class pictures by cascade."""
    monkeypatch.setattr(showcase, "Probe", PixelProbe)
    class_noun = SimpleNamespace(noun=CLASSES[SUBJECT["class_id"]])

    def score(in_context, of_class, photos=LOOK_LIKE_ANOTHER_CLASS):
        personalized = SimpleNamespace(subject=SimpleNamespace(images_NHWC=photos, class_noun=class_noun))
        config = ConfigDict({"report": {"contexts": tuple(in_context), "images_per_context": 2}})
        scores = showcase.world_scores(personalized, list(in_context.values()), of_class, config)
        return {name: value for name, (value, _) in scores.items()}

    return score


def test_what_shows_the_subject_where_the_prompt_says_scores_one(score):
    places = {place: pictures_of(2, context=CONTEXTS.index(place)) for place in ("on the beach", "in the snow")}
    scores = score(places, {})
    assert set(scores) == {*(f"subject: {name}" for name in SUBJECT), "prompt: context"}
    assert set(scores.values()) == {1.0}


def test_the_subjects_own_properties_and_the_places_are_counted(score):
    places = {
        "on the beach": pictures_of(2, context=CONTEXTS.index("on the beach"), body_colour=4),
        "in the snow": pictures_of(2, context=CONTEXTS.index("in the jungle")),
    }
    scores = score(places, {})
    assert scores["subject: body_colour"] == scores["prompt: context"] == 0.5
    assert scores["subject: class_id"] == 1.0


def test_proportions_are_held_against_those_of_the_photos(score):
    scores = score({"in the snow": pictures_of(2, shape=153)}, {}, photos=pictures_of(3, shape=102))
    assert scores["subject: shape"] == pytest.approx(1 - 51 / 255)


def test_places_that_the_probe_does_not_know_are_left_out(score):
    snow = pictures_of(2, context=CONTEXTS.index("in the snow"))
    assert score({"on the moon": pictures_of(2), "in the snow": snow}, {})["prompt: context"] == 1.0
    scores = score({"on the moon": pictures_of(2)}, {})
    assert "prompt: context" not in scores and scores["subject: pattern"] == 1.0


def test_a_class_that_became_the_subject_leaks_and_has_no_variety(score):
    varied = np.concatenate([pictures_of(1, body_colour=colour) for colour in range(8)])
    scores = score(
        {"in the snow": pictures_of(2)}, {"before": varied, "after": pictures_of(8), "other": varied[[0, 1]]}
    )
    assert scores["class, before: colour entropy"] == pytest.approx(3.0)
    assert scores["class, before: leakage"] == pytest.approx(1 / 8)
    assert scores["class, after: colour entropy"] == 0.0
    assert scores["class, after: leakage"] == scores["class, after: is the subject"] == 1.0
    assert scores["class, before: is the subject"] == pytest.approx(1 / 8)
    assert scores["class, other: leakage"] == 0.0
