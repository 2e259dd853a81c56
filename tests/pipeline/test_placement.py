"""Public models on eight virtual devices: in parts where they lie, whole where they draw, and never there twice."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from configs import stable_diffusion
from personalize_jax.method.personalized import load_personalized, load_placed
from personalize_jax.pipeline import load_pipeline
from personalize_jax.runtime import manifest
from personalize_jax.runtime.errors import UserError
from personalize_jax.subject.class_noun import ClassNoun
from personalize_jax.subject.dataset import write_dataset
from personalize_jax.subject.identifier import Identifier
from personalize_jax.subject.images import from_pixels
from personalize_jax.training.trained import Trained, save_trained
from tests import tiny_public
from tests.pipeline import placed_worker

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_public.save_all(tmp_path_factory.mktemp("public"))


@pytest.fixture(scope="module")
def run(folder):
    """A run directory whose cascade is Stable Diffusion's, as it would be after tuning on a slice."""
    config = stable_diffusion.get_config("1.5").unlock()
    config.pretrained, config.compute.attention = str(folder / "sd"), "heads"
    workdir = folder / "run"
    manifest.record_config(config, workdir)
    denoiser = load_pipeline(folder / "sd").params["base"]
    save_trained(Trained({"denoiser": denoiser}, config.training.num_steps, None), workdir / "base")
    photo = from_pixels("0", np.zeros((16, 16, 3), np.uint8), 16)
    write_dataset(workdir / "subject", [photo], ClassNoun("dog", 1.0, "given"), Identifier("qz", (7,), (0,)), True)
    return workdir


@pytest.fixture(scope="module")
def eight_devices(run, folder, tmp_path_factory):
    """What a process with eight devices finds, and the pictures that it draws."""
    directory = tmp_path_factory.mktemp("eight_devices")
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.pipeline.placed_worker", str(run), str(folder), str(directory)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return json.loads((directory / "found.json").read_text()), np.load(directory / "pictures.npy")


@pytest.mark.slow
def test_a_tuned_model_lies_in_parts_and_computes_as_its_run_does(eight_devices, run):
    found, pictures = eight_devices
    for name, of_network in found["tuned"]["shares"].items():
        assert of_network and max(of_network) <= 1 / 2, name
    assert found["tuned"]["shares"]["base"] == [1 / 8]
    assert found["tuned"]["dtype"] == "bfloat16"
    alone = placed_worker.few_steps(load_personalized(run).pipeline)
    assert alone.stages[0].network.attention == "heads"
    expected = alone.sample_stage(alone.stages[0], placed_worker.PROMPTS, placed_worker.SEEDS).astype(int)
    others = np.roll(expected, 1, axis=0)
    assert 5 * np.abs(pictures - expected).mean() < np.abs(pictures - others).mean()  # sums in bfloat16


@pytest.mark.slow
def test_a_pretrained_model_without_a_configuration_lies_in_parts_too(eight_devices):
    found, _ = eight_devices
    assert found["bare"]["shares"]["base"] == [1 / 8] and found["bare"]["dtype"] == "bfloat16"


@pytest.mark.slow
def test_parts_are_gathered_once_a_batch_not_in_every_step(eight_devices):
    exchanged = eight_devices[0]["exchanged"]
    assert "all-gather" not in exchanged["in_loop"]
    assert exchanged["gathered"] >= 0.9 * exchanged["in_parts"]


@pytest.mark.slow
def test_stages_tuned_on_different_meshes_leave_what_is_frozen_where_it_lies(eight_devices):
    frozen = eight_devices[0]["frozen"]
    assert frozen["meshes"] == [[1, 8, 1], [1, 4, 2]]
    assert frozen["copied"] == []


def test_a_run_can_be_sampled_on_other_devices_than_its_mesh_was_written_for(run, folder):
    elsewhere = run.parent / "elsewhere"
    config = manifest.read_config(run)
    config.training.mesh = (4, 2, 1)
    manifest.record_config(config, elsewhere)
    for part in ("base", "subject"):
        (elsewhere / part).symlink_to(run / part)
    pipeline = load_personalized(elsewhere).pipeline
    assert pipeline.stages[0].network.attention == "heads"
    with pytest.raises(UserError, match=r"config.mesh is .*4, 2, 1"):
        load_placed(folder / "sd", config)


@pytest.mark.slow
def test_a_checkpoint_is_put_into_a_cascade_in_parts(folder, tmp_path):
    """As where a run on several chips is exported before its end."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    call = f"tune_from_checkpoint(Path({str(folder)!r}), Path({str(tmp_path)!r}))"
    program = f"from pathlib import Path; from tests.pipeline.placed_worker import tune_from_checkpoint; {call}"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True)
