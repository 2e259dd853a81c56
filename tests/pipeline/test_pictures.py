"""Pictures keep what they were drawn from, damage is noticed, and names are safe."""

import re

import numpy as np
import pytest
from PIL import Image

from personalize_jax.pipeline.pictures import file_name, read_png, save_png
from personalize_jax.runtime.errors import UserError


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (32, 24, 3), dtype=np.uint8)


def test_png_keeps_pixels_and_metadata_of_any_script(tmp_path, picture):
    metadata = {"prompt": "a чай dog\nin 雪", "seed": "7", "identifier": "é", "empty": ""}
    file = tmp_path / "new" / "folder" / "a.png"
    save_png(picture, file, metadata)
    pixels, read = read_png(file)
    np.testing.assert_array_equal(pixels, picture)
    assert pixels.dtype == np.uint8
    assert read == metadata
    assert [f.name for f in file.parent.iterdir()] == ["a.png"]


def test_png_bytes_are_reproducible(tmp_path, picture):
    for name in "ab":
        save_png(picture, tmp_path / name, {"prompt": "a dog", "seed": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_failed_write_leaves_the_old_picture_and_nothing_else(tmp_path, picture, monkeypatch):
    file = tmp_path / "a.png"
    save_png(picture, file, {"seed": "1"})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        save_png(255 - picture, file, {"seed": "2"})
    assert read_png(file)[1] == {"seed": "1"}
    assert [f.name for f in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("shape", [(4, 4), (4, 4, 4), (1, 4, 4, 3)])
def test_only_rgb_pixels_are_saved(tmp_path, shape):
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\] was expected"):
        save_png(np.zeros(shape, np.uint8), tmp_path / "a.png", {})
    assert not any(tmp_path.iterdir())


def test_every_damaged_byte_and_every_cut_is_refused(tmp_path, picture):
    file = tmp_path / "a.png"
    save_png(picture[:6, :5], file, {"prompt": "a dog"})
    data = file.read_bytes()
    sound = len(data) - 12  # but for the closing chunk, which carries nothing
    for i in range(sound):
        file.write_bytes(data[:i] + bytes([data[i] ^ 0x10]) + data[i + 1 :])
        with pytest.raises(UserError, match=r"a\.png is damaged"):
            read_png(file)
    for length in range(sound):
        file.write_bytes(data[:length])
        with pytest.raises(UserError, match=r"a\.png is damaged"):
            read_png(file)


def test_other_formats_are_refused(tmp_path, picture):
    Image.fromarray(picture).save(tmp_path / "photo.png", "JPEG")
    with pytest.raises(UserError, match="no PNG file"):
        read_png(tmp_path / "photo.png")
    Image.fromarray(picture).convert("L").save(tmp_path / "grey.png")
    with pytest.raises(UserError, match="mode L, RGB was expected"):
        read_png(tmp_path / "grey.png")


def test_file_name_is_readable():
    assert file_name("a [V] dog in the snow", 3) == "a-V-dog-in-the-snow-0003.png"


PROMPTS = [
    "a dog",
    "a-dog",
    "A dog",
    "a  dog",
    " a dog",
    "a dog!",
    "a [V] dog",
    "a V dog",
    "a [v] dog",
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    ".hidden",
    "C:\\windows",
    "",
    "雪",
    "犬",
    "café",
    "a\0b\nc",
    "\udcff",
    "x" * 500,
    "x" * 501,
    "a dog " * 13 + "1",
    "a dog " * 13 + "2",
]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("seed", [0, 2**63])
def test_file_name_is_safe(prompt, seed):
    name = file_name(prompt, seed)
    assert re.fullmatch(rf"[A-Za-z0-9][A-Za-z0-9-]*-{seed:04d}\.png", name)
    assert len(name) <= 80


def test_file_names_differ_by_prompt_and_seed():
    names = {file_name(prompt, seed).lower() for prompt in PROMPTS for seed in (0, 1)}
    assert len(names) == 2 * len(PROMPTS)
