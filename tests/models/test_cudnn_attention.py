import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as fused

from personalize_jax.models.attention import attend, fits_cudnn, suited
from personalize_jax.models.unet_2d_condition import UNet2DCondition
from personalize_jax.planning import published
from personalize_jax.runtime.errors import UserError
from tests.models import cudnn

AMPERE, HOPPER = (8, 0), (9, 0)
LAYOUT = fused.AttentionLayout.BTNH
DTYPES = ("bfloat16", "float16", "float32")


def shapes(L, S, D, dtype="bfloat16", B=2, N=4):
    return [jax.ShapeDtypeStruct((B, length, N, D), dtype) for length in (L, S, S)]


def jax_takes(q, k, v):
    """Whether JAX's own checks pass, of a forward and of a backward pass; it counts a bias whether there is one."""
    try:
        fused.check_layout(q, k, v, *[None] * 7, LAYOUT)
        for is_training in (False, True):
            fused.check_is_flash_attention(q, k, v, LAYOUT.value, cudnn.VERSION, True, is_training)
    except NotImplementedError:
        return False
    return True


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [
        ("cpu", "", "xla"),
        ("tpu", "", "flash"),
        ("gpu", "7.5", "xla"),
        ("gpu", "8.0", "cudnn or xla"),
        ("gpu", "8.9", "cudnn or xla"),
        ("gpu", "9.0", "cudnn or xla"),
        ("gpu", "12.0", "cudnn or xla"),
        ("gpu", "gfx942", "xla"),  # AMD's
        ("gpu", "", "xla"),
    ],
)
def test_auto_is_what_the_device_has(platform, capability, expected):
    assert suited("auto", platform, capability) == expected
    for chosen in ("xla", "cudnn", "flash", "heads"):
        assert suited(chosen, platform, capability) == chosen


def test_cudnn_gets_the_layers_that_jax_lets_it_have(monkeypatch):
    sizes = (4, 8, 12, 20, 40, 64, 80, 96, 128, 136, 160, 256, 512)
    for capability in (AMPERE, HOPPER, (12, 0)):
        cudnn.claim_a_gpu(monkeypatch, capability)
        for D, dtype, (L, S) in itertools.product(sizes, DTYPES, [(2, 2), (64, 78), (4096, 4096)]):
            q, k, v = shapes(L, S, D, dtype)
            if fits_cudnn(q):
                assert jax_takes(q, k, v), (capability, D, dtype)
            elif capability == AMPERE:
                assert not jax_takes(q, k, v), (D, dtype)


@pytest.mark.parametrize(("L", "S"), [(64, 64), (64, 77), (7, 78), (1, 1)])
def test_lengths_that_jax_refuses_are_filled_up_and_masked(L, S, monkeypatch):
    cudnn.claim_a_gpu(monkeypatch)
    q, k, v = shapes(L, S, 40)
    assert jax_takes(q, k, v) == (L % 2 == S % 2 == 0)
    found = cudnn.calls(cudnn.lowered(jax.jit(cudnn.gradients), q, k, v))
    mask = "PADDING" if L % 2 or S % 2 else "NO_MASK"
    call = (2, 4, L + L % 2, S + S % 2, mask)
    assert found == {("forward", *call): 1, ("backward", *call): 1}


