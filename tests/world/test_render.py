import jax
import numpy as np
import pytest

from personalize_jax.world import render as renderer
from personalize_jax.world.render import PALETTE, SINKS, render
from personalize_jax.world.scene import (
    ACCESSORIES,
    CLASSES,
    CLASSES_WITH_HEAD,
    CONTEXTS,
    Scene,
    sample_subjects,
    sample_views,
)

OBJECT, PLACE = 255, 0


def test_an_image_depends_on_its_scene_alone(gallery, take):
    scenes, images = gallery
    rows = [3, 40, 41, 200]
    np.testing.assert_array_equal(render(take(scenes, rows), 32), images[rows])
    np.testing.assert_array_equal(render(take(scenes, rows[1]), 32)[0], images[rows[1]])
    np.testing.assert_array_equal(render(take(scenes, rows[::-1]), 32), images[rows[::-1]])


def test_every_class_is_seen_well_in_every_context(gallery):
    _, images = gallery
    coverage = (images[..., 3] / 255.0).mean(axis=(1, 2))
    assert coverage.min() > 0.1 and coverage.max() < 0.6
    assert images[..., :3].std(axis=(1, 2, 3)).min() > 15
    border = np.concatenate([images[:, 0, :, 3], images[:, -1, :, 3]], axis=1)
    assert (border > 128).mean() < 0.05  # hardly anything is cut off above or below


def test_contexts_look_different(gallery):
    _, images = gallery
    images = images.reshape(len(CLASSES), len(CONTEXTS), 32, 32, 4).astype(np.float32)
    seen = images[..., 3:] < 10
    mean = (images[..., :3] * seen).sum(axis=0) / np.maximum(seen.sum(axis=0), 1)
    rows = mean.reshape(len(CONTEXTS), 4, 8, 32, 3).mean(axis=2)
    distance = np.abs(rows[:, None] - rows[None]).mean(axis=(2, 3, 4))
    assert distance[~np.eye(len(CONTEXTS), dtype=bool)].min() > 10


def test_the_mask_is_what_changes_with_the_colours(gallery, take):
    scenes, images = gallery
    rows = np.arange(0, len(images), 7)
    scenes, images = take(scenes, rows), images[rows]
    subject = scenes.subject._replace(
        body_colour=scenes.subject.accent_colour, accent_colour=scenes.subject.body_colour
    )
    changed = np.any(render(scenes._replace(subject=subject), 32)[..., :3] != images[..., :3], axis=-1)
    assert not np.any(changed & (images[..., 3] == PLACE))
    assert changed[images[..., 3] == OBJECT].mean() > 0.75  # the rest: eyes, tyres, windows, flames


def test_the_mask_hides_the_context(gallery, take):
    scenes, images = gallery
    dry = np.flatnonzero(SINKS[scenes.view.context] == 0)[::11]
    other = np.where(scenes.view.context[dry] == 1, 2, 1).astype(np.int32)
    moved = take(scenes, dry)
    moved = render(moved._replace(view=moved.view._replace(context=other)), 32)
    np.testing.assert_array_equal(moved[..., 3], images[dry][..., 3])
    solid = images[dry][..., 3] == OBJECT
    np.testing.assert_array_equal(moved[solid], images[dry][solid])
    empty = images[dry][..., 3] == PLACE
    assert np.any(moved[empty] != images[dry][empty], axis=-1).mean() > 0.9


def test_colours_keep_their_names(gallery):
    """In object pixels the palette's nearest colour is the body's, or else the accent's, for plain matte subjects."""
    scenes, images = gallery
    right = []
    for image, body, accent in zip(images, scenes.subject.body_colour, scenes.subject.accent_colour, strict=True):
        pixels = image[image[..., 3] > 250][:, :3] / 255.0
        nearest = np.argmin(np.square(pixels[:, None] - PALETTE).sum(axis=-1), axis=1)
        votes = np.bincount(nearest, minlength=len(PALETTE))
        votes[accent] = 0
        right.append(votes.argmax() == body)
    assert np.mean(right) > 0.9


