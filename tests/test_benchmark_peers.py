import dataclasses
import functools

import diffusers
import pytest
import torch

from experiments import benchmark_peers
from experiments.peers.cases import CASES
from tests import processes

TINY = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


@pytest.mark.slow
def test_a_missing_gpu_is_missed_before_anything_is_made(tmp_path):
    out = tmp_path / "out"
    refused = processes.command(tmp_path, "experiments.benchmark_peers", "--device=gpu", f"--out={out}")
    assert refused.status == 2 and not out.exists()
    *_, last = refused.error.strip().splitlines()
    assert last.startswith("error: --device=gpu, and JAX and torch found no GPU; give --device=cpu")


@pytest.mark.parametrize(("device", "name"), [(device, name) for device in CASES for name in CASES[device]])
def test_rates_are_pictures_by_the_fastest_step(device, name):
    """Every layout of diffusers takes a second more than the one before it, and each second round twice as long."""
    case, measured = CASES[device][name], {}
    for i, layout in enumerate(case.layouts):
        for phase in benchmark_peers.PHASES:
            run = {"seconds": 1.0 + i, "compile": 10.0, "peak": 2**30}
            measured[layout, phase] = [run, {"seconds": 2.0 + 2 * i, "compile": 1.0, "peak": 2**31}]
    found = benchmark_peers.summary(case, measured)
    first = case.layouts.index("diffusers")
    for phase, pictures in (("train", 2 * case.batch), ("sample", case.samples)):
        rates = found[phase]["pictures a second"]
        assert rates["ours"] == pictures and rates["diffusers"] == pytest.approx(pictures / (1 + first), abs=1e-3)
        assert found[phase]["ratio"] == 1 + first
        assert set(found[phase]["seconds of compiling"].values()) == {10.0}
        assert set(found[phase]["peak memory, GiB"].values()) == {2.0}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The GPU's case with a tiny network, and the folder of its weights."""
    (whole,) = CASES["gpu"].values()
    steps = {"batch": 2, "samples": 1, "train_steps": 2, "steps_per_dispatch": 1, "sampling_steps": 2}
    case = dataclasses.replace(whole, unet={**whole.unet, **TINY}, **steps)
    folder = tmp_path_factory.mktemp("weights")
    diffusers.UNet2DConditionModel.from_config(case.unet).save_pretrained(folder)
    return case, folder


@pytest.mark.slow
@pytest.mark.parametrize("phase", benchmark_peers.PHASES)
@pytest.mark.parametrize("layout", CASES["gpu"]["Stable Diffusion 1.5"].layouts)
def test_what_is_measured_on_a_gpu_runs(layout, phase, tiny, monkeypatch):
    # Where a test compiles is of no interest: with this backend torch traces the network and compiles nothing.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    case, weights = tiny
    found = benchmark_peers.measure(case, layout, phase, weights)
    assert set(found) == {"seconds", "compile", "peak"}
    assert 0 < found["seconds"] < 60 and found["peak"] > 2**20
