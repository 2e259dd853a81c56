import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personalize_jax.models.picture_tokenizer import PictureTokenizer, codes_of, ids_of, quantize

LEVELS = (8, 5, 2)


def test_ids_number_all_codes():
    ids = np.arange(np.prod(LEVELS))
    codes = codes_of(ids, LEVELS)
    assert len(np.unique(codes, axis=0)) == len(ids)
    np.testing.assert_array_equal(ids_of(codes, LEVELS), ids)
    for d, levels in enumerate(LEVELS):
        np.testing.assert_allclose(np.unique(codes[:, d]), np.linspace(-1, 1, levels), atol=1e-6)


def test_numbers_become_the_nearest_codes():
    z = np.random.default_rng(0).normal(size=(100, 3)).astype(np.float32)
    codes = np.asarray(quantize(z, LEVELS))
    np.testing.assert_allclose(codes, codes_of(ids_of(codes, LEVELS), LEVELS), atol=1e-6)
    for d, levels in enumerate(LEVELS):
        values = np.linspace(-1, 1, levels)
        nearest = values[np.abs(np.tanh(z[:, d, None]) - values).argmin(1)]
        np.testing.assert_allclose(codes[:, d], nearest, atol=1e-6)


def test_the_gradient_passes_the_rounding():
    z = jnp.array([0.3, -1.2, 0.1])
    np.testing.assert_allclose(jax.grad(lambda z: quantize(z, LEVELS).sum())(z), 1 - np.tanh(z) ** 2, rtol=1e-5)


@pytest.mark.parametrize(("channels", "patch"), [((16,), 4), ((16, 32), 2)])
def test_pictures_go_through_a_grid_of_tokens(channels, patch):
    network = PictureTokenizer(channels, patch, 1, LEVELS)
    x = np.random.default_rng(0).uniform(-1, 1, (2, 8, 16, 3)).astype(np.float32)
    params = network.init(jax.random.key(0), x)
    assert (network.factor, network.vocab_size) == (4, 80)
    codes = network.apply(params, x, method="encode")
    assert codes.shape == (2, 2, 4, 3) and network.apply(params, codes, method="decode").shape == x.shape
    np.testing.assert_allclose(network.apply(params, x), network.apply(params, codes, method="decode"), rtol=1e-6)
