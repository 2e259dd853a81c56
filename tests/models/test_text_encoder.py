import jax
import jax.numpy as jnp
import numpy as np
import pytest

from personalize_jax.models.text_encoder import PAD_ID, TextEncoder

TOKENS = jnp.array([[5, 7, 9, 2, PAD_ID, PAD_ID], [4, 2, PAD_ID, PAD_ID, PAD_ID, PAD_ID]])


@pytest.fixture(scope="module")
def encode():
    encoder = TextEncoder(vocab_size=12, width=16, num_layers=2, num_heads=2, max_length=6)
    params = jax.jit(encoder.init)(jax.random.key(0), TOKENS)
    apply = jax.jit(encoder.apply)
    return lambda tokens, params=params: apply(params, tokens), params["params"]


def test_mask_is_true_at_tokens(encode):
    text, mask = encode[0](TOKENS)
    assert text.shape == (2, 6, 16) and mask.dtype == bool
    np.testing.assert_array_equal(mask.sum(1), [4, 2])


def test_padding_does_not_change_the_tokens(encode):
    long, _ = encode[0](TOKENS)
    short, _ = encode[0](TOKENS[:, :4])
    np.testing.assert_allclose(long[0, :4], short[0], atol=1e-5)
    np.testing.assert_allclose(long[1, :2], short[1, :2], atol=1e-5)


def test_every_token_is_read_in_both_directions(encode):
    before, _ = encode[0](TOKENS)
    after, _ = encode[0](TOKENS.at[0, 1].set(8))
    changed = np.abs(after - before).max(-1)
    assert np.all(changed[0, :4] > 1e-3) and np.all(changed[1] == 0)


def test_the_order_of_tokens_matters(encode):
    swapped, _ = encode[0](TOKENS.at[0, :2].set(TOKENS[0, 1::-1]))
    assert np.abs(swapped[0, 3] - encode[0](TOKENS)[0][0, 3]).max() > 1e-3


def test_only_processed_tokens_get_a_gradient(encode):
    """A token that was never processed keeps the vector it was born with."""
    encode, params = encode

    def loss(params):
        text, mask = encode(TOKENS, {"params": params})
        weights = jnp.arange(text.shape[-1])  # a plain sum would vanish after the layer norm
        return jnp.sum(text * weights * mask[..., None])

    gradient = jax.grad(loss)(params)["tokens"]["embedding"]
    processed = np.abs(gradient).max(1) > 0
    assert set(np.flatnonzero(processed)) == {2, 4, 5, 7, 9}