def test_hats_sit_on_top_and_shine_shines(gallery, take):
    scenes, images = gallery
    dogs = take(scenes, np.arange(8))
    for accessory in range(1, len(ACCESSORIES)):
        view = dogs.view._replace(accessory=np.full(8, accessory, np.int32))
        gained = render(dogs._replace(view=view), 32)[..., 3].astype(int) - images[:8, ..., 3]
        assert np.all(gained[:, :16].sum(axis=(1, 2)) > 255 * 3)
        assert np.abs(gained[:, 20:]).max() == 0
    shiny = dogs.subject._replace(finish=np.ones(8, np.int32))
    brighter = render(Scene(shiny, dogs.view), 32)[..., :3].max(axis=(1, 2, 3)) >= images[:8, ..., :3].max(
        axis=(1, 2, 3)
    )
    assert brighter.all()


def test_resolutions_agree(gallery, take):
    scenes, images = gallery
    rows = np.arange(CLASSES.index("can") * len(CONTEXTS), len(images), 3)
    fine = render(take(scenes, rows), 64).reshape(len(rows), 32, 2, 32, 2, 4).mean(axis=(2, 4))
    assert np.abs(fine - images[rows]).mean() < 8


def test_resolution_must_be_positive(gallery, take):
    with pytest.raises(ValueError, match="Resolution 0"):
        render(take(gallery[0], 0), 0)


@pytest.fixture
def at_once(monkeypatch):
    """Renders as an accelerator does, here four pictures of 32 pixels in one call."""
    monkeypatch.setattr(renderer, "on_accelerator", lambda: True)
    monkeypatch.setattr(renderer, "PIXELS", 4 * 32**2)


def assert_same_pictures(images, others):
    """But for the last bit of a few values in a million, where the compiler rounds a sum once or twice."""
    difference = np.abs(images.astype(int) - others)
    assert difference.max() <= 1 and np.count_nonzero(difference) < 2e-5 * difference.size


def test_pictures_rendered_at_once_are_those_rendered_one_by_one(gallery, take, at_once):
    """One class in all contexts, one of them with more pictures than fit into a call."""
    scenes, images = gallery
    rows = np.array([*range(len(CONTEXTS)), *[3] * 5])
    counts = []
    assert_same_pictures(render(take(scenes, rows), 32, counts.append), images[rows])
    assert sum(counts) == len(rows) and max(counts) == 4


@pytest.mark.slow
def test_every_class_hat_and_context_is_rendered_at_once_as_it_is_one_by_one(request):
    """Of all patterns and finishes, as subjects and views are sampled."""
    rng = np.random.default_rng(8)
    kinds = [(c, h) for c, name in enumerate(CLASSES) for h in range(4 if name in CLASSES_WITH_HEAD else 1)]
    class_id, accessory = np.repeat(np.array(kinds), len(CONTEXTS), axis=0).T
    subjects = sample_subjects(rng, len(class_id), class_id=class_id)
    context = np.tile(np.arange(len(CONTEXTS)), len(kinds))
    scenes = Scene(subjects, sample_views(rng, subjects, context=context, accessory=accessory))
    one_by_one = render(scenes, 32)
    request.getfixturevalue("at_once")
    assert_same_pictures(render(scenes, 32), one_by_one)


def test_no_device_rounds_matrix_products(gallery, take):
    """There are none, so that accelerators need no other precision of them."""
    batch, places = take(gallery[0], [0, 1]), renderer._place_program(8, at_once=True)
    for class_noun in CLASSES:
        objects = renderer._object_program(class_noun, class_noun in CLASSES_WITH_HEAD, 8, at_once=True)
        assert "dot_general" not in str(objects.trace(batch, 2).jaxpr)
    assert "dot_general" not in str(places.trace(batch, jax.eval_shape(objects, batch, 2), 2).jaxpr)
