import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from personalize_jax.models.clip_text import ClipTextEncoder
from personalize_jax.runtime.errors import UserError
from tests.models.torch_params import count, port, scramble

TOKENS = np.random.default_rng(0).integers(0, 30, (2, 9))
TINY = {
    "vocab_size": 30,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 9,
}
STABLE_DIFFUSION_1 = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 768,
}


def abstract(encoder):
    return jax.eval_shape(encoder.init, jax.random.key(0), TOKENS)["params"]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Make a random model and have transformers read it from disk: (the model, config.json, weights on disk)."""

    def publish(**settings):
        model = CLIPTextModel(CLIPTextConfig(**TINY | settings))
        scramble(model, seed=1)
        # What transformers 5 makes anew it writes without the first part of the names, but reads and keeps it.
        weights = {f"text_model.{name}": parameter for name, parameter in model.state_dict().items()}
        folder = tmp_path_factory.mktemp("clip")
        model.config.save_pretrained(folder)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        model, report = CLIPTextModel.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        return model.eval(), json.loads((folder / "config.json").read_text()), weights

    return publish


SETTINGS = {
    "quick_gelu": {"hidden_act": "quick_gelu"},
    "gelu": {"hidden_act": "gelu", "num_attention_heads": 4, "layer_norm_eps": 1e-3},
    "three layers": {"num_hidden_layers": 3, "num_attention_heads": 1, "intermediate_size": 40, "layer_norm_eps": 0.1},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_embeddings_are_those_of_transformers(published, settings):
    model, config, weights = published(**settings)
    encoder = ClipTextEncoder.from_config(config)
    text, mask = jax.jit(encoder.apply)({"params": port(weights, abstract(encoder))}, TOKENS)
    with torch.no_grad():
        expected = model(torch.tensor(TOKENS)).last_hidden_state.numpy()
    np.testing.assert_allclose(text, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert mask.shape == TOKENS.shape and mask.all()


def test_what_follows_does_not_change_a_position(published):
    _, config, weights = published()
    encoder = ClipTextEncoder.from_config(config)
    params = {"params": port(weights, abstract(encoder))}
    apply = jax.jit(encoder.apply)
    np.testing.assert_allclose(apply(params, TOKENS[:, :5])[0], apply(params, TOKENS)[0][:, :5], atol=1e-5)


def test_rematerialisation_does_not_change_gradients(published):
    _, config, weights = published()
    encoder = ClipTextEncoder.from_config(config)
    params = port(weights, abstract(encoder))

    def gradient(encoder):
        return jax.jit(jax.grad(lambda p: jnp.square(encoder.apply({"params": p}, TOKENS)[0]).mean()))(params)

    stored, computed_again = gradient(encoder), gradient(ClipTextEncoder.from_config(config, remat=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), stored, computed_again)


def test_bfloat16_is_close(published):
    _, config, weights = published()
    encoder = ClipTextEncoder.from_config(config)
    params = {"params": port(weights, abstract(encoder))}
    expected, _ = jax.jit(encoder.apply)(params, TOKENS)
    text, _ = jax.jit(ClipTextEncoder.from_config(config, dtype=jnp.bfloat16).apply)(params, TOKENS)
    assert text.dtype == jnp.bfloat16
    np.testing.assert_allclose(text.astype(np.float32), expected, atol=0.05 * np.abs(expected).max())


def test_parameters_are_as_many_as_in_stable_diffusion():
    assert count(abstract(ClipTextEncoder.from_config(STABLE_DIFFUSION_1))) == 123_060_480  # as in version 1.5


def test_an_unknown_activation_is_refused():
    with pytest.raises(UserError, match="hidden_act is 'relu'.*quick_gelu, gelu"):
        ClipTextEncoder.from_config(STABLE_DIFFUSION_1 | {"hidden_act": "relu"})
