import numpy as np
import pytest

from personalize_jax.world import dataset_builder, pictures
from personalize_jax.world.captions import in_words
from personalize_jax.world.pictures import rendered, training_pictures


def test_rendered_pictures_are_those_of_the_dataset(tmp_path, monkeypatch):
    """Over blocks, the last of them begun only: pictures, captions and truth."""

    def fake_render(scenes, resolution, progress=lambda count: None):
        shades = (255 * scenes.view.context_phase).astype(np.uint8)
        progress(len(shades))
        return np.broadcast_to(shades[:, None, None, None], (len(shades), resolution, resolution, 4))

    for module in (dataset_builder, pictures):
        monkeypatch.setattr(module, "render", fake_render)
    monkeypatch.setattr(dataset_builder, "BLOCK_SIZE", 2)
    there, here = dataset_builder.load(16, "heldout", 5, tmp_path), rendered(16, "heldout", 5)
    phrases = here.pop("phrases")
    assert here.keys() == there.keys()
    for name, column in there.items():
        np.testing.assert_array_equal(here[name], column)
        assert here[name].dtype == column.dtype, name
    assert in_words(phrases) == there["captions"].tolist()


def test_the_dataset_is_for_a_cpu_only(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_builder, "load", lambda *request: request)
    monkeypatch.setattr(pictures, "rendered", lambda *request: request)
    assert training_pictures(16, "test", 3, tmp_path) == (16, "test", 3, tmp_path)
    monkeypatch.setattr(pictures, "on_accelerator", lambda: True)
    assert training_pictures(16, "test", 3, tmp_path) == (16, "test", 3)


def test_wrong_requests_are_refused():
    with pytest.raises(ValueError, match="split 'dev'"):
        rendered(16, "dev", 1)
    with pytest.raises(ValueError, match="Asked for 0 images"):
        rendered(16, "train", 0)
