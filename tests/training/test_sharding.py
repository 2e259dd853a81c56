import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from configs import common, pretrain_world, world
from personalize_jax.families.world import read_stage
from personalize_jax.models.text_encoder import TextEncoder
from personalize_jax.runtime import sharding
from personalize_jax.runtime.errors import UserError
from personalize_jax.training.step import init_state
from tests.training import worker

ROOT = Path(__file__).parents[2]
MESH = AbstractMesh((2, 2, 2), sharding.AXES)
RULES = (("kernel", ("tensor", "fsdp")), ("embedding", (None, "tensor")))


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, np.float32)


def spec_of(name, leaf, rules=RULES):
    return sharding.shardings({"layer": {name: leaf}}, rules, MESH)["layer"][name].spec


def test_rules_name_axes_from_the_last_dimension_backwards():
    assert spec_of("kernel", shape(6, 4)) == P("fsdp", "tensor")
    assert spec_of("kernel", shape(3, 3, 6, 4)) == P(None, None, "fsdp", "tensor")
    assert spec_of("embedding", shape(6, 4)) == P("tensor", None)


def test_a_dimension_that_its_axis_does_not_divide_stays_whole():
    assert spec_of("kernel", shape(6, 3)) == P("fsdp", None)


def test_small_leaves_need_no_rule_and_others_do():
    assert spec_of("bias", shape(4)) == P()
    with pytest.raises(UserError, match="layer/other.*no rule"):
        spec_of("other", shape(4, 4))


def test_moments_and_average_lie_where_their_parameters_do():
    params = {"layer": {"kernel": shape(6, 4)}}
    state = jax.eval_shape(lambda p: init_state(p, optax.adam(0.1), jax.random.key(0), ema=True), params)
    placed = sharding.shardings(state, RULES, MESH)
    moments = optax.tree_utils.tree_get(placed.opt_state, "mu")
    expected = placed.params["layer"]["kernel"]
    assert expected.spec == P("fsdp", "tensor")
    assert placed.ema["layer"]["kernel"] == moments["layer"]["kernel"] == expected


def test_mesh_sizes_multiply_to_the_devices():
    assert sharding.make_mesh((-1, 1, 1)).shape == {"data": 1, "fsdp": 1, "tensor": 1}
    with pytest.raises(UserError, match=r"\(2, 2, 1\).*1 devices.*multiply"):
        sharding.make_mesh((2, 2, 1))


STAGES = {"base": common.base_stage, "super_resolution": common.super_resolution_stage}


@pytest.mark.parametrize("name", STAGES)
def test_every_parameter_matches_the_rules_of_every_configuration(name):
    stage = read_stage(STAGES[name]().to_dict())
    encoder = TextEncoder(vocab_size=8000, **pretrain_world.get_config("base").text_encoder)
    key = jax.random.key(0)
    cond = np.zeros((1, 1, encoder.width)), np.ones((1, 1), bool)
    params = {
        "denoiser": jax.eval_shape(lambda: stage.init_params(key, cond)),
        "text_encoder": jax.eval_shape(lambda: encoder.init(key, np.ones((1, 32), np.int32))["params"]),
    }
    personalization = world.get_config()
    tunings = {"base": personalization.training, "super_resolution": personalization.super_resolution_training}
    for config in (pretrain_world.get_config(name).training, tunings[name]):
        for path, placed in flatten_dict(sharding.shardings(params, config.sharding, MESH), sep="/").items():
            leaf = flatten_dict(params, sep="/")[path]
            if leaf.size > 1000 and leaf.ndim > 1:
                assert placed.spec != P(*[None] * leaf.ndim), f"{path} of {leaf.shape} is whole on every device"


@pytest.fixture(scope="module")
def eight_devices(request, tmp_path_factory):
    """What a process with eight virtual devices found on the meshes that are asked for, see `worker`."""
    here = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    asked = [mesh for mesh in worker.MESHES if {"mesh": mesh} in here]
    directory = tmp_path_factory.mktemp("eight_devices")
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    command = [sys.executable, "-m", "tests.training.worker", "use_eight_devices", str(directory), *asked]
    subprocess.run(command, cwd=ROOT, env=environment, timeout=1800, check=True)
    return directory


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("personalize_jax.training.program.make_optimizer", None)  # put back after the worker's change
        return worker.train_by_sgd(tmp_path_factory.mktemp("one_device")).params


@pytest.mark.slow
@pytest.mark.parametrize("mesh", worker.MESHES)
def test_eight_devices_train_the_parameters_that_one_trains(eight_devices, one_device, mesh):
    with np.load(eight_devices / f"{mesh}.npz") as file:
        params = dict(file)
    expected, start = flatten_dict(one_device, sep="/"), flatten_dict(worker.start(), sep="/")
    assert params.keys() == expected.keys()
    for path, value in params.items():
        np.testing.assert_allclose(value, expected[path], rtol=0, atol=1e-5, err_msg=path)
    moved = max(float(abs(expected[path] - start[path]).max()) for path in expected)
    assert moved > 0.01  # a thousand times the tolerance


@pytest.mark.slow
def test_what_only_several_devices_show(eight_devices):
    seen = json.loads((eight_devices / "seen.json").read_text())
    assert "batch_size is 4 and the mesh splits it 8 ways" in seen["refusal"] and not seen["refused_wrote"]
    assert np.prod(seen["kernel_shape"]) == 4 * np.prod(seen["kernel_shard"])  # over fsdp and tensor
    eighth, whole = [2, 4], [16, 4]
    assert seen["shards"] == {"stored": eighth, "gathered": whole, "gradient": eighth, "batch": eighth}
    assert seen["pictures"] == {"instance": 6, "prior": 1}  # eight devices share out eight pictures, but not six
    for collective in ("all-gather", "all-to-all", "all-reduce", "collective-permute"):
        assert collective not in seen["interleave"], "joining the groups moves rows between devices"
