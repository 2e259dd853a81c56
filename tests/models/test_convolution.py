import importlib.metadata
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import personalize_jax
from personalize_jax.models.convolution import Conv, convolve, convolve_3x3
from personalize_jax.runtime.sharding import BATCH, make_mesh


def arrays(H: int, W: int, B: int = 2, C: int = 5, K: int = 4) -> tuple[jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((B, H, W, C), (3, 3, C, K), (B, H, W, K))
    return tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))


def torch_convolution(x_BHWC: np.ndarray, kernel: np.ndarray, d_y_BHWK: np.ndarray) -> tuple[np.ndarray, ...]:
    """Output and both gradients in float64."""
    x, d_y = (torch.from_numpy(np.array(a, np.float64)).permute(0, 3, 1, 2) for a in (x_BHWC, d_y_BHWK))
    weight = torch.from_numpy(np.array(kernel, np.float64)).permute(3, 2, 0, 1)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    y = torch.nn.functional.conv2d(x, weight, padding=1)
    d_x, d_weight = torch.autograd.grad(y, (x, weight), d_y)
    return tuple(
        a.detach().numpy() for a in (y.permute(0, 2, 3, 1), d_x.permute(0, 2, 3, 1), d_weight.permute(2, 3, 1, 0))
    )


@pytest.mark.parametrize("H, W", [(8, 8), (7, 8), (8, 5), (3, 3), (2, 1), (1, 1)])
def test_agrees_with_torch_in_double_precision(H, W):
    x, kernel, d_y = arrays(H, W)
    y, gradients = jax.vjp(convolve_3x3, x, kernel)
    ours = (y, *gradients(d_y))
    for mine, theirs in zip(ours, torch_convolution(x, kernel, d_y), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5 * max(1.0, np.abs(theirs).max()))


def test_is_as_exact_as_a_direct_convolution():
    x, kernel, d_y = arrays(16, 16, B=1, C=64, K=64)
    direct = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    true = torch_convolution(x, kernel, d_y)[0]
    error, error_of_direct = (np.abs(np.asarray(a, np.float64) - true).max() for a in (convolve_3x3(x, kernel), direct))
    assert error < 4 * error_of_direct
    assert error < 2e-6 * np.abs(true).max()


def test_each_picture_of_a_batch_is_convolved_alone():
    x, kernel, _ = arrays(6, 6, B=3)
    together = convolve_3x3(x, kernel)
    for i in range(3):
        np.testing.assert_allclose(convolve_3x3(x[i : i + 1], kernel)[0], together[i], atol=1e-5)


