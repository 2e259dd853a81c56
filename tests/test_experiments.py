import importlib
from pathlib import Path

import numpy as np
import pytest

from experiments import heldout_subjects
from experiments.pretrained_cascade import prompt_grid
from personalize_jax.world.scene import CLASSES, COLOURS, CONTEXTS
from tests import processes

EXPERIMENTS = sorted(
    f"experiments.{file.stem}"
    for file in (Path(__file__).parent.parent / "experiments").glob("*.py")
    if file.stem != "__init__"
)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_asks_its_question_and_names_its_command(name):
    documentation = importlib.import_module(name).__doc__
    assert documentation.partition("\n")[0].split(". ")[0].rstrip(".").endswith("?") or "?" in documentation[:120]
    assert f"python -m {name} --" in documentation


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_explains_its_flags(name, tmp_path):
    finished = processes.command(tmp_path, name, "--help")
    assert finished.status in (0, 1) and "Traceback" not in finished.error
    documentation = importlib.import_module(name).__doc__
    assert documentation.split("?")[0] in finished.output + finished.error


def test_prompts_go_through_all_properties_evenly():
    prompts, truth = prompt_grid(200)
    sizes = {"class_ids": len(CLASSES), "contexts": len(CONTEXTS), "colours": len(COLOURS)}
    assert len(set(prompts)) == len(prompts) == 200
    for name, size in sizes.items():
        counts = np.bincount(truth[name], minlength=size)
        assert len(counts) == size and np.ptp(counts) <= 2
    for a, b in (("class_ids", "contexts"), ("class_ids", "colours"), ("contexts", "colours")):
        pairs = len(set(zip(truth[a].tolist(), truth[b].tolist(), strict=True)))
        assert pairs >= 0.9 * min(200, sizes[a] * sizes[b])


def test_prompts_say_the_truth():
    prompts, truth = prompt_grid(30)
    for i, text in enumerate(prompts):
        words = CLASSES[truth["class_ids"][i]], CONTEXTS[truth["contexts"][i]], tuple(COLOURS)[truth["colours"][i]]
        assert all(word in text for word in words)


def test_means_are_taken_score_by_score_and_tabled_with_blanks():
    subjects = [
        {"pretrained": {"leakage": 0.0}, "sampled": {"leakage": 0.25, "context": 1.0}},
        {"pretrained": {"leakage": 0.5}, "sampled": {"leakage": 0.75, "context": 0.5}},
    ]
    means = heldout_subjects.mean(subjects)
    assert means == {"pretrained": {"leakage": 0.25}, "sampled": {"leakage": 0.5, "context": 0.75}}
    rows = heldout_subjects.table(means).splitlines()
    assert rows[0] == "| | leakage | context |"
    assert rows[2:] == ["| pretrained | 0.25 |  |", "| sampled | 0.50 | 0.75 |"]


def test_enlarging_is_measured_on_the_object():
    """The middle of the picture is the object: there the enlarged views are off by a tenth of the range."""
    truth = np.zeros((8, 128, 128, 4), np.uint8)
    truth[:, 32:96, 32:96, 3] = 255
    enlarged = np.full((8, 128, 128, 3), 200, np.uint8)
    enlarged[:, 32:96, 32:96] = 26
    psnr = heldout_subjects.object_psnr(enlarged, truth)
    assert psnr == pytest.approx(-20 * np.log10(26 / 255))
