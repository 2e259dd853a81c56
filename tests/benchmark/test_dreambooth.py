import shutil
import subprocess
import sys

import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds

from personalize_jax.benchmark import dreambooth
from personalize_jax.benchmark.dreambooth import SUBJECTS, DreamBooth, load, read_folder
from personalize_jax.runtime.errors import UserError
from tests import processes


@pytest.fixture(scope="module")
def prepared(copy, tmp_path_factory):
    """A data directory with the dataset prepared from the copy."""
    data_dir = tmp_path_factory.mktemp("data")
    load(data_dir, folder=copy)
    return data_dir


def test_a_copy_is_read_as_it_is(copy):
    subjects = read_folder(copy)
    assert subjects.names == tuple(SUBJECTS)
    for i, subject in enumerate(subjects):
        assert subject.name == subjects.names[i] and subject.class_noun == SUBJECTS[subject.name]
        assert subject.is_live == subject.name.startswith(("dog", "cat"))
        assert subject.truth is None
        shapes = [photo.shape for photo in subject.photos]
        upright = [(24, 20 + i, 3), (25, 20 + i, 3)] if subject.name == "dog" else [(20 + i, 24, 3), (20 + i, 25, 3)]
        assert shapes == upright
        assert all(photo.dtype == np.uint8 for photo in subject.photos)


def test_what_was_prepared_is_what_the_copy_holds(copy, prepared):
    for stored, read in zip(load(prepared), read_folder(copy), strict=True):
        assert stored[:3] == read[:3] and stored.prompts == read.prompts and stored.truth is None
        for a, b in zip(stored.photos, read.photos, strict=True):
            np.testing.assert_array_equal(a, b)


def test_the_builder_stands_alone(prepared):
    builder = DreamBooth(data_dir=prepared, file_format="array_record")
    assert builder.info.splits["test"].num_examples == 30
    assert "CC BY 4.0" in builder.info.redistribution_info.license
    example = builder.as_data_source(split="test")[3]
    assert example["name"] == b"berry_bowl" and not example["is_live"]
    assert builder.info.features["class_noun"].int2str(int(example["class_noun"])) == "bowl"
    assert [text.decode() for text in example["prompts"]] == list(load(prepared)[3].prompts)
    assert [photo.shape[2] for photo in example["photos"]] == [3, 3]


def test_the_archive_is_downloaded_where_no_copy_is_given(copy, tmp_path, monkeypatch):
    asked = []

    def extracted(_, url):
        asked.append(url)
        shutil.copytree(copy, tmp_path / "extracted" / "dreambooth-main" / "dataset")
        return tmp_path / "extracted"

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", extracted)
    subjects = load(tmp_path / "data")
    np.testing.assert_array_equal(subjects[5].photos[1], read_folder(copy)[5].photos[1])
    load(tmp_path / "data")
    assert asked == ["https://github.com/google/dreambooth/archive/refs/heads/main.zip"]


def test_a_failing_download_is_told(tmp_path, monkeypatch):
    def fails(*_):
        raise requests.exceptions.ConnectionError("no route")

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", fails)
    with pytest.raises(UserError, match=r"could not be prepared in .* \(no route\); .* give the folder of a copy"):
        load(tmp_path)


def test_an_incomplete_copy_is_refused_before_any_photo_is_read(copy, tmp_path, monkeypatch):
    monkeypatch.setattr(dreambooth, "read_image", lambda _: pytest.fail("read a photo"))
    partial = shutil.copytree(copy, tmp_path / "partial")
    shutil.rmtree(partial / "dog7")
    with pytest.raises(UserError, match="lacks 1 of the DreamBooth dataset's 30 folders, such as dog7;"):
        read_folder(partial)
    (partial / "dog7").mkdir()
    with pytest.raises(UserError, match="dog7 holds no images"):
        load(tmp_path / "data", folder=partial)


def test_a_damaged_photo_is_named_and_leaves_nothing(copy, tmp_path):
    damaged = shutil.copytree(copy, tmp_path / "damaged")
    file = damaged / "vase" / "01.jpg"
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(UserError, match="vase/01.jpg is damaged"):
        load(tmp_path / "data", folder=damaged)
    assert not list((tmp_path / "data").rglob("*array_record*"))


def test_the_command_prepares_what_is_then_read(copy, tmp_path):
    flags = [f"--folder={copy}", f"--data_dir={tmp_path / 'data'}"]
    finished = processes.command(tmp_path, "personalize_jax.benchmark.dreambooth", *flags)
    assert finished.status == 0, finished.error
    assert "30 subjects, 60 photos" in finished.output
    assert load(tmp_path / "data")[0].name == "backpack"


def test_the_command_refuses_in_one_sentence(tmp_path):
    finished = processes.command(tmp_path, "personalize_jax.benchmark.dreambooth", f"--folder={tmp_path}")
    assert finished.status == 2
    assert "lacks 30 of the DreamBooth dataset's 30 folders" in finished.error.splitlines()[-1]


def test_tensorflow_is_not_needed(copy, prepared):
    code = (
        "import sys; from personalize_jax.benchmark.dreambooth import load; "
        f"load({str(prepared)!r})[0]; sys.exit('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
