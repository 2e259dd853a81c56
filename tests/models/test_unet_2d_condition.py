import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from personalize_jax.models.params import flatten
from personalize_jax.models.unet_2d_condition import UNet2DCondition
from personalize_jax.planning import published as architectures
from personalize_jax.runtime.errors import UserError
from tests.models.torch_params import count, port, scramble

# Programs are run once, so that it is compiling them that takes the time: this takes a third of it.
QUICKLY = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}

SMALL = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
SMALL_SD = SMALL | {
    "cross_attention_dim": 12,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
SMALL_IF = SMALL | {
    "addition_embed_type_num_heads": 4,
    "attention_head_dim": 8,
    "cross_attention_dim": 32,
    "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
    "encoder_hid_dim": 12,
    "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
}
# The public networks but for their sizes.
PUBLIC = {
    "Stable Diffusion 1.5": architectures.stable_diffusion_unet("1.5") | SMALL_SD | {"attention_head_dim": 2},
    "Stable Diffusion 2.1": architectures.stable_diffusion_unet("2.1") | SMALL_SD | {"attention_head_dim": [2, 4]},
    "IF I": architectures.if_unet("XL") | SMALL_IF,
    "IF II": architectures.if_super_resolution_unet("L")
    | SMALL_IF
    | {"layers_per_block": [1, 2], "time_embedding_dim": 20},
}


def random_config(simple, levels, seed):
    """Any settings together; each block is of the family's kind, with or without attention."""
    rng = np.random.default_rng(seed)
    most = 2 if levels < 3 else 1

    def choose(*choices):
        return choices[rng.integers(len(choices))]

    def per_level(*choices):
        return [choose(*choices) for _ in range(levels)]

    attention = [True] + per_level(True, False)[1:]
    config = {
        "act_fn": choose("silu", "gelu"),
        "block_out_channels": per_level(8, 16, 24) if levels > 1 else [32],
        "conv_in_kernel": choose(1, 3, 5),
        "cross_attention_dim": 32,
        "flip_sin_to_cos": choose(True, False),
        "freq_shift": choose(0, 1),
        "in_channels": choose(3, 4, 6),
        "layers_per_block": per_level(1, most),
        "mid_block_scale_factor": choose(1, 1.3),
        "norm_eps": choose(1e-5, 1e-2),
        "norm_num_groups": choose(2, 4),
        "only_cross_attention": choose(True, False, per_level(True, False)),
        "out_channels": choose(3, 4, 6),
        "resnet_time_scale_shift": choose("default", "scale_shift"),
        "time_embedding_act_fn": choose(None, "gelu", "silu"),
        "time_embedding_dim": choose(None, 20),
        "timestep_post_act": choose(None, "gelu"),
    }
    if choose(True, False):
        config |= {"class_embed_type": "timestep"}
    if choose(True, False):
        config |= {"addition_embed_type": "text", "addition_embed_type_num_heads": 4}
    if choose(True, False):
        config |= {"encoder_hid_dim": 20}
    if simple:
        names = {True: "SimpleCrossAttn{}Block2D", False: "Resnet{}sampleBlock2D"}
        config |= {
            "attention_head_dim": choose(4, per_level(2, 4, 8)),
            # Diffusers can norm the text by layers only where it is as wide as the pixels.
            "cross_attention_norm": choose(None, "group_norm") if levels > 1 else "layer_norm",
            "mid_block_only_cross_attention": choose(None, True, False),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "resnet_out_scale_factor": choose(1.0, 1.4),
            "resnet_skip_time_act": choose(True, False),
        }
    else:
        names = {True: "CrossAttn{}Block2D", False: "{}Block2D"}
        config |= {
            "attention_head_dim": choose(2, per_level(1, 2, 4)),
            "transformer_layers_per_block": choose(1, per_level(1, most)),
            "use_linear_projection": choose(True, False),
        }
    config["down_block_types"] = [names[has].format("Down") for has in attention]
    config["up_block_types"] = [names[has].format("Up") for has in reversed(attention)]
    return config


RANDOM = {
    # With these seeds each choice is made by one of a family's networks at least.
    f"{name} {levels}": random_config(simple, levels, seed + levels)
    for simple, name, seed in [(False, "transformer", 1161), (True, "simple", 8275)]
    for levels in (1, 2, 3)
}


def network_and_inputs(config, **compute):
    network = UNet2DCondition.from_config(config, **compute)
    rng = np.random.default_rng(0)
    z = rng.standard_normal((2, 8, 12, network.in_channels), np.float32)
    text = rng.standard_normal((2, 7, network.text_width), np.float32)
    low_res, level = None, None
    if network.class_embed_type is not None:
        level = np.array([250, 0])
        z, low_res = np.split(z, [network.in_channels // 2], axis=-1)
    return network, (z, np.array([999, 3]), text, np.ones((2, 7), bool), low_res, level)


def shapes(network, inputs):
    return jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]


def in_torch(config):
    torch.manual_seed(0)
    model = UNet2DConditionModel(**config).eval()
    scramble(model, seed=1)

    def apply(z, n, text, mask, low_res, level):
        z = z if low_res is None else np.concatenate([z, low_res], axis=-1)
        level = None if level is None else torch.tensor(level)
        output = model(torch.tensor(z).permute(0, 3, 1, 2), torch.tensor(n), torch.tensor(text), level)
        return output.sample.permute(0, 2, 3, 1)

    return model, apply


@pytest.mark.parametrize("config", [*PUBLIC.values(), *RANDOM.values()], ids=[*PUBLIC, *RANDOM])
def test_outputs_are_those_of_diffusers(config):
    model, apply = in_torch(config)
    # As a checkpoint has it: all of diffusers' keys, in what JSON can say.
    network, inputs = network_and_inputs(dict(model.config))
    with torch.no_grad():
        expected = apply(*inputs).numpy()
    params = port(model.state_dict(), shapes(network, inputs))
    output = jax.jit(network.apply, compiler_options=QUICKLY)({"params": params}, *inputs)
    np.testing.assert_allclose(output, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


ONE_LEVEL = {
    "Stable Diffusion 2.1": {
        "attention_head_dim": [2],
        "down_block_types": ["CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D"],
    },
    "IF II": {"down_block_types": ["SimpleCrossAttnDownBlock2D"], "up_block_types": ["SimpleCrossAttnUpBlock2D"]},
}


def one_level(name):
    return PUBLIC[name] | ONE_LEVEL[name] | {"block_out_channels": [16], "layers_per_block": 1}


@pytest.mark.parametrize(("name", "remat"), [("Stable Diffusion 2.1", False), ("IF II", False), ("IF II", True)])
def test_gradients_are_those_of_diffusers(name, remat):
    config = one_level(name)
    model, apply = in_torch(config)
    network, inputs = network_and_inputs(config, remat=remat)
    abstract = shapes(network, inputs)
    output = apply(*inputs)
    weights = np.random.default_rng(1).standard_normal(output.shape, np.float32)
    (output * torch.tensor(weights)).sum().backward()
    expected = flatten(port({name: parameter.grad for name, parameter in model.named_parameters()}, abstract))
    params = port(model.state_dict(), abstract)

    def loss(params):
        return jnp.sum(weights * network.apply({"params": params}, *inputs))

    gradients = jax.jit(jax.grad(loss), compiler_options=QUICKLY)
    largest = max(np.abs(gradient).max() for gradient in expected.values())
    for path, gradient in flatten(gradients(params)).items():
        # Some vanish but for rounding: those of a key's bias before a softmax.
        atol = 1e-3 * np.abs(expected[path]).max() + 1e-6 * largest
        np.testing.assert_allclose(gradient, expected[path], rtol=0, atol=atol, err_msg=path)


@pytest.mark.parametrize("name", ONE_LEVEL)
def test_rematerialisation_changes_no_parameter_and_stores_less(name):
    stored = {}
    for remat in (False, True):
        network, inputs = network_and_inputs(one_level(name), remat=remat)
        abstract = shapes(network, inputs)
        _, residuals = jax.eval_shape(
            lambda params, network=network, inputs=inputs: jax.vjp(
                lambda p: network.apply({"params": p}, *inputs), params
            ),
            abstract,
        )
        stored[remat] = count(residuals)
    assert stored[True] < stored[False] / 2


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (architectures.stable_diffusion_unet("1.5"), 859_520_964),
        (architectures.if_unet("XL"), 4_304_695_110),
        pytest.param(architectures.stable_diffusion_unet("2.1"), 865_910_724, marks=pytest.mark.slow),
        pytest.param(architectures.if_super_resolution_unet("L"), 1_243_277_190, marks=pytest.mark.slow),
        pytest.param(architectures.stable_diffusion_unet("2.1-base"), 865_910_724, marks=pytest.mark.slow),
        pytest.param(architectures.if_unet("L"), 935_365_830, marks=pytest.mark.slow),
        pytest.param(architectures.if_unet("M"), 371_605_830, marks=pytest.mark.slow),
        pytest.param(architectures.if_super_resolution_unet("M"), 482_483_334, marks=pytest.mark.slow),
    ],
    ids=["1.5", "I-XL", "2.1", "II-L", "2.1-base", "I-L", "I-M", "II-M"],
)
def test_public_networks_have_their_numbers_of_parameters(config, parameters):
    network = UNet2DCondition.from_config(config)
    size = (1, 16, 16, network.in_channels)
    inputs = (size, (1,), (1, 77, network.text_width), (1, 77))
    z, n, text, mask = (jnp.zeros(shape) for shape in inputs)
    assert count(shapes(network, (z, n, text, mask, None, n))) == parameters


@pytest.mark.parametrize("name", ["Stable Diffusion 2.1", "IF II"])
def test_half_precision_is_of_the_computation_alone(name):
    network, inputs = network_and_inputs(PUBLIC[name], dtype=jnp.bfloat16)
    output, variables = jax.eval_shape(network.init_with_output, jax.random.key(0), *inputs)
    assert output.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    program = jax.jit(network.apply).lower(variables, *inputs).as_text()
    products = re.findall(r"stablehlo\.(?:dot_general|convolution).* : \((.*)\) ->", program)
    assert products
    assert not [operands for operands in products if "f32" in operands]


@pytest.mark.parametrize("config", [PUBLIC["Stable Diffusion 1.5"], PUBLIC["IF I"]], ids=["transformer", "simple"])
def test_the_kernel_of_attention_is_the_one_asked_for(config):
    network, inputs = network_and_inputs(config, attention="nonsense")
    with pytest.raises(UserError, match="nonsense"):
        shapes(network, inputs)


@pytest.mark.parametrize(
    "setting",
    [
        {"down_block_types": ["CrossAttnDownBlock2D", "KDownBlock2D"]},
        {"up_block_types": ["AttnUpBlock2D"]},
        {"mid_block_type": "UNetMidBlock2D"},
        {"mid_block_type": None},
        {"time_embedding_type": "fourier"},
        {"num_class_embeds": 10},
        {"class_embed_type": "projection"},
        {"addition_embed_type": "text_time"},
        {"encoder_hid_dim_type": "image_proj"},
        {"act_fn": "mish"},
        {"center_input_sample": True},
        {"dual_cross_attention": True},
        {"num_attention_heads": 8},
        {"dropout": 0.1},
        {"cross_attention_dim": [8, 16, 32, 32]},
        {"attention_head_dim": [5, 10]},
        {"mid_block_type": None},
        {"norm_num_groups": None},
        {"layers_per_block": 0},
    ],
    ids=str,
)
def test_what_is_not_supported_is_named(setting):
    ((key, value),) = setting.items()
    value = value[-1] if key.endswith("block_types") else value
    with pytest.raises(UserError) as error:
        UNet2DCondition.from_config(architectures.stable_diffusion_unet("1.5") | setting)
    assert key in str(error.value)
    assert str(value).strip("[]") in str(error.value)


def test_inputs_that_do_not_fit_are_refused():
    network, (z, n, text, mask, low_res, level) = network_and_inputs(PUBLIC["IF II"])
    with pytest.raises(UserError, match="3 channels and takes 6"):
        shapes(network, (z, n, text, mask, None, level))
    with pytest.raises(UserError, match="no noise level"):
        shapes(network, (z, n, text, mask, low_res, None))
    with pytest.raises(UserError, match="multiples of 2"):
        shapes(network, (z[:, :5], n, text, mask, low_res[:, :5], level))


@pytest.mark.parametrize(
    "function",
    [
        architectures.if_unet,
        architectures.if_super_resolution_unet,
        architectures.stable_diffusion_unet,
        architectures.clip_text,
        architectures.stable_diffusion_scheduler,
    ],
)
def test_a_checkpoint_that_was_never_published_is_refused(function):
    with pytest.raises(UserError, match="XXL"):
        function("XXL")
