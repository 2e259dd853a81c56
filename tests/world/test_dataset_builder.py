import subprocess
import sys

import numpy as np
import pytest

from personalize_jax.world import dataset_builder
from personalize_jax.world.dataset_builder import World, WorldConfig, load, scenes_of
from personalize_jax.world.render import render
from personalize_jax.world.scene import CLASSES, SPLITS, split_of

COUNT = 3


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def arrays(data_dir):
    return load(16, "heldout", COUNT, data_dir)


def test_what_is_read_is_what_was_rendered(arrays):
    scenes = scenes_of(arrays)
    assert arrays["image"].shape == (COUNT, 16, 16, 4) and arrays["image"].dtype == np.uint8
    assert arrays["captions"].shape == (COUNT, 4)
    assert np.all(split_of(scenes.subject) == SPLITS.index("heldout"))
    np.testing.assert_array_equal(render(scenes, 16), arrays["image"])


def test_a_second_load_renders_nothing(arrays, data_dir, monkeypatch):
    monkeypatch.setattr(dataset_builder, "render", lambda *_: pytest.fail("rendered again"))
    again = load(16, "heldout", COUNT, data_dir)
    for name, value in arrays.items():
        np.testing.assert_array_equal(again[name], value)
    assert not list(data_dir.glob("world_blocks/*/*"))


def test_an_interrupted_preparation_goes_on(tmp_path, monkeypatch):
    rendered = []

    def fake_render(scenes, resolution):
        if len(rendered) == 2 and not resumed:
            raise KeyboardInterrupt
        rendered.append(len(scenes.subject.class_id))
        return np.full((rendered[-1], resolution, resolution, 4), len(rendered), np.uint8)

    monkeypatch.setattr(dataset_builder, "render", fake_render)
    monkeypatch.setattr(dataset_builder, "BLOCK_SIZE", 2)
    resumed = False
    with pytest.raises(KeyboardInterrupt):
        load(8, "test", 5, tmp_path)
    resumed = True
    images = load(8, "test", 5, tmp_path)["image"]
    assert rendered == [2, 2, 1]
    assert images[:, 0, 0, 0].tolist() == [1, 1, 2, 2, 3]


def test_of_an_interrupted_preparation_a_longer_one_takes_whole_blocks_only(tmp_path, monkeypatch):
    rendered = []

    def fake_render(scenes, resolution):
        rendered.append(len(scenes.subject.class_id))
        return np.full((rendered[-1], resolution, resolution, 4), len(rendered), np.uint8)

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(dataset_builder, "render", fake_render)
    monkeypatch.setattr(dataset_builder, "BLOCK_SIZE", 2)
    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
        interrupted.setattr(dataset_builder.shutil, "rmtree", fail)  # when all is rendered, and before it is written
        load(8, "test", 3, tmp_path)
    images = load(8, "test", 4, tmp_path)["image"]
    assert rendered == [2, 1, 2]
    assert images[:, 0, 0, 0].tolist() == [1, 1, 3, 3]


def test_the_builder_serves_several_splits(tmp_path, monkeypatch):
    monkeypatch.setattr(
        dataset_builder, "render", lambda scenes, r: np.zeros((len(scenes.subject.class_id), r, r, 4), np.uint8)
    )
    config = WorldConfig(name="tiny", resolution=8, counts={"train": 4, "test": 2})
    builder = World(config=config, data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    sources = builder.as_data_source()
    assert {split: len(source) for split, source in sources.items()} == {"train": 4, "test": 2}
    example = sources["train"][0]
    assert example["image"].shape == (8, 8, 4)
    assert builder.info.features["class_id"].int2str(int(example["class_id"])) in CLASSES


def test_datasets_larger_than_memory_for_shuffling_need_no_tensorflow(tmp_path, monkeypatch):
    monkeypatch.setattr(
        dataset_builder, "render", lambda scenes, r: np.ones((len(scenes.subject.class_id), r, r, 4), np.uint8)
    )
    monkeypatch.setattr(dataset_builder, "BLOCK_SIZE", 2)
    monkeypatch.setattr("tensorflow_datasets.core.shuffle.MAX_MEM_BUFFER_SIZE", 100)  # 1 GB, of which few are tested
    assert load(8, "train", 5, tmp_path)["image"].shape == (5, 8, 8, 4)


def test_wrong_requests_are_refused(tmp_path):
    with pytest.raises(ValueError, match="split 'dev'"):
        load(16, "dev", 1, tmp_path)
    with pytest.raises(ValueError, match="Asked for 0 images"):
        load(16, "train", 0, tmp_path)


def test_tensorflow_is_not_needed():
    code = "import sys, personalize_jax.world.dataset_builder; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
