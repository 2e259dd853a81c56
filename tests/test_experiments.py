import importlib
from pathlib import Path

import numpy as np
import pytest

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
