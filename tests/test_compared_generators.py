"""The experiments that compare generators, as commands from end to end, on tiny ones that draw nothing."""

import csv

import pytest
from PIL import Image

from experiments import another_generator
from personalize_jax.evaluation.scoring import read_rows
from personalize_jax.pipeline import save_pipeline
from tests import processes, tiny, tiny_autoregressive

SMALLEST = {"channels": (16,), "down_blocks": (0,), "up_blocks": (0,), "attention": (False,)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny cascade, and a tiny autoregressive model."""
    folder = tmp_path_factory.mktemp("generators")
    cascade = tiny.pipeline(resolution=32, **SMALLEST)
    save_pipeline(cascade, folder / "cascade")
    save_pipeline(tiny_autoregressive.pipeline(), folder / "autoregressive")
    return folder


def compare(folder, workdir, *flags):
    return processes.command(
        workdir.parent,
        "experiments.another_generator",
        f"--config=tests/tiny_world.py:{folder / 'cascade'}",
        f"--other=tests/tiny_autoregressive.py:{folder / 'autoregressive'}",
        f"--workdir={workdir}",
        "--quick",
        *flags,
    )


@pytest.mark.slow
def test_both_generators_are_personalised_and_scored_alike(folder, tmp_path):
    workdir = tmp_path / "runs"
    finished = compare(folder, workdir, "--num_subjects=1", "--arms=cascade,autoregressive", "--delete_weights")
    assert finished.status == 0, finished.error
    text = (workdir / "another_generator" / "tables.md").read_text()
    assert text in finished.output
    for arm in another_generator.GENERATORS:
        assert f"| {arm} |" in text
        rows = read_rows(workdir / arm / "dog_0" / "evaluation" / "rows.jsonl")
        assert [sum(row.role == role for row in rows) for role in ("photo", "subject", "class")] == [5, 25 * 2, 4]
        assert not [*(workdir / arm).rglob("trained.safetensors"), *(workdir / arm).rglob("checkpoints")]
    assert "| cascade shows the subject better | DINO |" in text
    scored = list(csv.DictReader((workdir / "another_generator" / "subjects.csv").open()))
    assert {row["arm"] for row in scored} == set(another_generator.GENERATORS)
    pictures = [next((workdir / arm / "dog_0" / "evaluation" / "subject").glob("*.png")) for arm in ("cascade",)]
    assert [Image.open(picture).size for picture in pictures] == [(32, 32)]  # of the base, not of the last stage
    again = compare(folder, workdir, "--num_subjects=1", "--arms=cascade,autoregressive")
    assert again.status == 0 and again.output == finished.output


def test_an_arm_of_neither_generator_is_refused(folder, tmp_path):
    refused = compare(folder, tmp_path / "runs", "--arms=cascade,diffusion")
    assert refused.status == 2 and "--arms names diffusion; the arms are cascade, cascade_sampled," in refused.error
    assert not (tmp_path / "runs").exists()
