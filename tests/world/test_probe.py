import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personalize_jax.errors import UserError
from personalize_jax.metrics.world import Reading, accuracy
from personalize_jax.models.probe import ProbeNetwork
from personalize_jax.pipeline.storage import ASSETS
from personalize_jax.subject.class_noun import determine
from personalize_jax.subject.images import SubjectImage
from personalize_jax.world import probe as probe_module
from personalize_jax.world.probe import Probe, degrade, evaluate, reduced, save, train
from personalize_jax.world.render import render
from personalize_jax.world.scene import CLASSES, COLOURS, Scene, sample_subjects, sample_views

COUNT = 360


@pytest.fixture(scope="module")
def probe():
    return Probe.load()


@pytest.fixture(scope="module")
def fresh():
    """Held-out subjects that no dataset holds, without hats: "image" uint8 [360, 32, 32, 4] and the truth."""
    rng = np.random.default_rng(11)
    subjects = sample_subjects(rng, COUNT, "heldout", class_id=np.arange(COUNT) % len(CLASSES))
    scenes = Scene(subjects, sample_views(rng, subjects, accessory=0))
    return {"image": render(scenes, 32)} | subjects._asdict() | scenes.view._asdict()


@pytest.mark.parametrize("split", ["heldout", "test"])
@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("class_id", 0.99),
        ("context", 0.99),
        ("body_colour", 0.95),
        ("accent_colour", 0.85),
        pytest.param("pattern", 0.85, marks=pytest.mark.xfail(reason="spots are taken for plain: .77", strict=True)),
    ],
)
def test_shipped_accuracies_meet_the_targets(probe, split, name, target):
    assert probe.accuracies[split]["clean"][name] >= target


@pytest.mark.parametrize("kind", ["clean", "mild"])
def test_fresh_pictures_meet_the_shipped_accuracies(probe, fresh, kind):
    measured, shipped = evaluate(probe, fresh)[kind], probe.accuracies["heldout"][kind]
    for name, p in shipped.items():
        chance_error = np.sqrt(p * (1 - p) / COUNT)
        assert measured[name] > p - 3 * chance_error - 0.02, name  # .02: rendered at 32x32, not averaged to it


def test_probabilities_are_calibrated(probe, fresh):
    reading = probe.read(fresh["image"][..., :3])
    for name, p in reading._asdict().items():
        assert p.dtype == np.float32
        np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-5)
        confidence = p.max(axis=1).mean()
        assert abs(confidence - np.mean(p.argmax(axis=1) == fresh[name])) < 0.06, name


@pytest.mark.parametrize(
    "name",
    [
        "class_id",
        pytest.param("body_colour", marks=pytest.mark.xfail(reason="noise is given a colour: .52", strict=True)),
        pytest.param("context", marks=pytest.mark.xfail(reason="noise is given a context: .71", strict=True)),
    ],
)
def test_noise_is_not_recognised(probe, name):
    noise = np.random.default_rng(0).integers(256, size=(64, 32, 32, 3), dtype=np.uint8)
    assert getattr(probe.read(noise), name).max(axis=1).mean() < 0.4


def test_noise_is_given_no_class_noun(probe):
    noise = np.random.default_rng(1).integers(256, size=(5, 32, 32, 3), dtype=np.uint8)
    photos = [SubjectImage(Path("noise.png"), "", pixels) for pixels in noise]
    with pytest.raises(UserError, match="not sure"):
        determine(photos, None, probe.classifier, CLASSES)


def test_pictures_are_read_alike_in_any_batch_and_at_any_resolution(probe, fresh):
    images = fresh["image"][:70, ..., :3]
    reading, one = probe.read(images), probe.read(images[66:67])
    enlarged = probe.read(images.repeat(4, axis=1).repeat(4, axis=2))
    for name in Reading._fields:
        np.testing.assert_allclose(getattr(reading, name)[66:67], getattr(one, name), atol=1e-5)
        np.testing.assert_allclose(getattr(reading, name), getattr(enlarged, name), atol=1e-4)


def test_objects_are_read_without_their_place(probe, fresh):
    """Class and colours are read off the object: they are still known before a gray wall."""
    mask = fresh["image"][..., 3:].astype(np.float32) / 255
    picture = fresh["image"][..., :3]
    gray = (mask * picture + (1 - mask) * 128).astype(np.uint8)
    measured = accuracy(probe.read(gray), class_id=fresh["class_id"], body_colour=fresh["body_colour"])
    assert measured["class_id"] > 0.6 and measured["body_colour"] > 0.6


def test_the_classifier_names_classes(probe, fresh):
    nouns, probabilities = probe.classifier(fresh["image"][:24, ..., :3])
    assert tuple(nouns) == CLASSES and probabilities.shape == (24, len(CLASSES))


def test_degradation_blurs_keeps_the_mean_and_adds_the_noise_asked_for():
    x = jax.random.uniform(jax.random.key(0), (3, 32, 32, 3), minval=-0.2, maxval=0.2)
    none, blur, noise = degrade(x, jax.random.key(1), jnp.array([0, 0, 0.1]), jnp.array([0.0, 1, 0]))
    np.testing.assert_array_equal(none, x[0])
    assert blur.std() < 0.5 * x[1].std()
    np.testing.assert_allclose(blur.mean(), x[1].mean(), atol=0.01)
    assert (noise - x[2]).std() == pytest.approx(0.1, rel=0.05)


def test_training_learns_colours_and_is_written_and_read_back(tmp_path, monkeypatch):
    """Pictures of one flat colour, which is all their truth."""
    monkeypatch.setattr(probe_module, "BATCH_SIZE", 8)
    small = functools.partial(ProbeNetwork, channels=(16, 16, 16), blocks=(0, 1, 0))
    monkeypatch.setattr(probe_module, "ProbeNetwork", small)
    colours = np.array(list(COLOURS.values()))[:2]
    body = np.arange(16) % 2
    image = np.broadcast_to((255 * colours[body])[:, None, None], (16, 32, 32, 3)).astype(np.uint8)
    data = {name: np.zeros(16, np.int32) for name in Reading._fields} | {"body_colour": body, "image": image}
    written = save(train(data, num_steps=24), {"heldout": data}, tmp_path)
    assert written.accuracies["heldout"]["clean"]["body_colour"] == 1.0
    read = Probe.load(tmp_path)
    assert read.accuracies == written.accuracies
    np.testing.assert_array_equal(read.read(image).body_colour, written.read(image).body_colour)


def test_weights_are_small():
    assert (ASSETS / "world" / "probe.safetensors").stat().st_size < 5e6


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 32, 32, 3), np.float32),
        np.zeros((2, 48, 48, 3), np.uint8),
        np.zeros((2, 32, 64, 3), np.uint8),
        np.zeros((32, 32, 3), np.uint8),
        np.zeros((0, 32, 32, 3), np.uint8),
    ],
)
def test_other_pictures_are_refused(images):
    with pytest.raises(ValueError, match="R a multiple of 32"):
        reduced(images)


def test_a_missing_probe_is_named(tmp_path):
    with pytest.raises(UserError, match=r"probe\.json is missing"):
        Probe.load(tmp_path)
