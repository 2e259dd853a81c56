import numpy as np
import pytest

from personalize_jax.world import encoder_quality, probe
from personalize_jax.world.captions import prompt
from personalize_jax.world.scene import CLASSES, COLOURS, CONTEXTS

SUBJECTS, PHOTOS, VIEWS = 24, 2, 3


def one_hot(index, size):
    return np.eye(size, dtype=np.float32)[index]


def numbered(count, number):
    """Pictures whose red pixels tell a number."""
    images = np.zeros((count, 32, 32, 3), np.uint8)
    images[:, 0, 0, 0] = number
    return images


class Oracle:
    """A CLIP that knows what is in pictures whose first pixel has class, context and body colour in its channels."""

    def images(self, images):
        ids_N3 = np.stack([image[0, 0] for image in images])
        parts = [one_hot(ids_N3[:, i] % size, size) for i, size in enumerate((12, 18, 11))]  # noise is something too
        return np.concatenate(parts, axis=1) / np.sqrt(3)

    def texts(self, texts):
        rows = [[float(name in text) for name in (*CLASSES, *CONTEXTS, *COLOURS)] for text in texts]
        rows = np.array(rows, np.float32) + 1e-6
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    truth = {name: rng.integers(n, size=256) for name, n in (("class_id", 12), ("context", 18), ("body_colour", 11))}
    images = np.zeros((256, 32, 32, 3), np.uint8)
    images[:, 0, 0] = np.stack(list(truth.values()), axis=1)
    names = [
        prompt(CLASSES[k], CONTEXTS[c], tuple(COLOURS)[b])
        for k, c, b in zip(*(truth[name] for name in truth), strict=True)
    ]
    return {"image": images, "captions": np.array(names)[:, None]} | truth


def test_a_clip_that_knows_everything_is_always_right(data):
    quality = encoder_quality.clip_quality(Oracle(), data)["clean"]
    # "a blue house" has a colour too, and "can" and "car" are in other words: the oracle reads letters.
    assert quality["context"] > 0.9 and quality["body_colour"] > 0.9 and quality["class"] > 0.9
    assert quality["retrieval"] > 0.9
    assert quality["clip_t"] > quality["clip_t_wrong"] + 0.2


def test_a_clip_that_knows_nothing_is_right_by_chance(data):
    class Blind(Oracle):
        def images(self, images):
            return super().images(np.roll(images, 1, axis=0)[np.random.default_rng(1).permutation(len(images))])

    quality = encoder_quality.clip_quality(Blind(), data)["clean"]
    assert quality["class"] < 0.2 and quality["context"] < 0.2 and quality["body_colour"] < 0.25
    assert quality["retrieval"] < 0.05
    assert abs(quality["clip_t"] - quality["clip_t_wrong"]) < 0.1


@pytest.fixture(scope="module")
def shown():
    numbers = np.arange(SUBJECTS)
    photos = np.stack([numbered(PHOTOS, i) for i in numbers])
    return photos, np.stack([numbered(VIEWS, i) for i in numbers])


def test_an_encoder_that_knows_every_subject_identifies_all(shown):
    quality = encoder_quality.instance_quality(
        lambda images: one_hot([image[0, 0, 0] for image in images], 256), *shown
    )["clean"]
    assert quality == {"same_subject": 1, "same_class": 0, "other_class": 0, "auc": 1, "identification": 1}


def test_an_encoder_that_knows_classes_only_tells_no_subjects_apart(shown):
    quality = encoder_quality.instance_quality(
        lambda images: one_hot([image[0, 0, 0] % len(CLASSES) for image in images], len(CLASSES)), *shown
    )["clean"]
    assert (quality["same_subject"], quality["same_class"], quality["other_class"]) == (1, 1, 0)
    assert quality["auc"] == 0.5 and quality["identification"] == 0.5  # two subjects a class, the first is taken


def test_changes_change_what_they_are_named_after_and_nothing_else(monkeypatch):
    """With pictures that are a subject's properties, an encoder that reads one of them tells its change only."""
    monkeypatch.setattr(encoder_quality, "render", properties)
    for i, name in enumerate(("body_colour", "accent_colour", "pattern")):
        quality = encoder_quality.similarities_after_changes(
            lambda images, i=i: one_hot([image[0, i, 0] for image in images], 256)
        )
        assert quality == dict.fromkeys(("nothing", "shape", "accent_colour", "body_colour", "pattern"), 1) | {name: 0}


def properties(scenes, resolution):
    subject = scenes.subject
    assert np.all(subject.body_colour != subject.accent_colour)
    images = np.zeros((len(subject.pattern), resolution, resolution, 4), np.uint8)
    images[:, 0, :3, 0] = np.stack([subject.body_colour, subject.accent_colour, subject.pattern], axis=1)
    return images


def test_mild_pictures_are_small_soft_and_much_the_same():
    images = np.random.default_rng(0).integers(256, size=(4, 64, 64, 3), dtype=np.uint8)
    images[:, :32] //= 4
    mild = probe.mild(images, seed=0)
    assert mild.shape == (4, 32, 32, 3) and mild.dtype == np.uint8
    small = images.reshape(4, 32, 2, 32, 2, 3).mean((2, 4))
    assert np.abs(mild.mean((1, 2)) - small.mean((1, 2))).max() < 3
    assert np.abs(mild - small).mean() < 40
