import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personalize_jax.models.probe import ProbeNetwork
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import ASSETS
from personalize_jax.subject.class_noun import determine
from personalize_jax.subject.images import SubjectImage
from personalize_jax.training.loop import train
from personalize_jax.world import probe as probe_module
from personalize_jax.world.probe import GUESS_ERROR, READABLE, Probe, degrade, evaluate, probe_program, reduced, save
from personalize_jax.world.reading import Reading, accuracy
from personalize_jax.world.render import render
from personalize_jax.world.scene import CLASSES, COLOURS, LABELS, Scene, sample_subjects, sample_views

COUNT = 360
STEPS = 60  # of the small trainings


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
        ("accent_colour", 0.98),
        ("pattern", 0.85),
        pytest.param(
            "finish", 0.95, marks=pytest.mark.xfail(reason="half of the shiny ones are missed: .92", strict=True)
        ),
        ("shape", 0.85),
        ("is_subject", 0.8),
    ],
)
def test_shipped_accuracies_meet_the_targets(probe, split, name, target):
    assert probe.accuracies[split]["clean"][name] >= target


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clean", "mild"])
def test_fresh_pictures_meet_the_shipped_accuracies(probe, fresh, kind):
    measured, shipped = evaluate(probe, fresh)[kind], probe.accuracies["heldout"][kind]
    for name, p in shipped.items():
        chance_error = np.sqrt(p * (1 - p) / COUNT)
        assert measured[name] > p - 3 * chance_error - 0.02, name  # .02: rendered at 32x32, not averaged to it


@pytest.mark.slow
def test_probabilities_are_calibrated(probe, fresh):
    reading = probe.read(fresh["image"][..., :3])
    for name in LABELS:
        p = getattr(reading, name)
        assert p.dtype == np.float32
        np.testing.assert_allclose(p.sum(axis=1), 1, atol=1e-5)
        confidence = p.max(axis=1).mean()
        assert abs(confidence - np.mean(p.argmax(axis=1) == fresh[name])) < 0.06, name


@pytest.mark.slow
def test_proportions_are_read_where_they_are_said_to_be(probe, fresh):
    """Each that is said to be readable follows the truth; every class has some, and what nothing shows is left out."""
    readable = dict(zip(CLASSES, probe.readable, strict=True))
    assert all(mask.any() for mask in readable.values())
    assert not readable["bear plushie"][3]  # its class has three
    reading = probe.read(fresh["image"][..., :3])
    read_class = reading.class_id.argmax(axis=1)
    np.testing.assert_array_equal(np.isnan(reading.shape), ~probe.readable[read_class])
    right = (read_class == fresh["class_id"])[:, None] & ~np.isnan(reading.shape)
    read, true = reading.shape[right], fresh["shape"][right]
    assert np.all((read >= 0) & (read <= 1))
    assert np.abs(read - true).mean() < READABLE * GUESS_ERROR < np.abs(true - 0.5).mean()


@pytest.mark.slow
def test_shiny_and_matte_are_told_apart(probe, fresh):
    """One in eight is shiny, and a probe that never says so would be right in .88: of two, it says which is."""
    shiny = probe.read(fresh["image"][..., :3]).finish[:, 1]
    of_shiny, of_matte = (shiny[fresh["finish"] == k] for k in (1, 0))
    assert np.mean(of_shiny[:, None] > of_matte) > 0.8
    assert np.mean(of_shiny > 0.5) > 5 * np.mean(of_matte > 0.5)


