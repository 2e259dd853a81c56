from types import SimpleNamespace

import numpy as np
import pytest

from personalize_jax.errors import UserError
from personalize_jax.pictures import read_png
from personalize_jax.pipeline import Sampling
from personalize_jax.training.prior import class_images

BASE, ENLARGED = SimpleNamespace(name="base"), SimpleNamespace(name="super_resolution")
SAMPLINGS = {"base": Sampling("ancestral", 2, 2.0), "super_resolution": Sampling("ancestral", 1, 1.0)}


class Cascade:
    """Draws pictures that depend on all that pictures depend on, and notes which."""

    stages = (BASE, ENLARGED)

    def __init__(self):
        self.drawn = []

    def sample_stage(self, stage, prompts, seeds, low_res, batch_size, sampling):
        self.drawn.append((stage.name, list(seeds)))
        assert (low_res is None) == (stage is BASE) and len(prompts) == len(seeds) <= batch_size
        size = 4 if stage is BASE else 8
        rngs = [np.random.default_rng([seed, *repr((prompts[0], sampling)).encode()]) for seed in seeds]
        pictures = np.stack([rng.integers(0, 128, (size, size, 3), np.uint8) for rng in rngs])
        return pictures if low_res is None else pictures + low_res.repeat(2, 1).repeat(2, 2)


@pytest.fixture
def draw(tmp_path):
    """Draws class images; returns them and what had to be drawn for them."""

    def draw(prompt="a dog", count=4, progress=lambda pictures: None, **changed):
        cascade, samplings = Cascade(), {n: s._replace(**changed.get(n, {})) for n, s in SAMPLINGS.items()}
        return class_images(cascade, prompt, count, samplings, tmp_path, 2, progress), cascade.drawn

    return draw


def differ(a, b, name):
    return (a[name] != b[name]).any()


def everything(*names):
    return [(name, seeds) for name in names for seeds in ([0, 1], [2, 3])]


def test_each_stage_enlarges_the_pictures_of_the_one_before(draw, tmp_path):
    pictures, drawn = draw()
    assert drawn == everything("base", "super_resolution")
    assert {name: p.shape for name, p in pictures.items()} == {"base": (4, 4, 4, 3), "super_resolution": (4, 8, 8, 3)}
    expected = Cascade().sample_stage(ENLARGED, ["a dog"], [3], pictures["base"][3:], 2, SAMPLINGS["super_resolution"])
    np.testing.assert_array_equal(pictures["super_resolution"][3:], expected)
    kept, metadata = read_png(tmp_path / "super_resolution" / "00003.png")
    np.testing.assert_array_equal(kept, expected[0])
    assert metadata["prompt"] == "a dog" and metadata["seed"] == "3" and "ancestral" in metadata["sampling"]


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


def test_progress_counts_pictures_found_and_drawn(draw):
    for count in (3, 5):
        steps = []
        draw(count=count, progress=steps.append)
        assert steps == {3: [0, 2, 1], 5: [3, 2]}[count] * 2  # found, then drawn in each batch


def test_a_damaged_picture_is_named(draw, tmp_path):
    draw()
    file = tmp_path / "base" / "00001.png"
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(UserError, match="00001.png is damaged.*drawn again"):
        draw()
