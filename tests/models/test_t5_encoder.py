import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import T5Config, T5EncoderModel
from transformers.models.t5.modeling_t5 import T5Attention

from personalize_jax.models.t5_encoder import PAD_ID, T5Encoder, relative_buckets
from personalize_jax.runtime.errors import UserError
from tests.models.torch_params import count, port, scramble

LENGTHS = [24, 11, 3, 1]
TOKENS = np.where(
    np.arange(24) < np.array(LENGTHS)[:, None], np.random.default_rng(0).integers(1, 30, (len(LENGTHS), 24)), PAD_ID
)
TINY = {
    "vocab_size": 30,
    "d_model": 16,
    "d_kv": 4,
    "num_heads": 3,
    "d_ff": 24,
    "num_layers": 2,
    "feed_forward_proj": "gated-gelu",
    "dropout_rate": 0.1,
}
V1_1_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "num_heads": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 32,
    "layer_norm_epsilon": 1e-6,
}


def abstract(encoder):
    return jax.eval_shape(encoder.init, jax.random.key(0), TOKENS)["params"]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Make a random model as transformers publishes it: (the model, config.json, weights on disk)."""

    def publish(**settings):
        model = T5EncoderModel(T5Config(**TINY | settings)).eval()
        scramble(model, seed=1)
        folder = tmp_path_factory.mktemp("t5")
        model.save_pretrained(folder)
        return model, json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")

    return publish


SETTINGS = {
    "gated, narrow heads": {},
    "gated, few buckets": {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "d_kv": 8},
    "relu, wide heads": {"feed_forward_proj": "relu", "d_kv": 12, "num_layers": 3, "layer_norm_epsilon": 0.1},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_embeddings_are_those_of_transformers(published, settings):
    model, config, weights = published(**settings)
    encoder = T5Encoder.from_config(config)
    text, mask = jax.jit(encoder.apply)({"params": port(weights, abstract(encoder))}, TOKENS)
    with torch.no_grad():
        tokens = torch.tensor(TOKENS)
        expected = model(tokens, attention_mask=(tokens != PAD_ID).long()).last_hidden_state.numpy()
    np.testing.assert_allclose(text, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert mask.shape == TOKENS.shape and mask.all()


def test_padding_does_not_change_the_tokens(published):
    _, config, weights = published()
    encoder = T5Encoder.from_config(config)
    params = {"params": port(weights, abstract(encoder))}
    apply = jax.jit(encoder.apply)
    np.testing.assert_allclose(apply(params, TOKENS[1:2, :11])[0][0], apply(params, TOKENS)[0][1, :11], atol=1e-5)


def test_rematerialisation_does_not_change_gradients(published):
    _, config, weights = published()
    encoder = T5Encoder.from_config(config)
    params = port(weights, abstract(encoder))

    def gradient(encoder):
        return jax.jit(jax.grad(lambda p: jnp.square(encoder.apply({"params": p}, TOKENS)[0]).mean()))(params)

    stored, computed_again = gradient(encoder), gradient(T5Encoder.from_config(config, remat=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), stored, computed_again)


def test_bfloat16_is_close(published):
    _, config, weights = published()
    encoder = T5Encoder.from_config(config)
    params = {"params": port(weights, abstract(encoder))}
    expected, _ = jax.jit(encoder.apply)(params, TOKENS)
    text, _ = jax.jit(T5Encoder.from_config(config, dtype=jnp.bfloat16).apply)(params, TOKENS)
    assert text.dtype == jnp.bfloat16
    np.testing.assert_allclose(text.astype(np.float32), expected, atol=0.05 * np.abs(expected).max())


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (32, 64), (8, 20), (20, 100), (64, 512)])
def test_every_offset_falls_in_the_public_bucket(buckets, distance):
    length = 600
    offsets = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    expected = T5Attention._relative_position_bucket(offsets, True, buckets, distance)
    np.testing.assert_array_equal(relative_buckets(length, buckets, distance), expected)


def test_v1_1_xxl_has_its_parameters():
    attention, mlp, norms = 4 * 4096 * 64 * 64, 3 * 4096 * 10240, 2 * 4096
    expected = 32128 * 4096 + 24 * (attention + mlp + norms) + 32 * 64 + 4096
    assert expected == 4_762_310_656
    assert count(abstract(T5Encoder.from_config(V1_1_XXL))) == expected


def test_unknown_mlps_are_refused():
    with pytest.raises(UserError, match="feed_forward_proj is 'gated-silu'.*relu, gated-gelu"):
        T5Encoder.from_config(V1_1_XXL | {"feed_forward_proj": "gated-silu"})
