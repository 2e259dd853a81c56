"""Public models on meshes of eight virtual devices: the same numbers as on one, with parameters in parts."""

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import AbstractMesh

from configs import deepfloyd_if, stable_diffusion
from personalize_jax.models.params import flatten
from personalize_jax.plan import abstract_pipeline
from personalize_jax.runtime import sharding
from tests import tiny_public
from tests.training import public_worker
from tests.training.worker import MESHES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_public.save_all(tmp_path_factory.mktemp("public"))


@pytest.fixture(scope="module")
def eight_devices(folder, request, tmp_path_factory):
    """What a process with eight virtual devices found in all cases that are asked for, see `public_worker`."""
    directory = tmp_path_factory.mktemp("eight_devices")
    here = [item.callspec.params for item in request.session.items if item.module is request.module]
    asked = [f"{params['model']}/{params['mesh']}" for params in here if "model" in params]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-m", "tests.training.public_worker", str(folder), str(directory), *asked]
    subprocess.run(command, cwd=ROOT, env=environment, timeout=1800, check=True)
    return directory


@pytest.fixture(scope="module")
def one_device(folder, tmp_path_factory):
    """Start, end and losses of a model's training on one device."""

    @functools.cache
    def trained(model):
        directory = tmp_path_factory.mktemp(model)
        pipeline, state = public_worker.train_by_sgd(folder, model, (1, 1, 1), directory)
        start = {"denoiser": pipeline.params[pipeline.stages[-1].name], "text_encoder": pipeline.params["text_encoder"]}
        return flatten(start), flatten(state.params), public_worker.losses(directory)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("personalize_jax.training.program.make_optimizer", None)  # put back after the worker's change
        yield trained


@pytest.mark.parametrize(
    "config",
    [stable_diffusion.get_config("2.1"), pytest.param(deepfloyd_if.get_config("XL"), marks=pytest.mark.slow)],
    ids=["SD 2.1", "IF XL"],
)
def test_every_kernel_of_published_models_lies_in_parts_over_both_axes(config):
    mesh = AbstractMesh((1, 4, 2), sharding.AXES)
    params = abstract_pipeline(config).params
    found = flatten(sharding.shardings(params, config.training.sharding, mesh))
    kernels = {path: leaf for path, leaf in flatten(params).items() if path.endswith("kernel") and leaf.size > 1e5}
    assert kernels
    for path, leaf in kernels.items():
        assert math.prod(found[path].shard_shape(leaf.shape)) == leaf.size // 8, path


@pytest.mark.slow
@pytest.mark.parametrize("model", public_worker.MODELS)
@pytest.mark.parametrize("mesh", MESHES)
def test_eight_devices_train_what_one_trains(eight_devices, one_device, model, mesh):
    start, expected, losses = one_device(model)
    directory = eight_devices / model / mesh
    with np.load(directory / "params.npz") as file:
        params = dict(file)
    assert params.keys() == expected.keys()
    for path, value in params.items():
        np.testing.assert_allclose(value, expected[path], rtol=0, atol=1e-5, err_msg=path)
    assert max(float(abs(expected[path] - start[path]).max()) for path in expected) > 0.01  # a thousand tolerances
    np.testing.assert_allclose(public_worker.losses(directory), losses, rtol=1e-5)

    lying, (_, fsdp, tensor) = json.loads((directory / "lying.json").read_text()), MESHES[mesh]
    for tree in lying.values():
        assert tree["large"] and set(tree["large"].values()) == {1 / (fsdp * tensor)}
        assert tree["held"] < 1.5 / (fsdp * tensor)  # rows of a vocabulary are not a multiple of everything


@pytest.mark.parametrize("mesh", MESHES)
def test_the_flash_kernel_is_split_by_pictures_and_heads(eight_devices, mesh):
    with np.load(eight_devices / f"attended_{mesh}.npz") as file:
        found = list(file.values())
    expected = public_worker.attended("xla", sharding.make_mesh((1, 1, 1)), *public_worker.queries())
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
