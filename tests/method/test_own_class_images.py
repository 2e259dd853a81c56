"""Class images that a person brings, in place of drawn ones."""

import shutil

import numpy as np
import pytest

import personalize_jax as pj
from personalize_jax.method import personalization
from personalize_jax.method.class_images import make_class_images
from personalize_jax.runtime import manifest
from personalize_jax.runtime.errors import UserError
from tests import tiny_world


def test_own_class_images_take_the_place_of_drawn_ones(pretrained, photos, tmp_path):
    own = shutil.copytree(photos, tmp_path / "dogs")
    config, workdir = tiny_world.get_config(pretrained, class_images__folder=str(own)), tmp_path / "run"
    pipeline, given = pj.load_pipeline(pretrained), pj.load_subject(photos, "dog", 16)
    images = make_class_images(pipeline, "a dog", ["base", "super_resolution"], config, workdir)
    expected = np.stack([image.pixels for image in given.images])
    assert not workdir.exists() and set(images) == {"base", "super_resolution"}
    for pictures in images.values():
        np.testing.assert_array_equal(pictures, expected)
    assert "class images" not in personalization.seeds(config)

    data = personalization.made_from(pipeline, given, config)
    assert data["class images"] == data["photos"] == [image.sha256 for image in given.images]
    with manifest.record(workdir, {}, data):
        personalization.claim_run_directory(pipeline, given, config, workdir)
    (own / "0.png").unlink()
    with pytest.raises(UserError, match="was begun with other pictures in class_images.folder; give the same"):
        personalization.claim_run_directory(pipeline, given, config, workdir)
    shutil.rmtree(own)
    with pytest.raises(UserError, match="dogs', where no pictures are"):
        personalization.claim_run_directory(pipeline, given, config, workdir)
