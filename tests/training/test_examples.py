import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personalize_jax.families.text import Text
from personalize_jax.training.examples import downsample_uint8, make_examples, sample_batch

NULL = np.array([2, 0, 0])


def tokenize(captions):
    """A caption is written as its tokens: "7 2"; the empty one as nothing."""
    rows = [[int(token) for token in caption.split()] or [2] for caption in captions]
    return np.array([row + [0] * (3 - len(row)) for row in rows], np.int32)


@pytest.fixture(scope="module")
def examples():
    """Picture i is i everywhere and has the captions [10 + i, 2, 0] and [20 + i, 2, 0]; its low_res is 100 + i."""
    i = np.arange(5)
    images = np.broadcast_to(i[:, None, None, None], (5, 4, 4, 3)).astype(np.uint8)
    captions = np.array([[f"{10 + j} 2", f"{20 + j} 2"] for j in i])
    mask = np.zeros((5, 4, 4), np.uint8)
    mask[:, 0] = 255
    made = make_examples(images, captions, tokenize, 100 + images[:, :2, :2], mask)
    return jax.tree.map(jnp.asarray, made._replace(cond=Text(made.tokens[..., None] * 1.0, made.tokens != 0)))


def sample(examples, size=400, dropout=0.25, object_weight=3.0, seed=0):
    return sample_batch(examples, jax.random.key(seed), size, dropout, object_weight)


def test_everything_in_a_row_belongs_to_one_picture(examples):
    batch = sample(examples)
    picture = np.round((np.asarray(batch.x[:, 0, 0, 0]) + 1) * 127.5).astype(int)
    assert set(picture) == set(range(5))
    assert np.all(np.abs(batch.x) <= 1) and batch.x.dtype == jnp.float32
    np.testing.assert_allclose(np.round((batch.low_res[:, 1, 1, 2] + 1) * 127.5), 100 + picture)
    captioned = batch.tokens[:, 0] != 2
    np.testing.assert_array_equal((batch.tokens[captioned, 0]) % 10, picture[captioned])
    assert set(np.unique(batch.tokens[captioned, 0] // 10)) == {1, 2}  # both captions of a picture are sampled
    np.testing.assert_array_equal(batch.cond.embeddings[..., 0], batch.tokens)
    np.testing.assert_array_equal(batch.cond.mask, batch.tokens != 0)


def test_captions_are_dropped_at_the_given_rate(examples):
    for dropout in (0.0, 0.25, 1.0):
        dropped = np.all(np.asarray(sample(examples, dropout=dropout).tokens) == NULL, axis=1).mean()
        assert dropped == pytest.approx(dropout, abs=0.0 if dropout in (0, 1) else 0.07)


def test_object_pixels_weigh_more(examples):
    weight = sample(examples, object_weight=3.0).pixel_weight
    np.testing.assert_allclose(weight[:, 0], 4.0)
    np.testing.assert_allclose(weight[:, 1:], 1.0)


def test_latents_are_sampled_around_their_pictures_mean(examples):
    mean = np.broadcast_to(np.asarray(examples.image, np.float32)[:, :2, :2], (5, 2, 2, 3))
    std = 0.1 * (1 + mean)  # another one for each picture
    latents = examples._replace(image=None, latent=(jnp.asarray(mean), jnp.asarray(std)))
    batch, other = sample(latents), sample(latents, seed=1)
    picture = np.round((np.asarray(batch.low_res[:, 0, 0, 0]) + 1) * 127.5).astype(int) - 100
    noise = (np.asarray(batch.x) - mean[picture]) / std[picture]
    assert noise.mean() == pytest.approx(0, abs=0.05) and noise.std() == pytest.approx(1, rel=0.05)
    assert len(np.unique(noise.round(4))) > 0.9 * noise.size  # each element of each row has its own
    assert not np.array_equal(batch.x, other.x)


def test_what_a_set_lacks_its_batches_lack():
    bare = make_examples(np.zeros((1, 4, 4, 3), np.uint8), np.array([["1 1 1"]]), tokenize)
    batch = sample_batch(jax.tree.map(jnp.asarray, bare), jax.random.key(0), 2, 0.0)
    assert batch.cond is batch.low_res is batch.pixel_weight is None


def test_equal_captions_are_stored_once():
    made = make_examples(np.zeros((6, 4, 4, 3), np.uint8), np.full((6, 2), "1 1 1"), tokenize)
    np.testing.assert_array_equal(made.tokens, [NULL, [1, 1, 1]])


def test_downsampling_averages_areas():
    pictures = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 2), np.uint8)
    small = downsample_uint8(pictures, 4)
    assert small.dtype == np.uint8
    assert small[1, 2, 3, 0] == np.round(pictures[1, 4:6, 6:8, 0].mean())
    np.testing.assert_array_equal(downsample_uint8(pictures, 8), pictures)
    with pytest.raises(ValueError, match="divisor"):
        downsample_uint8(pictures, 3)
