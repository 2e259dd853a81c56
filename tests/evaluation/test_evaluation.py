import dataclasses
import json

import numpy as np
import pytest
from ml_collections import ConfigDict

from personalize_jax.evaluation import metric_registry
from personalize_jax.evaluation.protocol import evaluate, read_pictures, read_scored, sample_role
from personalize_jax.evaluation.scoring import summary
from personalize_jax.method.personalized import Personalized
from personalize_jax.pipeline.pictures import read_png, save_png
from personalize_jax.runtime.errors import UserError
from personalize_jax.subject.class_noun import ClassNoun
from personalize_jax.subject.dataset import SubjectDataset
from personalize_jax.subject.identifier import Identifier
from tests import tiny
from tests.metric_encoders import BRIGHTNESS, metric_encoders, plain

JOBS = [("a [V] dog", 0), ("a [V] dog", 1), ("a [V] dog in the snow", 0)]
SETTINGS = ConfigDict({"images_per_prompt": 2, "class_samples": 3, "batch_size": 4})


class Counting:
    """A pipeline that counts what it draws."""

    def __init__(self, pipeline):
        self.pipeline, self.tokenizer, self.drawn = pipeline, pipeline.tokenizer, []

    def sample(self, prompts, seeds, batch_size, full_batches):
        assert full_batches  # or what is missing would be drawn in batches of other sizes, which round otherwise
        self.drawn += zip(prompts, seeds, strict=True)
        return self.pipeline.sample(prompts, seeds, batch_size, full_batches=True)


@pytest.fixture(scope="module")
def pipeline():
    return tiny.pipeline()


@pytest.fixture(scope="module")
def personalized(pipeline):
    photos = np.stack([plain("red", 16), plain("green", 16)])
    subject = SubjectDataset(photos, ("a qx dog",) * 2, ClassNoun("dog", 1.0, "given"), Identifier("qx", (7,), (0,)))
    denoiser = {name: dict(of) for name, of in pipeline.params["base"].items()}
    first = next(iter(denoiser))
    leaf = next(iter(denoiser[first]))
    denoiser[first][leaf] = np.asarray(denoiser[first][leaf]) * 1.5
    return Personalized(pipeline.replace_params(base=denoiser), subject)


def test_only_what_is_missing_is_drawn(pipeline, tmp_path):
    counting = Counting(pipeline)
    pictures = sample_role(counting, "subject", JOBS, "0123", "qx", tmp_path / "subject", 2)
    assert counting.drawn == [("a qx dog", 0), ("a qx dog", 1), ("a qx dog in the snow", 0)]
    assert [(p.prompt, p.seed) for p in pictures] == JOBS
    (tmp_path / pictures[1].file).unlink()
    again = sample_role(counting, "subject", JOBS, "0123", "qx", tmp_path / "subject", 2)
    assert counting.drawn[3:] == [("a qx dog", 1)]
    for before, after in zip(pictures, again, strict=True):
        np.testing.assert_array_equal(before.pixels, after.pixels)


def test_pictures_of_other_weights_are_drawn_again(pipeline, tmp_path):
    counting = Counting(pipeline)
    sample_role(counting, "subject", JOBS, "0123", "qx", tmp_path / "subject", 2)
    sample_role(counting, "subject", JOBS, "4567", "qx", tmp_path / "subject", 2)
    assert len(counting.drawn) == 6
    assert read_png(next((tmp_path / "subject").glob("*.png")))[1]["weights"] == "4567"


def test_progress_counts_pictures_found_and_drawn(pipeline, tmp_path):
    sample_role(pipeline, "subject", JOBS[:1], "0123", "qx", tmp_path / "subject", 2)
    done = []
    sample_role(pipeline, "subject", JOBS, "0123", "qx", tmp_path / "subject", 2, done.append)
    assert done == [1, 2]


def test_fingerprints_tell_weights_and_samplings_apart(pipeline, personalized):
    assert pipeline.fingerprint == tiny.pipeline().fingerprint
    sampling = pipeline.stages[0].sampling._replace(num_steps=9)
    others = {p.fingerprint for p in (pipeline, personalized.pipeline, pipeline.replace_sampling(base=sampling))}
    assert len(others) == 3


def test_evaluation_has_a_row_for_every_picture_and_is_not_done_twice(pipeline, personalized, tmp_path):
    prompts = ["a [V] dog in the snow", "a red [V] dog"]
    arguments = (personalized, pipeline, "rex", prompts, metric_encoders(), SETTINGS, tmp_path)
    rows = evaluate(*arguments)
    counts = {role: sum(row.role == role for row in rows) for role in ("photo", "subject", "class", "class before")}
    assert counts == {"photo": 2, "subject": 4, "class": 3, "class before": 3}
    assert all((tmp_path / row.file).is_file() for row in rows if row.role != "photo")
    of_class = {role: [row.seed for row in rows if row.role == role] for role in ("class", "class before")}
    assert of_class["class"] == of_class["class before"]

    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.*")}
    assert evaluate(*arguments) == rows
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.*")} == before
    more = evaluate(personalized, pipeline, "rex", [*prompts, "a [V] dog"], metric_encoders(), SETTINGS, tmp_path)
    assert len(more) == len(rows) + 2