@pytest.mark.parametrize("size, stride, padding", [(1, 1, None), (3, 1, None), (3, 2, None), (3, 2, ((0, 1), (0, 1)))])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_module_agrees_with_torch(size, stride, padding, dtype):
    conv = Conv(128, size, stride, padding, dtype)
    x = jax.random.normal(jax.random.key(1), (2, 16, 18, 128))
    params = conv.init(jax.random.key(2), x)["params"]
    params["bias"] = jax.random.normal(jax.random.key(3), (128,))
    (top, bottom), (left, right) = padding or ((size // 2, size // 2),) * 2
    x_BCHW = torch.nn.functional.pad(torch.from_numpy(np.array(x)).permute(0, 3, 1, 2), (left, right, top, bottom))
    weight = torch.from_numpy(np.array(params["kernel"])).permute(3, 2, 0, 1)
    theirs = torch.nn.functional.conv2d(x_BCHW, weight, torch.from_numpy(np.array(params["bias"])), stride)
    ours = conv.apply({"params": params}, x)
    assert ours.dtype == dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 5e-2
    np.testing.assert_allclose(np.asarray(ours, np.float32), theirs.permute(0, 2, 3, 1), atol=tolerance)


@pytest.mark.parametrize("stride, padding", [(1, ((1, 1), (1, 1))), (2, ((1, 1), (1, 1))), (2, ((0, 1), (0, 1)))])
@pytest.mark.parametrize("H, W", [(8, 7), (9, 8), (3, 2)])
def test_gradients_of_any_stride_are_torchs(H, W, stride, padding):
    x, kernel, _ = arrays(H, W)
    (top, bottom), (left, right) = padding
    y, gradients = jax.vjp(lambda x, kernel: convolve(x, kernel, stride, padding), x, kernel)
    d_y = jax.random.normal(jax.random.key(4), y.shape)
    x_BCHW, weight, d_y_BKHW = (
        torch.from_numpy(np.array(a.transpose(order), np.float64))
        for a, order in ((x, (0, 3, 1, 2)), (kernel, (3, 2, 0, 1)), (d_y, (0, 3, 1, 2)))
    )
    x_BCHW, weight = x_BCHW.requires_grad_(), weight.requires_grad_()
    padded = torch.nn.functional.pad(x_BCHW, (left, right, top, bottom))
    theirs = torch.nn.functional.conv2d(padded, weight, stride=stride)
    d_x, d_weight = torch.autograd.grad(theirs, (x_BCHW, weight), d_y_BKHW)
    expected = theirs.detach().permute(0, 2, 3, 1), d_x.permute(0, 2, 3, 1), d_weight.permute(2, 3, 1, 0)
    for mine, other in zip((y, *gradients(d_y)), expected, strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5 * max(1.0, np.abs(other).max()))


@pytest.mark.parametrize("stride", [1, 2])
def test_no_convolution_in_a_loop_has_an_order_that_xla_has_no_fast_one_for(stride):
    """On a CPU; a training of several steps a dispatch, or of microbatches, is such a loop."""
    x, kernel, _ = arrays(8, 8, B=4)

    def loop(kernel, x):
        gradient = jax.grad(lambda kernel, x: jnp.sum(convolve(x, kernel, stride) ** 2), (0, 1))
        return jax.lax.map(lambda x: gradient(kernel, x[None]), x)

    text = jax.jit(loop).lower(kernel, x).compile().as_text()
    orders = re.findall(r" convolution\(.*dim_labels=([\w>-]+)", text)
    assert len(orders) >= 3 and set(orders) == {"b01f_01io->b01f"}


def test_accelerators_get_xlas_own_convolution():
    x, kernel, _ = arrays(16, 16)
    for platform, direct in (("tpu", True), ("cpu", False)):
        text = jax.jit(convolve_3x3).trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.convolution" in text) == direct
        gradient = jax.jit(jax.grad(lambda x, kernel: convolve_3x3(x, kernel).sum(), (0, 1)))
        text = gradient.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
        assert ("stablehlo.convolution" in text) == direct


def convolution_and_gradients(x, kernel, d_y):
    y, gradients = jax.vjp(convolve_3x3, x, kernel)
    return y, *gradients(d_y)


def compare_shardings():
    """Run on eight devices: batch split over data and fsdp, the kernel's channels over fsdp and tensor."""
    x, kernel, d_y = arrays(8, 8, B=8, C=4, K=6)
    reference = jax.jit(convolution_and_gradients)(x, kernel, d_y)
    mesh = make_mesh((2, 2, 2))
    x, d_y = jax.device_put((x, d_y), NamedSharding(mesh, BATCH))
    for spec in (P(), P(None, None, None, "tensor"), P(None, None, "tensor"), P(None, None, "fsdp", "tensor")):
        placed = jax.device_put(kernel, NamedSharding(mesh, spec))
        for ours, expected in zip(jax.jit(convolution_and_gradients)(x, placed, d_y), reference, strict=True):
            np.testing.assert_allclose(ours, expected, atol=1e-5 * np.abs(expected).max(), err_msg=str(spec))


def test_xla_convolves_itself_with_the_pinned_versions():
    """Otherwise a library does, and nothing but the time that it takes would tell."""
    if find_spec("jax_plugins"):
        pytest.skip("an accelerator's compiler is installed, which may not know the flag")
    assert "=LIBRARY_FUSION_TYPE_REDUCE" in os.environ["XLA_FLAGS"]


def test_other_versions_are_given_no_flag_that_they_may_not_know(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--of_the_user")
    monkeypatch.setattr(importlib.metadata, "distributions", lambda name: [SimpleNamespace(version="0.11.2")])
    importlib.reload(personalize_jax)
    assert os.environ["XLA_FLAGS"] == "--of_the_user"


@pytest.mark.slow
def test_eight_devices_agree_with_one():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    program = f"from {__name__} import compare_shardings; compare_shardings()"
    subprocess.run([sys.executable, "-c", program], check=True, env=environment, cwd=Path(__file__).parents[2])
