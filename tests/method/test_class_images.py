import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from personalize_jax.method.class_images import own_class_images, own_hashes, sample_class_images
from personalize_jax.pipeline import Sampling
from personalize_jax.pipeline.pictures import read_png, save_png
from personalize_jax.runtime.errors import UserError
from personalize_jax.subject.images import MAX_IMAGES

BASE, ENLARGED = SimpleNamespace(name="base"), SimpleNamespace(name="super_resolution")
SAMPLINGS = {"base": Sampling("ancestral", 2, 2.0), "super_resolution": Sampling("ancestral", 1, 1.0)}


class Cascade:
    """Draws pictures that depend on all that pictures depend on, and notes which."""

    stages = (BASE, ENLARGED)

    def __init__(self):
        self.drawn = []

    def sample_stage(self, stage, prompts, seeds, low_res, batch_size, sampling, full_batches):
        assert full_batches  # or what is missing would be drawn in batches of other sizes, which round otherwise
        self.drawn.append((stage.name, list(seeds)))
        assert (low_res is None) == (stage is BASE) and len(prompts) == len(seeds) <= batch_size
        size = 4 if stage is BASE else 8
        rngs = [np.random.default_rng([seed, *repr((prompts[0], sampling)).encode()]) for seed in seeds]
        pictures = np.stack([rng.integers(0, 128, (size, size, 3), np.uint8) for rng in rngs])
        return pictures if low_res is None else pictures + low_res.repeat(2, 1).repeat(2, 2)


@pytest.fixture
def draw(tmp_path):
    """Draws class images; returns them and what had to be drawn for them."""

    def draw(prompt="a dog", count=4, progress=lambda pictures: None, weights="0123", **changed):
        cascade, samplings = Cascade(), {n: s._replace(**changed.get(n, {})) for n, s in SAMPLINGS.items()}
        return sample_class_images(cascade, weights, prompt, count, samplings, tmp_path, 2, progress), cascade.drawn

    return draw


def differ(a, b, name):
    return (a[name] != b[name]).any()


def everything(*names):
    return [(name, seeds) for name in names for seeds in ([0, 1], [2, 3])]


def test_each_stage_enlarges_the_pictures_of_the_one_before(draw, tmp_path):
    pictures, drawn = draw()
    assert drawn == everything("base", "super_resolution")
    assert {name: p.shape for name, p in pictures.items()} == {"base": (4, 4, 4, 3), "super_resolution": (4, 8, 8, 3)}
    expected = Cascade().sample_stage(
        ENLARGED, ["a dog"], [3], pictures["base"][3:], 2, SAMPLINGS["super_resolution"], True
    )
    np.testing.assert_array_equal(pictures["super_resolution"][3:], expected)
    kept, metadata = read_png(tmp_path / "super_resolution" / "00003.png")
    np.testing.assert_array_equal(kept, expected[0])
    assert metadata["prompt"] == "a dog" and metadata["seed"] == "3" and "ancestral" in metadata["sampling"]
    assert metadata["weights"] == "0123"


def test_what_is_there_is_not_drawn_again(draw, tmp_path):
    first, _ = draw()
    again, drawn = draw()
    assert not drawn and not any(differ(first, again, name) for name in first)
    (tmp_path / "super_resolution" / "00003.png").unlink()
    again, drawn = draw()
    assert drawn == [("super_resolution", [3])] and not differ(first, again, "super_resolution")
    assert draw(count=6)[1] == [("base", [4, 5]), ("super_resolution", [4, 5])]
    assert not draw(count=2)[1]


@pytest.mark.parametrize(
    ("change", "stages"),
    [
        ({"prompt": "a cat"}, ("base", "super_resolution")),
        ({"super_resolution": {"augmentation_level": 0.2}}, ("super_resolution",)),
        ({"base": {"guidance_scale": 1.5}}, ("base", "super_resolution")),  # enlarged pictures show the old ones
    ],
)
def test_what_was_drawn_otherwise_is_drawn_again(draw, change, stages):
    first, _ = draw()
    other, drawn = draw(**change)
    assert drawn == everything(*stages)
    assert all(differ(first, other, name) == (name in stages) for name in first)


def test_what_other_weights_drew_is_drawn_again(draw, tmp_path):
    draw()
    assert draw(weights="4567")[1] == everything("base", "super_resolution")
    assert {read_png(file)[1]["weights"] for file in tmp_path.rglob("*.png")} == {"4567"}
    assert not draw(weights="4567")[1]


def test_progress_counts_pictures_found_and_drawn(draw):
    for count in (3, 5):
        steps = []
        draw(count=count, progress=steps.append)
        assert steps == {3: [0, 2, 1], 5: [3, 2]}[count] * 2  # found, then drawn in each batch


def test_what_earlier_versions_drew_without_naming_the_weights_is_drawn_again(draw, tmp_path):
    draw()
    for file in tmp_path.rglob("*.png"):
        pixels, metadata = read_png(file)
        save_png(pixels, file, {key: metadata[key] for key in ("prompt", "seed", "sampling")})
    assert draw()[1] == everything("base", "super_resolution")


@pytest.mark.parametrize("name", ["base/00001.png", "super_resolution/rex.JPG", "rex.webp"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pictures_that_somebody_put_there_are_left_alone(draw, tmp_path, name, mode):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    Image.new(mode, (20, 20)).save(tmp_path / name)
    before = (tmp_path / name).read_bytes()
    with pytest.raises(UserError, match=f"{name} was not sampled here.*--config.class_images.folder"):
        draw()
    assert (tmp_path / name).read_bytes() == before
    assert [file for file in tmp_path.rglob("*.*")] == [tmp_path / name]


def test_own_class_images_are_read_as_a_subjects_are_however_many(tmp_path):
    for i in range(MAX_IMAGES + 1):
        Image.new("RGB", (30, 20), (i, 100, 200)).save(tmp_path / f"{i:02d}.png")
    (tmp_path / ".hidden.png").write_bytes(b"")
    pictures = own_class_images(tmp_path, 16)
    assert pictures.shape == (MAX_IMAGES + 1, 16, 16, 3) and pictures.dtype == np.uint8
    assert [tuple(picture[8, 8]) for picture in pictures] == [(i, 100, 200) for i in range(MAX_IMAGES + 1)]
    files = sorted(tmp_path.glob("[0-9]*.png"))
    assert own_hashes(tmp_path) == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


@pytest.mark.parametrize("name", ["empty", "nowhere", "empty/note.txt"])
def test_a_folder_without_class_images_is_refused(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "note.txt").write_text("no picture")
    with pytest.raises(UserError, match='config.class_images.folder is .*no pictures are; put .* or give ""'):
        own_hashes(tmp_path / name)


def test_a_damaged_picture_is_named(draw, tmp_path):
    draw()
    file = tmp_path / "base" / "00001.png"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(UserError, match="00001.png is damaged.*sampled again"):
        draw()