@pytest.mark.parametrize(("L", "S"), [(8, 7), (7, 8)])
def test_what_is_filled_up_counts_for_nothing(L, S, monkeypatch):
    """By JAX's own definition of the lengths, in place of the kernel, which needs GPUs."""
    definition = jax.nn.dot_product_attention

    def in_place(*inputs, implementation, **lengths):
        assert implementation == "cudnn"
        return definition(*inputs, **lengths, implementation="xla")

    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, n, 3, 8)), jnp.float32) for n in (L, S, S))

    def attended(implementation):
        def function(*x):
            out = attend(*x, implementation)
            return jnp.sum(jnp.sin(out)), out

        (_, out), gradients = jax.jit(jax.value_and_grad(function, (0, 1, 2), has_aux=True))(q, k, v)
        return out, *gradients

    expected = attended("xla")
    monkeypatch.setattr(jax.nn, "dot_product_attention", in_place)
    for ours, theirs in zip(attended("cudnn"), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_several_gpus_attend_each_to_its_own_pictures_and_heads():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    words = [sys.executable, "-m", "tests.models.cudnn"]
    output = subprocess.check_output(words, cwd=Path(__file__).parents[2], env=environment, timeout=600)
    for found, (pictures, heads) in zip(json.loads(output), [(1, 4), (2, 2), (2, 2)], strict=True):
        call = [pictures, heads, 8, 8, "PADDING"]
        assert found == [[["backward", *call], 1], [["forward", *call], 1]]


@pytest.mark.parametrize(("D", "dtype"), [(160, "bfloat16"), (20, "bfloat16"), (40, "float32")])
def test_other_layers_are_refused_only_if_cudnn_was_asked_for(D, dtype, monkeypatch):
    cudnn.claim_a_gpu(monkeypatch)
    inputs = shapes(16, 16, D, dtype)
    text = cudnn.lowered(jax.jit(lambda *x: attend(*x, "cudnn or xla")), *inputs)
    assert not cudnn.calls(text) and "dot_general" in text
    with pytest.raises(UserError, match=rf"attention is cudnn, .*(got|but got) ({D}|{dtype})\); give auto or xla"):
        jax.eval_shape(lambda *x: attend(*x, "cudnn"), *inputs)


def test_a_machine_without_cudnn_says_so():
    with pytest.raises(UserError, match="attention is cudnn, .*cuDNN is not detected.; give auto or xla"):
        jax.eval_shape(lambda *x: attend(*x, "cudnn"), *shapes(16, 16, 40))


def test_too_little_memory_is_not_told_as_a_layer_that_cudnn_cannot_compute(monkeypatch):
    def computed(*inputs, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(jax.nn, "dot_product_attention", computed)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Out of memory"):
        attend(*(jnp.zeros((1, 2, 1, 8), jnp.bfloat16) for _ in range(3)), "cudnn")


def gradient_program(config, B=2):
    """The program of a U-Net's gradient in bfloat16, for a GPU."""
    network = UNet2DCondition.from_config(config, dtype=jnp.bfloat16, remat=True, attention="cudnn or xla")
    side, enlarges = config["sample_size"], config.get("class_embed_type") == "timestep"
    picture = jax.ShapeDtypeStruct((B, side, side, 4 if config["in_channels"] == 4 else 3), jnp.float32)
    index, mask = jax.ShapeDtypeStruct((B,), jnp.int32), jax.ShapeDtypeStruct((B, 77), bool)
    text = jax.ShapeDtypeStruct((B, 77, network.text_width), jnp.float32)
    inputs = (picture, index, text, mask, *((picture, index) if enlarges else ()))
    params = jax.eval_shape(network.init, jax.random.key(0), *inputs)
    return cudnn.lowered(jax.jit(jax.grad(lambda params, *x: network.apply(params, *x).sum())), params, *inputs)


def expected_calls(layers, B=2):
    """Of layers (N, L, S): the forward pass twice, as it is computed again, the backward pass once."""
    found = Counter()
    for (N, L, S), count in layers.items():
        call = (B, N, L, S + S % 2, "PADDING" if S % 2 else "NO_MASK")
        found["forward", *call] += 2 * count
        found["backward", *call] += count
    return found


@pytest.mark.slow
def test_each_layer_of_a_small_network_gets_its_kernel(monkeypatch):
    cudnn.claim_a_gpu(monkeypatch)
    common = {"layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 64}
    stable_diffusion = common | {
        "sample_size": 8,
        "in_channels": 4,
        "block_out_channels": (16, 40),  # heads of 8 dimensions, and of 20
        "attention_head_dim": 2,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    }
    layers = {(2, 64, 64): 3, (2, 64, 77): 3}
    assert cudnn.calls(gradient_program(stable_diffusion)) == expected_calls(layers)
    deepfloyd_if = common | {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 6,
        "block_out_channels": (8, 16),
        "attention_head_dim": 8,
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "cross_attention_norm": "group_norm",
    }
    assert cudnn.calls(gradient_program(deepfloyd_if)) == expected_calls({(2, 16, 93): 4})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (  # heads of 40 and 80 dimensions; those of the coarsest two levels have 160
            published.stable_diffusion_unet("1.5"),
            {(8, length, keys): 5 for length in (64**2, 32**2) for keys in (length, 77)},
        ),
        (
            published.stable_diffusion_unet("2.1"),
            {
                (N, side**2, keys): count
                for N, side, count in ((5, 96, 5), (10, 48, 5), (20, 24, 5), (20, 12, 1))
                for keys in (side**2, 77)
            },
        ),
        (
            published.if_unet("XL"),
            {(N, side**2, side**2 + 77): count for N, side, count in ((22, 32, 7), (33, 16, 7), (44, 8, 8))},
        ),
        (
            published.if_super_resolution_unet("L"),
            {(N, side**2, side**2 + 77): count for N, side, count in ((15, 32, 11), (20, 16, 12))},
        ),
    ],
    ids=["SD 1.5", "SD 2.1", "IF-I XL", "IF-II L"],
)
def test_each_layer_of_a_published_network_gets_its_kernel(config, layers, monkeypatch):
    cudnn.claim_a_gpu(monkeypatch)
    assert cudnn.calls(gradient_program(config)) == expected_calls(layers)
