"""What is written is read back; what was altered is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from personalize_jax.runtime.errors import UserError
from personalize_jax.subject.class_noun import ClassNoun
from personalize_jax.subject.dataset import read_dataset, write_dataset
from personalize_jax.subject.identifier import Identifier
from personalize_jax.subject.images import SubjectImage

DOG = ClassNoun("dog", 0.93, "classifier")
XYZ = Identifier("xyz", (17, 4), (0, 2))


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return [
        SubjectImage(Path(f"/home/me/photos/rex {n}.jpg"), f"{n}" * 64, rng.integers(0, 256, (16, 16, 3), np.uint8))
        for n in range(3)
    ]


@pytest.fixture
def directory(tmp_path, images):
    write_dataset(tmp_path / "run" / "subject", images, DOG, XYZ)
    return tmp_path / "run" / "subject"


def edit(directory, change):
    manifest = json.loads((directory / "subject.json").read_text())
    change(manifest)
    (directory / "subject.json").write_text(json.dumps(manifest))


def test_round_trip(tmp_path, images):
    written = write_dataset(tmp_path / "subject", images, DOG, XYZ)
    read = read_dataset(tmp_path / "subject")
    for dataset in (written, read):
        np.testing.assert_array_equal(dataset.images_NHWC, [image.pixels for image in images])
        assert dataset.images_NHWC.dtype == np.uint8
        assert dataset.labels == ("a xyz dog",) * 3
        assert dataset.class_prompt == "a dog"
        assert (dataset.class_noun, dataset.identifier) == (DOG, XYZ)


def test_labels_may_leave_out_the_class_noun(tmp_path, images):
    write_dataset(tmp_path / "subject", images, DOG, XYZ, name_class=False)
    read = read_dataset(tmp_path / "subject")
    assert read.labels == ("a xyz",) * 3
    assert read.class_prompt == "a dog"
    assert read.phrase == "[V]"
    assert write_dataset(tmp_path / "other", images, DOG, XYZ).phrase == "[V] dog"


def test_files_can_be_inspected(directory, images):
    assert sorted(path.name for path in directory.iterdir()) == ["00.png", "01.png", "02.png", "subject.json"]
    np.testing.assert_array_equal(np.array(Image.open(directory / "01.png")), images[1].pixels)
    manifest = json.loads((directory / "subject.json").read_text())
    assert manifest["identifier"] == "xyz" and manifest["token_ids"] == [17, 4] and manifest["class_score"] == 0.93
    assert manifest["images"][2]["source"] == "rex 2.jpg" and manifest["images"][2]["source_sha256"] == "2" * 64
    assert "/home" not in (directory / "subject.json").read_text()


def test_a_dataset_is_never_overwritten(directory, images):
    before = (directory / "subject.json").read_bytes()
    with pytest.raises(UserError, match="already exists"):
        write_dataset(directory, images[:1], DOG, XYZ)
    assert (directory / "subject.json").read_bytes() == before


def test_a_killed_attempt_is_in_nobodys_way(tmp_path, images):
    (tmp_path / ".subject.tmp").mkdir()
    (tmp_path / ".subject.tmp" / "07.png").touch()
    write_dataset(tmp_path / "subject", images, DOG, XYZ)
    assert len(read_dataset(tmp_path / "subject").images_NHWC) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["subject"]


def test_failed_write_leaves_nothing(tmp_path, images, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match="No space left on device.*free space"):
        write_dataset(tmp_path / "subject", images, DOG, XYZ)
    assert list(tmp_path.iterdir()) == []


def test_images_must_be_of_one_resolution(tmp_path, images):
    other = images[0]._replace(pixels=np.zeros((8, 8, 3), np.uint8))
    for unequal in ([], [*images, other]):
        with pytest.raises(ValueError, match="one resolution"):
            write_dataset(tmp_path / "subject", unequal, DOG, XYZ)


def test_missing_dataset(tmp_path):
    with pytest.raises(UserError, match="subject.json cannot be read .*; name a directory"):
        read_dataset(tmp_path)


def test_altered_image(directory):
    Image.new("RGB", (16, 16)).save(directory / "01.png")
    with pytest.raises(UserError, match="01.png is not the image"):
        read_dataset(directory)
    (directory / "01.png").unlink()
    with pytest.raises(UserError, match="01.png cannot be read"):
        read_dataset(directory)


@pytest.mark.parametrize("name", ["../00.png", "/etc/passwd", "sub/00.png", "", "..", "subject.json", 3, None])
def test_names_do_not_lead_out_of_the_directory(directory, name):
    edit(directory, lambda manifest: manifest["images"][0].update(file=name))
    with pytest.raises(UserError, match="a plain name such as '00.png'"):
        read_dataset(directory)


def test_damaged_manifest(directory):
    text = (directory / "subject.json").read_text()
    (directory / "subject.json").write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match="not valid JSON"):
        read_dataset(directory)
    for content in ("[]", "{}", "null", text.replace('"label"', '"tag"'), text.replace("17", '"x"', 1)):
        (directory / "subject.json").write_text(content)
        with pytest.raises(UserError, match="does not describe a subject"):
            read_dataset(directory)
    edited = json.loads(text) | {"images": []}
    (directory / "subject.json").write_text(json.dumps(edited))
    with pytest.raises(UserError, match="lists no images"):
        read_dataset(directory)


def test_labels_may_be_edited_but_keep_the_identifier(directory):
    edit(directory, lambda manifest: manifest["images"][1].update(label="a xyz dog on a sofa"))
    assert read_dataset(directory).labels == ("a xyz dog", "a xyz dog on a sofa", "a xyz dog")
    for label in ("a dog on a sofa", "a xyzzy dog"):
        edit(directory, lambda manifest, label=label: manifest["images"][1].update(label=label))
        with pytest.raises(UserError, match=f"'{label}' .* lacks the identifier 'xyz'"):
            read_dataset(directory)


@pytest.mark.parametrize(
    ("label", "phrase"),
    [("a xyz car", "[V] car"), ("a red xyz car, parked", "[V] car"), ("a xyz", "[V]"), ("a xyz carb", "[V]")],
)
def test_prompts_call_the_subject_as_its_labels_do(directory, label, phrase):
    dataset = read_dataset(directory)._replace(labels=(label,), class_noun=ClassNoun("car", 1.0, "given"))
    assert dataset.phrase == phrase
    assert dataset._replace(class_noun=ClassNoun("umbrella", 1.0, "given")).class_prompt == "an umbrella"
