import dataclasses
from pathlib import Path

import numpy as np
import pytest

from configs import common, world
from experiments import tables
from launch import sweep
from launch.sweep_points import Point
from launch.sweep_table import Result, markdown, plot, ranked
from personalize_jax.evaluation import metric_registry, scoring
from personalize_jax.evaluation.scoring import encoder_names, find_encoders, load_encoders, score, summary
from personalize_jax.evaluation.showcase import exact_scores
from personalize_jax.method.changes import changed
from personalize_jax.metrics.metric import Picture
from personalize_jax.metrics.similarity import Estimate
from personalize_jax.metrics.table import entries
from personalize_jax.runtime.errors import UserError
from personalize_jax.subject.class_noun import ClassNoun
from personalize_jax.subject.dataset import SubjectDataset
from personalize_jax.subject.identifier import Identifier
from personalize_jax.world.photos import heldout_subject
from tests.metric_encoders import BRIGHTNESS, metric_encoders, plain

ROOT = Path(__file__).parents[2]
EVERY = metric_registry.METRICS
ENCODERS = {"dino", "clip", "distance", "probe"}


@pytest.fixture
def brightness(monkeypatch):
    """One more metric."""
    monkeypatch.setattr(metric_registry, "METRICS", (*EVERY, BRIGHTNESS))


def pictures_of(*colours):
    """Photos, and pictures of the subject and of its class."""
    photos = [Picture("photo", "", None, f"{i}.png", plain("red")) for i in range(2)]
    prompts = {"subject": "a [V] dog", "class": "a dog"}
    return photos + [Picture(role, prompts[role], i, "", plain(c)) for role in prompts for i, c in enumerate(colours)]


def table_of(rows):
    """A table of one arm."""
    return {"arm": entries(summary(rows), metric_registry.better)}


@pytest.mark.parametrize("metric", EVERY, ids=lambda metric: metric.name)
def test_every_metric_says_what_it_is(metric):
    assert metric.definition and metric.unit and metric.better in ("higher", "lower", None)
    assert set(metric.needs) <= ENCODERS
    assert bool(metric.roles) == (metric.score is not None) == (metric.derive is None)
    assert metric.section or metric.table != "similarity"


def test_names_are_not_shared():
    assert len({metric.name for metric in EVERY}) == len(EVERY)
    assert [metric_registry.column_metric(metric.name) for metric in EVERY] == list(EVERY)


@pytest.mark.parametrize(
    ("column", "name"),
    [
        ("CLIP-I (large) (real)", "CLIP-I"),
        ("PRES before", "PRES"),
        ("is subject before", "is subject"),
        ("DINO (real)", "DINO"),
        ("view PSNR", None),
    ],
)
def test_columns_are_of_metrics(column, name):
    metric = metric_registry.column_metric(column)
    assert (metric and metric.name) == name


def test_which_way_of_a_column_is_better():
    columns = "CLIP-I (large) (real)", "PRES before", "colours", "view PSNR"
    assert [metric_registry.better(column) for column in columns] == ["higher", "lower", None, None]


def test_metrics_without_their_encoder_are_left_out():
    def names(**changes):
        settings = changed(world.get_config(), **changes).evaluation
        return [metric.name for metric in metric_registry.metrics_for(encoder_names(settings))]

    assert names() == [metric.name for metric in EVERY]
    without_probe = names(evaluation__probe=False)
    assert without_probe == ["DINO", "CLIP-I", "CLIP-T", "PRES", "DIV"]
    assert names(evaluation__probe=False, evaluation__clips=()) == ["DINO", "PRES", "DIV"]
    assert names(evaluation__probe=False, evaluation__dino="") == ["CLIP-I", "CLIP-T"]
    assert names(evaluation__probe=False, evaluation__dino="", evaluation__lpips="lpips")[-1] == "DIV"
    assert names(evaluation__clips=("world", "models/large"))[:5] == [
        *("DINO", "CLIP-I", "CLIP-I (large)", "CLIP-T", "CLIP-T (large)")
    ]
    rows = score({"dino": metric_encoders()["dino"]}, "rex", pictures_of("red", "blue"))
    text = tables.tables(table_of(rows), {"DreamBooth": {"DINO": 0.668, "CLIP-T": 0.305}}, 1)
    assert [line for line in text.splitlines() if line.startswith("| |")] == ["| | DINO | PRES |"]


def test_what_a_configuration_names_is_loaded():
    settings = world.get_config().evaluation
    loaded = load_encoders(find_encoders(settings))
    assert set(loaded) == set(encoder_names(settings)) == ENCODERS
    assert set(encoder_names(common.public("").evaluation)) == {*ENCODERS - {"probe"}, "clip (clip-vit-large-patch14)"}


