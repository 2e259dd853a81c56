"""The experiments that compare generators, as commands from end to end, on tiny ones that draw nothing."""

import csv
import json

import jax
import pytest
from PIL import Image

from experiments import another_generator
from personalize_jax.evaluation.scoring import read_rows
from personalize_jax.pipeline import save_pipeline
from tests import processes, tiny, tiny_autoregressive

SMALLEST = {"channels": (16,), "down_blocks": (0,), "up_blocks": (0,), "attention": (False,)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny cascade, the same with another base, and a tiny autoregressive model."""
    folder = tmp_path_factory.mktemp("generators")
    cascade = tiny.pipeline(resolution=32, **SMALLEST)
    save_pipeline(cascade, folder / "cascade")
    save_pipeline(cascade.replace_params(base=jax.tree.map(lambda p: p / 2, cascade.params["base"])), folder / "other")
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


@pytest.mark.slow
def test_pretrained_cascades_are_measured_alike_and_shown_side_by_side(folder, tmp_path):
    flags = f"--pipeline={folder / 'cascade'}", f"--against={folder / 'other'}", "--num_prompts=12"
    finished = processes.command(tmp_path, "experiments.pretrained_cascade", *flags, f"--out={tmp_path / 'out'}")
    assert finished.status == 0, finished.error
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    against = scores.pop("against")
    assert against.pop("pipeline") == str(folder / "other") and against.keys() == scores.keys()
    for measured in (scores, against):
        for stage in ("base", "super_resolution"):
            assert set(measured[stage]) == {"class_id", "context", "body_colour", "pattern where asked"}
            assert all(0 <= value <= 1 for value in measured[stage].values())
    assert scores["detail"] != against["detail"]
    sheets = {name: Image.open(tmp_path / "out" / f"{name}.png").size for name in ("base", "side_by_side")}
    assert sheets["side_by_side"][1] > 2 * sheets["base"][1]  # both stages, and twice as many pictures of each