NOTHING = {
    "noise": np.random.default_rng(0).integers(256, size=(64, 32, 32, 3), dtype=np.uint8),
    "blotches": np.random.default_rng(1).integers(256, size=(64, 4, 4, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2),
    "flat": np.random.default_rng(2).integers(256, size=(64, 1, 1, 3), dtype=np.uint8).repeat(32, 1).repeat(32, 2),
}


@pytest.mark.parametrize("kind", NOTHING)
@pytest.mark.parametrize("name", ["class_id", "body_colour", "context"])
def test_nothing_is_not_recognised(probe, name, kind):
    assert getattr(probe.read(NOTHING[kind]), name).max(axis=1).mean() < 0.4


def test_noise_is_given_no_class_noun(probe):
    noise = np.random.default_rng(1).integers(256, size=(5, 32, 32, 3), dtype=np.uint8)
    photos = [SubjectImage(Path("noise.png"), "", pixels) for pixels in noise]
    with pytest.raises(UserError, match="not sure"):
        determine(photos, None, probe.classifier, CLASSES)


@pytest.mark.slow
def test_pictures_are_read_alike_in_any_batch_and_at_any_resolution(probe, fresh):
    images = fresh["image"][:70, ..., :3]
    reading, one = probe.read(images), probe.read(images[66:67])
    enlarged = probe.read(images.repeat(4, axis=1).repeat(4, axis=2))
    for name in Reading._fields:
        np.testing.assert_allclose(getattr(reading, name)[66:67], getattr(one, name), atol=1e-5)
        np.testing.assert_allclose(getattr(reading, name), getattr(enlarged, name), atol=1e-4)


@pytest.mark.slow
def test_objects_are_read_without_their_place(probe, fresh):
    """Class and colours are read off the object: they are still known before a gray wall."""
    mask = fresh["image"][..., 3:].astype(np.float32) / 255
    picture = fresh["image"][..., :3]
    gray = (mask * picture + (1 - mask) * 128).astype(np.uint8)
    measured = accuracy(probe.read(gray), class_id=fresh["class_id"], body_colour=fresh["body_colour"])
    assert measured["class_id"] > 0.6 and measured["body_colour"] > 0.6


@pytest.mark.slow
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


@pytest.fixture
def small(monkeypatch):
    """Pictures of one flat colour, which is all their truth but for a shape; the probe is small, its batches too."""
    monkeypatch.setattr(probe_module, "BATCH_SIZE", 8)
    network = functools.partial(ProbeNetwork, channels=(16, 16, 16), blocks=(0, 1, 0))
    monkeypatch.setattr(probe_module, "ProbeNetwork", network)
    body = np.arange(16) % 2
    colours = np.array(list(COLOURS.values()))[:2]
    image = np.broadcast_to((255 * colours[body])[:, None, None], (16, 32, 32, 3)).astype(np.uint8)
    zeros = {name: np.zeros(16, np.int32) for name in LABELS}
    return zeros | {"body_colour": body, "shape": np.full((16, 4), 0.5, np.float32), "image": image}


@pytest.mark.slow
def test_training_learns_colours_and_is_written_and_read_back(tmp_path, small):
    trained = train(probe_program(small, STEPS), tmp_path / "training").params
    written = save(trained, {"heldout": small}, tmp_path)
    assert written.accuracies["heldout"]["clean"]["body_colour"] == 1.0
    assert written.readable[0].all() and not written.readable[1:].any()  # the data hold one class only
    read = Probe.load(tmp_path)
    assert (read.accuracies, read.shape_errors) == (written.accuracies, written.shape_errors)
    jax.tree.map(np.testing.assert_array_equal, read.read(small["image"]), written.read(small["image"]))


@pytest.mark.slow
def test_training_goes_on_where_it_was_stopped(tmp_path, small, monkeypatch):
    monkeypatch.setattr(probe_module, "CHECKPOINT_EVERY", STEPS // 2)
    program = probe_program(small, STEPS)
    whole = train(program, tmp_path / "whole").params

    class Died(Exception):
        pass

    def die(step, metrics):
        if step == STEPS // 2 + 1:
            raise Died

    with pytest.raises(Died):
        train(program, tmp_path / "resumed", die)
    jax.tree.map(np.testing.assert_array_equal, train(program, tmp_path / "resumed").params, whole)


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