def test_a_registered_encoder_reads_pictures_from_each_source_that_is_named(monkeypatch):
    def find(source):
        return lambda: lambda picture: picture.mean() + len(source)

    def score_by(subject, rows, eye):
        return [eye(subject.pictures[i].pixels) for i in rows]

    metric = dataclasses.replace(BRIGHTNESS, needs=("eye",), score=score_by)
    monkeypatch.setattr(metric_registry, "METRICS", (*EVERY, metric))
    monkeypatch.setattr(scoring, "ENCODERS", scoring.ENCODERS | {"eye": scoring.Encoder("eyes", find)})
    settings = changed(
        world.get_config(), evaluation__dino="", evaluation__clips=(), evaluation__probe=False
    ).evaluation
    with settings.unlocked():
        settings.eyes = ("a/b", "models/human")
    encoders = load_encoders(find_encoders(settings))
    assert list(encoders) == encoder_names(settings) == ["eye", "eye (human)"]
    (row,) = [row for row in score(encoders, "rex", pictures_of("red")) if row.role == "subject"]
    assert row.scores == {"brightness": 85 + 3, "brightness (human)": 85 + 12}


def test_a_registered_metric_is_in_rows_tables_and_definitions(brightness):
    encoders = metric_encoders()
    rows = score(encoders, "rex", pictures_of("red", "blue"))
    assert [row.scores.get("brightness") for row in rows] == [None] * 2 + [pytest.approx(1 / 3)] * 2 + [None] * 2
    text = tables.tables(table_of(rows), {}, 1)
    assert [line for line in text.splitlines() if line.startswith("| |")][-1] == "| | brightness |"
    assert metric_registry.metric_versions(encoders)["brightness"] == 1
    assert "| brightness | mean of a picture's pixels | share, 0 to 1 | lower |" in metric_registry.markdown()


def test_a_registered_metric_ranks_a_sweep_in_its_direction(brightness):
    config = world.get_config()
    sweep.check_metric("brightness", config)
    results = [
        Result(Point(f"{value}", {}, config), {"brightness": Estimate(value, value, value)}, "done")
        for value in (0.5, 0.2, 0.9)
    ]
    assert [result.point.name for result in ranked(results, "brightness")] == ["0.2", "0.5", "0.9"]
    assert "Best by brightness: 0.2" in markdown(results, "brightness", 1)
    assert [label.get_text() for label in plot(results, "brightness").axes[0].get_xticklabels()] == [
        "brightness\n(lower is better)"
    ]


def test_sweeps_are_not_ranked_where_neither_way_is_better():
    with pytest.raises(UserError, match="--metric is 'colours'; give one of DINO, CLIP-I"):
        sweep.check_metric("colours", world.get_config())


def test_a_runs_own_scores_bear_the_names_of_the_evaluations():
    photos = np.stack([photo[::4, ::4] for photo in heldout_subject("car", 0).photos])
    assert photos.shape[1:] == (32, 32, 3)
    subject = SubjectDataset(photos, ("a tar car",) * 5, ClassNoun("car", 1.0, "given"), Identifier("tar", (7,), (0,)))
    drawn = {
        "subject": [Picture("subject", "a red [V] car in the snow", 0, "s", photos[0])],
        "class before": [Picture("class", "a car", i, "b", photo) for i, photo in enumerate(photos)],
        "class after": [Picture("class", "a car", 0, "a", photos[1])],
    }
    own = {name.partition(": ")[::2]: value for name, (value, _) in exact_scores(subject, drawn).items()}
    pictures = [Picture("photo", "", None, "p", photo) for photo in photos] + drawn["subject"] + drawn["class after"]
    pictures += [picture._replace(role="class before") for picture in drawn["class before"]]
    encoders = load_encoders({"probe": find_encoders(world.get_config().evaluation)["probe"]})
    (evaluated,) = summary(score(encoders, "car", pictures, "car")).values()
    for (called, name), value in own.items():
        assert evaluated[f"{name} before" if called == "class before" else name] == value
    assert {name for _, name in own} == {name.removesuffix(" before") for name in evaluated}


def test_a_document_has_the_table_of_metrics():
    documents = [ROOT / "README.md", ROOT / "personalize_jax" / "README.md", ROOT / "experiments" / "README.md"]
    written = [file.read_text() for file in documents if file.exists()]
    table = metric_registry.markdown()
    assert any(table in text for text in written), f"put this table into one of README.md's:\n{table}"
