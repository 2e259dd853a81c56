import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from personalize_jax.families import sources
from personalize_jax.method import finished
from personalize_jax.runtime import manifest
from personalize_jax.subject.class_noun import ClassNoun
from personalize_jax.subject.dataset import write_dataset
from personalize_jax.subject.identifier import Identifier
from personalize_jax.subject.images import load_images
from tests import tiny_world


@pytest.fixture
def run(pretrained, photos, tmp_path):
    """What a finished run leaves, as far as it tells that it is finished."""
    workdir, images = tmp_path / "run", load_images(photos, 16)
    config = tiny_world.get_config(pretrained)
    manifest.record_config(config, workdir)
    write_dataset(workdir / "subject", images, ClassNoun("dog", 1.0, "given"), Identifier("xii", (7,), (0,)), True)
    with manifest.record(workdir, {}, {"photos": [image.sha256 for image in images]}):
        manifest.record_files(workdir, pretrained="as they were")
        for name in finished.REPORT:
            (workdir / name).write_text(name)
    return workdir


@pytest.fixture
def is_finished(run, pretrained, photos, monkeypatch):
    monkeypatch.setattr(finished, "state_of", lambda folders: "as they were" if folders == [pretrained] else None)

    def told(images=photos, class_noun="dog", **changes):
        return finished.is_finished(str(images), class_noun, tiny_world.get_config(pretrained, **changes), run)

    return told


def test_a_finished_run_is_told_by_the_same_inputs_alone(run, is_finished, photos, tmp_path):
    assert is_finished() and is_finished(class_noun=None) and not is_finished(class_noun="cat")
    assert not is_finished(seed=1) and not is_finished(super_resolution_training__num_steps=7)
    others = shutil.copytree(photos, tmp_path / "photos")
    assert is_finished(others)
    (others / "1.png").write_bytes((others / "0.png").read_bytes())
    assert not is_finished(others)
    manifest.record_files(run, pretrained="otherwise")
    assert not is_finished()


def test_a_run_whose_report_or_last_call_is_not_complete_is_not_finished(run, is_finished):
    for name in finished.REPORT:
        (run / name).rename(run / "away")
        assert not is_finished()
        (run / "away").rename(run / name)
    assert is_finished()
    recorded = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(recorded | {"done": False}))
    assert not is_finished()


def test_a_finished_run_says_so_without_importing_networks(run, pretrained, photos, monkeypatch):
    monkeypatch.setattr(sources, "_RECENT", -(10**12))
    manifest.record_files(run, pretrained=sources.state_of([pretrained]))
    flags = [f"--config=tests/tiny_world.py:{pretrained}", f"--images={photos}", f"--workdir={run}"]
    program = f"""
import runpy, sys
from personalize_jax.families import sources
sources._RECENT = -(10**12)
sys.modules.update(dict.fromkeys(("flax", "transformers", "optax", "scipy", "matplotlib", "orbax.checkpoint")))
sys.argv = ["personalize", *{flags!r}]
runpy.run_module("personalize_jax.personalize", run_name="__main__", alter_sys=True)
"""
    root = Path(__file__).parents[2]
    said = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert "All is done" in said.stdout and str(run / "gallery.png") in said.stdout
