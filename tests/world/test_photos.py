import numpy as np
import pytest

from configs import world
from personalize_jax.pipeline.pictures import read_png
from personalize_jax.runtime.errors import UserError
from personalize_jax.world.photos import PHOTO_CONTEXTS, RESOLUTION, heldout_subject, unseen_views
from personalize_jax.world.scene import CLASSES, CONTEXTS, SPLITS, split_of
from tests import processes


def test_photos_are_the_same_whenever_they_are_rendered():
    first, again = (heldout_subject("dog", 2, num_photos=2) for _ in range(2))
    np.testing.assert_array_equal(first.photos, again.photos)
    assert first.photos.shape == (2, RESOLUTION, RESOLUTION, 3) and first.photos.dtype == np.uint8
    assert first.description == again.description and first.class_noun == "dog"


def test_subjects_are_held_out_and_others_than_one_another():
    subjects = [heldout_subject("dog", index, num_photos=2).subject for index in range(3)]
    assert all(split_of(subject).tolist() == [SPLITS.index("heldout")] for subject in subjects)
    assert len({tuple(subject.shape[0].tolist()) for subject in subjects}) == 3


def test_each_photo_shows_another_view():
    photos = heldout_subject("dog", 0, num_photos=2).photos.astype(int)
    assert abs(photos[0] - photos[1]).mean() > 5


def test_unseen_views_show_the_subject_otherwise_than_its_photos():
    held = heldout_subject("dog", 0, num_photos=2)
    views = unseen_views(held.subject, 2)
    assert views.shape == (2, RESOLUTION, RESOLUTION, 4) and views.dtype == np.uint8
    shares = views[..., 3].mean(axis=(1, 2)) / 255
    assert all(0.1 < share < 0.9 for share in shares)  # the mask of an object that fills much of the picture
    for photo in held.photos.astype(int):
        assert (abs(views[..., :3] - photo).mean(axis=(1, 2, 3)) > 5).all()


def test_photos_are_taken_where_no_report_looks():
    assert set(PHOTO_CONTEXTS) < set(CONTEXTS)
    assert set(world.get_config().report.contexts) <= set(CONTEXTS) - set(PHOTO_CONTEXTS)


def test_an_unknown_class_is_refused():
    with pytest.raises(UserError, match=f"no 'axolotl'; give one of {CLASSES[0]}"):
        heldout_subject("axolotl", 0)


def test_the_command_writes_what_the_function_renders(tmp_path):
    flags = ["--class_noun=dog", "--index=1", "--num_photos=2", f"--out={tmp_path / 'photos'}"]
    finished = processes.command(tmp_path, "personalize_jax.world.photos", *flags)
    assert finished.status == 0, finished.error
    held = heldout_subject("dog", 1, num_photos=2)
    assert f"{held.description}: 2 photos" in finished.output
    files = sorted((tmp_path / "photos").iterdir())
    for file, photo in zip(files, held.photos, strict=True):
        pixels, metadata = read_png(file)
        np.testing.assert_array_equal(pixels, photo)
        assert metadata == {"subject": held.description}
