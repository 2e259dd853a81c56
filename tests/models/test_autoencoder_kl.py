import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL as Reference

from personalize_jax.formats.port_weights import load_weights
from personalize_jax.models.autoencoder_kl import AutoencoderKL
from personalize_jax.runtime.errors import UserError
from tests.models.torch_params import count, scramble


def tiny_config(channels, **others):
    levels = len(channels)
    return {
        "block_out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "norm_num_groups": 4,
        **others,
    }


CONFIGS = [
    tiny_config((8, 16)),
    tiny_config((4, 8, 8), norm_num_groups=2, latent_channels=3, use_quant_conv=False),
    tiny_config(
        (12,),
        layers_per_block=2,
        in_channels=1,
        out_channels=2,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=2.0,
    ),
]


@pytest.fixture(params=CONFIGS, ids=["usual", "deep", "flat"])
def both(request, tmp_path):
    """Our autoencoder with its parameters, and theirs."""
    theirs = Reference(**request.param).eval()
    scramble(theirs, seed=0)
    theirs.save_pretrained(tmp_path)
    ours = AutoencoderKL.from_config(theirs.load_config(tmp_path))
    abstract = jax.eval_shape(ours.init, jax.random.key(0), jnp.zeros((1, 8, 8, ours.in_channels)))["params"]
    return ours, {"params": load_weights(tmp_path, abstract, "autoencoder")}, theirs


def nchw(x):
    return torch.from_numpy(np.moveaxis(x, -1, 1).copy())


def assert_close(ours, theirs):
    theirs = np.moveaxis(theirs.numpy(), 1, -1)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


def test_agrees_with_diffusers(both):
    ours, variables, theirs = both
    rng = np.random.default_rng(0)
    # Not square, and of odd multiples of the factor: a shift by a pixel would show.
    x = rng.uniform(-1, 1, (2, 3 * ours.factor, 5 * ours.factor, ours.in_channels)).astype(np.float32)
    z = rng.standard_normal((2, 3, 5, ours.latent_channels)).astype(np.float32)
    mean, std = jax.jit(lambda v, x: ours.apply(v, x, method="encode"))(variables, x)
    decoded = jax.jit(lambda v, z: ours.apply(v, z, method="decode"))(variables, z)
    with torch.no_grad():
        posterior = theirs.encode(nchw(x)).latent_dist
        assert_close(mean, posterior.mean)
        assert_close(std, posterior.std)
        assert_close(decoded, theirs.decode(nchw(z)).sample)
    assert ours.scaling_factor == theirs.config.scaling_factor
    assert mean.shape == z.shape and decoded.shape[:3] == x.shape[:3]


@pytest.fixture(scope="module")
def smallest():
    model = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, mid_block_add_attention=False)
    x = jax.random.uniform(jax.random.key(1), (1, 4, 4, 3), minval=-1)
    abstract = jax.eval_shape(model.init, jax.random.key(0), x)
    rng = np.random.default_rng(0)
    return (
        model,
        jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.standard_normal(leaf.shape), jnp.float32), abstract),
        x,
    )


def test_the_variance_is_clamped(smallest):
    model, variables, x = smallest
    encode = jax.jit(lambda variables: model.apply(variables, x, method="encode"))
    for bias, expected in ((1000.0, np.exp(10.0)), (-1000.0, np.exp(-15.0))):
        quant_conv = variables["params"]["quant_conv"]
        shifted = quant_conv | {"bias": quant_conv["bias"] + bias}
        _, std = encode({"params": variables["params"] | {"quant_conv": shifted}})
        np.testing.assert_allclose(std, expected, rtol=1e-5)


def test_computes_in_bfloat16_what_it_computes_in_float32(smallest):
    model, variables, x = smallest
    rough = model.clone(dtype=jnp.bfloat16)
    created = jax.eval_shape(rough.init, jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(created)} == {jnp.dtype(jnp.float32)}
    expected, actual = jax.jit(model.apply)(variables, x), jax.jit(rough.apply)(variables, x)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, atol=0.05 * np.abs(expected).max())
    assert not np.array_equal(actual, expected)


def test_the_public_autoencoder_has_its_size():
    model = AutoencoderKL.from_config(tiny_config((128, 256, 512, 512), layers_per_block=2, norm_num_groups=32))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    assert count(params) == 83_653_863  # of Stable Diffusion 1.5
    assert model.factor == 8


@pytest.mark.parametrize(
    "key, value",
    [
        ("down_block_types", ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]),
        ("up_block_types", ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"]),
        ("act_fn", "relu"),
        ("shift_factor", 0.1),
        ("latents_mean", [0.0] * 4),
        ("block_out_channels", 8),
    ],
)
def test_names_what_it_cannot_do(key, value):
    with pytest.raises(UserError, match=key):
        AutoencoderKL.from_config(tiny_config((8, 16)) | {key: value})


def test_ignores_what_the_config_says_about_other_things():
    config = tiny_config((8,)) | {"_class_name": "AutoencoderKL", "sample_size": 512, "novelty": "yes"}
    assert AutoencoderKL.from_config(config) == AutoencoderKL.from_config(tiny_config((8,)))
