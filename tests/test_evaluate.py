"""The command, as it is typed."""

import importlib
import re

import numpy as np
import pytest

from personalize_jax.evaluation.scoring import read_rows
from personalize_jax.method.changes import changed
from personalize_jax.method.personalization import load_subject, personalize_subject
from personalize_jax.pipeline import load_pipeline, save_pipeline
from personalize_jax.pipeline.pictures import save_png
from personalize_jax.runtime import manifest
from personalize_jax.runtime.errors import UserError
from tests import processes, tiny, tiny_world
from tests.metric_encoders import plain


def evaluate(folder, *flags):
    return processes.command(folder, "personalize_jax.evaluate", *flags)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny cascade, photos of two subjects, three pictures and their prompts, and a run."""
    folder = tmp_path_factory.mktemp("evaluate")
    smallest = {"channels": (16,), "down_blocks": (0,), "up_blocks": (0,), "attention": (False,)}
    save_pipeline(tiny.pipeline(resolution=16, **smallest), folder / "tiny")
    for name in ("photos/rex/0.png", "photos/tom/0.png", "pictures/a.png", "pictures/b.png", "pictures/c.png"):
        noise = np.random.default_rng(len(name)).integers(0, 60, (64, 64, 3), np.uint8)
        save_png(plain("blue" if name == "pictures/c.png" else "red", 64) // 2 + noise, folder / name, {})
    lines = ["file,prompt,subject", "a.png,a [V] dog in the snow,rex", "b.png,a [V] dog in the snow,rex"]
    (folder / "prompts.csv").write_text("\n".join([*lines, "c.png,a red [V] car,tom"]))
    return folder


@pytest.fixture(scope="module")
def run(folder):
    steps = {"training__num_steps": 3, "super_resolution_training__num_steps": 3}
    config = tiny_world.get_config(folder / "tiny", evaluation__probe=True, **steps)
    photos = load_subject(folder / "photos" / "rex", "dog", 32)
    personalize_subject(load_pipeline(str(folder / "tiny")), photos, config, folder / "run")
    return folder / "run"


def test_pictures_of_a_folder_become_rows_and_tables(folder, tmp_path):
    finished = evaluate(
        tmp_path,
        f"--config=tests/tiny_world.py:{folder / 'tiny'}",
        "--config.evaluation.probe=true",
        f"--images={folder / 'pictures'}",
        f"--prompts={folder / 'prompts.csv'}",
        f"--photos={folder / 'photos'}",
        f"--out={tmp_path / 'scores'}",
    )
    assert finished.status == 0, finished.error
    rows = read_rows(tmp_path / "scores" / "rows.jsonl")
    assert [(row.subject, row.role, row.file) for row in rows] == [
        ("rex", "photo", "0.png"),
        ("rex", "subject", "a.png"),
        ("rex", "subject", "b.png"),
        ("tom", "photo", "0.png"),
        ("tom", "subject", "c.png"),
    ]
    assert {"DINO", "CLIP-I", "CLIP-T", "DIV", "class", "context"} <= rows[1].scores.keys()
    assert "property" in rows[4].scores and "DIV" not in rows[4].scores
    table = (tmp_path / "scores" / "table.md").read_text()
    assert table in finished.output
    (blue,) = (row.scores["DINO"] for row in rows if row.file == "c.png")
    assert re.search(rf"^\| DINO \| .* \(.*\), worst {f'{blue:.3f}'.lstrip('0')} \|$", table, re.MULTILINE)
    assert (tmp_path / "scores" / "table.csv").read_text().startswith("row,metric,mean,low,high,worst,")


def test_a_run_is_drawn_from_scored_and_then_only_read(folder, run, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a [V] {} in the snow\na red [V] {}\n")
    flags = [f"--workdir={run}", f"--config=tests/tiny_world.py:{folder / 'tiny'}"]
    flags += ["--config.evaluation.probe=true", f"--config.evaluation.prompts={prompts}"]
    finished = evaluate(tmp_path, *flags)
    assert finished.status == 0, finished.error
    rows = read_rows(run / "evaluation" / "rows.jsonl")
    assert [row.role for row in rows] == ["photo"] + ["subject"] * 4 + ["class"] * 3 + ["class before"] * 3
    assert {row.subject for row in rows} == {"run"}
    pictures = {file: file.stat().st_mtime_ns for file in (run / "evaluation").rglob("*.png")}
    assert len(pictures) == 10
    again = evaluate(tmp_path, *flags)
    assert again.output == finished.output
    assert pictures == {file: file.stat().st_mtime_ns for file in (run / "evaluation").rglob("*.png")}


def test_encoders_of_all_runs_are_found_before_any_picture_is_drawn(run, monkeypatch):
    command = importlib.import_module("personalize_jax.evaluate")
    good = manifest.read_config(run)
    monkeypatch.setattr(command, "evaluate", lambda *_, **__: pytest.fail("drawing was begun"))
    for key, value in (("dino", "nowhere"), ("clips", ("world", "nowhere")), ("lpips", "nowhere")):
        bad = changed(good, **{f"evaluation__{key}": value})
        with pytest.raises(UserError, match="'nowhere' is no"):
            command.score_runs({run: good, run.parent / "other": bad}, None)


def test_a_run_from_before_a_key_is_evaluated_without_what_the_key_asks_for(run, tmp_path, caplog):
    (tmp_path / "prompts.txt").write_text("a [V] {} in the snow\n")
    old = changed(manifest.read_config(run), evaluation__prompts=str(tmp_path / "prompts.txt")).unlock()
    old.evaluation.update(class_samples=1, images_per_prompt=1, judge="somebody")
    del old.evaluation.probe, old.evaluation.clips
    command = importlib.import_module("personalize_jax.evaluate")
    rows = command.score_runs({run: old}, None)
    assert [row.scores.keys() for row in rows] == [set(), {"DINO"}, {"PRES"}, {"PRES before"}]
    told = " ".join(record.getMessage() for record in caplog.records)
    assert f"{run} was begun before config.evaluation had clips=(), probe=False; give --config" in told
    assert f"{run} has config.evaluation.judge, which nothing reads any more" in told
    old.evaluation.dino, old.evaluation.lpips = "", ""
    with pytest.raises(UserError, match="names nothing to measure with; give dino, clips, lpips or probe"):
        command.score_runs({run: old}, None)
    del old.evaluation
    with pytest.raises(UserError, match="begun without `evaluation` keys in its configuration; give --config"):
        command.score_runs({run: old}, None)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "Give either --workdir (personalised runs) or --images"),
        (["--workdir=a", "--images=b"], "Give either --workdir (personalised runs) or --images"),
        (["--images=pictures"], "need --images, --prompts, --photos, --config and --out, all five"),
        (["--workdir=a", "--workdir=b"], "say by --out where it goes"),
        (["--workdir=a/rex", "--workdir=b/rex", "--out=c"], "Two runs have the same name"),
        (["--workdir=nowhere"], "nowhere is no run directory"),
        (
            ["--workdir=nowhere", "--config=configs/world.py", "--config.evaluation.clips=('',)"],
            "config.evaluation.clips is ('',); give folders, or names on the hub, of a CLIP each",
        ),
        (["--workdir=nowhere", "--config=configs/pretrain_world.py:base"], "no `evaluation` keys"),
    ],
)
def test_what_cannot_be_evaluated(flags, sentence, tmp_path):
    finished = evaluate(tmp_path, *flags)
    assert finished.status == 2
    assert sentence in finished.error.strip().splitlines()[-1]