def test_a_metric_that_came_later_is_added_without_drawing_again(pipeline, personalized, tmp_path, monkeypatch):
    arguments = (personalized, pipeline, "rex", ["a [V] dog"], metric_encoders(), SETTINGS, tmp_path)
    before = evaluate(*arguments)
    monkeypatch.setattr(metric_registry, "METRICS", (*metric_registry.METRICS, BRIGHTNESS))
    drawn = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.png")}
    after = evaluate(*arguments)
    assert drawn == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.png")}
    for old, new in zip(before, after, strict=True):
        scores = dict(new.scores)
        assert (scores.pop("brightness", None) is not None) == (new.role == "subject")
        assert old == new._replace(scores=scores)
    monkeypatch.undo()
    assert evaluate(*arguments) == before

    dino, *others = metric_registry.METRICS
    other = dataclasses.replace(dino, version=2, score=lambda subject, rows, dino: [0.5] * len(rows))
    monkeypatch.setattr(metric_registry, "METRICS", (other, *others))
    assert {row.scores["DINO"] for row in evaluate(*arguments) if row.role == "subject"} == {0.5}


def test_scored_rows_are_read_only_for_the_same_keys_and_metrics(pipeline, personalized, tmp_path, monkeypatch):
    settings = ConfigDict({**SETTINGS, "dino": "world", "clips": (), "lpips": "", "probe": False})
    encoders = {name: metric_encoders()[name] for name in ("dino", "distance")}
    assert read_scored(tmp_path, settings) is None
    rows = evaluate(personalized, pipeline, "rex", ["a [V] dog"], encoders, settings, tmp_path)
    assert read_scored(tmp_path, settings) == rows
    for other in ({"class_samples": 2}, {"clips": ("world",)}):
        assert read_scored(tmp_path, ConfigDict({**settings, **other})) is None
    newer = [dataclasses.replace(metric, version=99) for metric in metric_registry.METRICS]
    monkeypatch.setattr(metric_registry, "METRICS", newer)
    assert read_scored(tmp_path, settings) is None


def test_a_metric_that_is_derived_from_others_asks_for_no_new_scores(pipeline, personalized, tmp_path, monkeypatch):
    arguments = (personalized, pipeline, "rex", ["a [V] dog"], metric_encoders(), SETTINGS, tmp_path)
    rows = evaluate(*arguments)
    derived = dataclasses.replace(BRIGHTNESS, roles=(), score=None, derive=lambda metrics: metrics["DINO"] / 2)
    monkeypatch.setattr(metric_registry, "METRICS", (*metric_registry.METRICS, derived))
    written = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.*")}
    assert evaluate(*arguments) == rows
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.*")} == written
    assert summary(rows)["rex"]["brightness"] == summary(rows)["rex"]["DINO"] / 2
    # Records of the time when derived metrics were among those that a record names.
    record = json.loads((tmp_path / "evaluation.json").read_text())
    record["definitions"]["brightness"] = 1
    (tmp_path / "evaluation.json").write_text(json.dumps(record))
    written = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.*")}
    assert evaluate(*arguments) == rows
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.*")} == written


def test_prompts_must_ask_for_the_subject(pipeline, personalized, tmp_path):
    with pytest.raises(UserError, match=r"'a dog' has no \[V\]"):
        evaluate(personalized, pipeline, "rex", ["a dog"], metric_encoders(), SETTINGS, tmp_path)


@pytest.fixture
def folders(tmp_path):
    """Pictures a.png and b.png, photos of two subjects."""
    for name in ("pictures/a.png", "pictures/b.png", "photos/rex/0.png", "photos/tom/0.png"):
        save_png(plain("red"), tmp_path / name, {})
    return tmp_path


def listed(folder, *lines):
    (folder / "prompts.csv").write_text("\n".join(lines) + "\n")
    return folder / "pictures", folder / "prompts.csv", folder / "photos"


def test_pictures_from_elsewhere_are_read_by_subject(folders):
    arguments = listed(folders, "file,prompt,subject", "a.png,a [V] dog,rex", 'b.png,"a cat, asleep",tom')
    by_subject = read_pictures(*arguments)
    assert {s: [p.role for p in pictures] for s, pictures in by_subject.items()} == {
        "rex": ["photo", "subject"],
        "tom": ["photo", "class"],
    }
    assert by_subject["tom"][1].prompt == "a cat, asleep"


def test_one_subject_needs_no_column(folders):
    images, prompts, photos = listed(folders, "file,prompt", "a.png,a [V] dog")
    assert list(read_pictures(images, prompts, photos / "rex")) == ["rex"]


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (["file,prompt"], "lists no pictures"),
        (["file,prompt", "a.png,"], "Line 2 .* lacks a file or a prompt"),
        (["name,prompt", "a.png,a [V] dog"], "Line 2 .* lacks a file or a prompt"),
        (["file,prompt", "a.png,a dog"], r"No prompt of .* has \[V\]"),
        (["file,prompt,subject", "../photos/rex/0.png,a [V] dog,rex"], "lies outside"),
        (["file,prompt,subject", "a.png,a [V] dog,../pictures"], "lies outside"),
        (["file,prompt,subject", "missing.png,a [V] dog,rex"], "missing.png does not exist"),
        (["file,prompt,subject", "a.png,a [V] dog,nobody"], "nobody does not exist"),
    ],
)
def test_lists_that_cannot_be_used_are_refused(folders, lines, complaint):
    with pytest.raises(UserError, match=complaint):
        read_pictures(*listed(folders, *lines))


def test_unreadable_pictures_are_named(folders):
    arguments = listed(folders, "file,prompt,subject", "a.png,a [V] dog,rex")
    (folders / "pictures" / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"a\.png is not a JPEG, PNG or WebP"):
        read_pictures(*arguments)
    with pytest.raises(UserError, match="cannot be read as CSV"):
        read_pictures(folders, folders / "none.csv", folders)
