"""Configurations that leave out keys, or say something else: as diffusers and transformers, or one sentence."""

import contextlib
import inspect

import jax
import jax.numpy as jnp
import pytest
import torch
from diffusers import AutoencoderKL as TorchAutoencoder
from diffusers import UNet2DConditionModel
from transformers import CLIPConfig, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from personalize_jax.formats.port_weights import torch_names
from personalize_jax.models.autoencoder_kl import AutoencoderKL
from personalize_jax.models.clip import Clip
from personalize_jax.models.clip_text import ClipTextEncoder
from personalize_jax.models.params import flatten
from personalize_jax.models.t5_encoder import T5Encoder
from personalize_jax.models.unet_2d_condition import UNet2DCondition
from personalize_jax.runtime.errors import UserError
from tests import tiny_public

TOKENS = jnp.zeros((1, 77), jnp.int32)
VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "block_out_channels": [32, 64],
    "norm_num_groups": 8,
    "layers_per_block": 2,
    "latent_channels": 3,
    "in_channels": 1,
    "out_channels": 1,
    "scaling_factor": 0.5,
}
CLIP = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 80,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "projection_dim": 8,
}
T5 = {
    "vocab_size": 50,
    "d_model": 32,
    "d_kv": 4,
    "d_ff": 48,
    "num_layers": 1,
    "num_heads": 4,
    "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 64,
    "layer_norm_epsilon": 1e-5,
    "feed_forward_proj": "gated-gelu",
}
WIDE = {"encoder_hid_dim": 64}  # for as many heads as are usual
NETWORKS = {
    "Stable Diffusion": ("unet", UNet2DCondition, tiny_public.SD_UNET, UNet2DConditionModel.from_config),
    "IF": ("unet", UNet2DCondition, tiny_public.IF_UNET | WIDE, UNet2DConditionModel.from_config),
    "IF II": ("unet", UNet2DCondition, tiny_public.IF_II_UNET | WIDE, UNet2DConditionModel.from_config),
    "autoencoder": ("autoencoder", AutoencoderKL, VAE, TorchAutoencoder.from_config),
    "CLIP": ("clip", ClipTextEncoder, CLIP, lambda config: CLIPTextModel(CLIPTextConfig(**config))),
    "T5": ("t5", T5Encoder, T5, lambda config: T5EncoderModel(T5Config(**config))),
}
ODD = [None, 0, -1, 1.5, float("nan"), True, "odd", "", [], [1], [0, "odd"], [[1, 2], [3, 4]], {}, {"a": 1}]


def as_json(config):
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def build(network, **config):
    _, ours, tiny, _ = NETWORKS[network]
    return ours.from_config({**as_json(tiny), **config})


def our_shapes(network, kind):
    inputs = [TOKENS]
    if kind == "unet":
        low = (jnp.zeros((1, 8, 8, network.in_channels // 2)),) * 2
        low = low if network.class_embed_type else (jnp.zeros((1, 8, 8, network.in_channels)), None)
        text = jnp.zeros((1, 3, network.text_width))
        inputs = [low[0], jnp.zeros(1), text, None, low[1], jnp.zeros(1)]
    if kind == "autoencoder":
        inputs = [jnp.zeros((1, 8, 8, network.in_channels))]
    params = jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]
    return {torch_names(path, kind)[0]: leaf.size for path, leaf in flatten(params).items()}


def their_shapes(make, config, kind):
    with torch.device("meta"):
        shapes = {name: parameter.numel() for name, parameter in make(config).named_parameters()}
    # What transformers has called the tensors of a CLIP text encoder in its files for the longest time.
    return {f"text_model.{name}": size for name, size in shapes.items()} if kind == "clip" else shapes


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in ("IF", "IF II") else name for name in NETWORKS],
)
def test_every_key_may_be_left_out_that_the_class_has_a_default_for(name):
    kind, ours, tiny, make = NETWORKS[name]
    for key in tiny:
        config = {other: value for other, value in as_json(tiny).items() if other != key}
        try:
            network = ours.from_config(config)
        except UserError:
            if kind == "autoencoder":  # they build what has other levels on the way down than on the way up
                assert key.startswith(("down_block", "up_block", "block_out"))
                continue
            with pytest.raises((ValueError, TypeError)):  # nor do they build it
                their_shapes(make, config, kind)
            continue
        if network != ours.from_config(as_json(tiny)):
            assert our_shapes(network, kind) == their_shapes(make, config, kind), key


def defaults(network):
    """What a class of diffusers takes for each key that its configuration leaves out."""
    parameters = inspect.signature(network.__init__).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (UNet2DCondition, defaults(UNet2DConditionModel)),
        (AutoencoderKL, defaults(TorchAutoencoder)),
        (ClipTextEncoder, CLIPTextConfig().to_dict()),
        (Clip, CLIPConfig().to_dict()),
        (T5Encoder, T5Config().to_dict()),
    ],
)
def test_keys_left_out_have_the_values_of_diffusers_and_transformers(ours, theirs):
    """Of those too that change no shape."""
    named = {key: value for key, value in theirs.items() if key == "model_type"}
    assert ours.from_config(named) == ours.from_config(as_json(theirs))


@pytest.mark.parametrize("name", NETWORKS)
def test_no_value_is_answered_by_a_traceback(name):
    _, ours, tiny, _ = NETWORKS[name]
    for key in {**tiny, **ours.__dataclass_fields__}.keys() - {"name", "parent", "dtype", "remat", "attention"}:
        for value in ODD:
            with contextlib.suppress(UserError):
                build(name, **{key: value})


def test_a_key_that_nobody_knows_is_ignored_with_a_warning(caplog):
    for name in ("IF", "autoencoder"):
        assert build(name, invented_later=1, _diffusers_version="9.0") == build(name)
    assert [record.message.split(";")[0] for record in caplog.records] == [
        f"invented_later is 1 in the {network}'s config.json" for network in ("U-Net", "autoencoder")
    ]


def test_one_width_of_the_text_may_be_said_of_every_level():
    assert build("IF", cross_attention_dim=[64, 64]) == build("IF")


def test_what_fits_a_key_but_not_another_is_named():
    with pytest.raises(UserError, match="num_attention_heads is 5.*hidden_size of 32"):
        build("CLIP", num_attention_heads=5)
    with pytest.raises(UserError, match="encoder_hid_dim is missing"):
        build("Stable Diffusion", encoder_hid_dim_type="text_proj")
