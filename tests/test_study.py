"""Experiments from end to end, on a tiny cascade that draws nothing in particular."""

import importlib
import json

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments import folders, num_images, study, training_length
from personalize_jax.benchmark.loading import load_benchmark
from personalize_jax.evaluation.scoring import read_rows, summary
from personalize_jax.method.personalization import load_pretrained
from personalize_jax.pipeline import save_pipeline
from personalize_jax.runtime import manifest
from personalize_jax.runtime.errors import UserError
from personalize_jax.subject.registry import Registry
from personalize_jax.training.tracking import Destinations
from tests import event_files, processes, tiny, tiny_world

NOUNS = ("dog", "cat", "car")
NAMES = (
    "subject_fidelity",
    "prior_preservation",
    "class_noun",
    "num_images",
    "super_resolution",
    "identifier_rarity",
    "training_length",
    "method_settings",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny cascade whose pictures are large enough for the probe, and the runs of all experiments."""
    folder = tmp_path_factory.mktemp("studies")
    smallest = {"channels": (64,), "down_blocks": (0,), "up_blocks": (0,), "attention": (True,)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.TEXT, "max_length", 16)  # room for the many tokens of random characters
        save_pipeline(tiny.pipeline(resolution=16, **smallest), folder / "tiny")
    return folder


@pytest.fixture(scope="module")
def config(folder):
    return study.quick(tiny_world.get_config(folder / "tiny", tune=("base",), evaluation__probe=True))


@pytest.fixture(scope="module")
def subjects():
    """Two subjects with two prompts each."""
    world = load_benchmark("world")
    return [world[i]._replace(prompts=world[i].prompts[:1] + world[i].prompts[-1:]) for i in range(2)]


def all_of(subjects):
    return study.Subjects(subjects, [subject.name for subject in subjects], NOUNS)


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, None], ids=["two", "all"])
@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_runs_and_tables_its_arms(name, count, folder, config, subjects, monkeypatch):
    if name == "super_resolution":
        config = study.changed(config, tune=("base", name))
    monkeypatch.setattr(training_length, "SHARES", (1.0, 2.0))  # every arm takes seconds to compile
    monkeypatch.setattr(num_images, "COUNTS", (1, 2))
    made = importlib.import_module(f"experiments.{name}").make_study(config)
    made = study.select_arms(made, [arm.name for arm in made.arms[:count]])
    runs = folder / ("enlarged" if name == "super_resolution" else "runs")
    text = study.run_study(made, load_pretrained(config), all_of(subjects[:1]), runs)
    check_tabled(made, text, runs / name)


def check_tabled(made, text, folder):
    for arm in made.arms:
        assert f"| {arm.name} |" in text
    for finding in made.findings:
        assert f"| {finding.claim} |" in text
    for row in made.paper:
        assert f"| paper: {row} |" in text
    assert {file.name for file in folder.iterdir()} == {"tables.md", "tables.csv", "subjects.csv", "figure.png"}


def test_what_was_scored_is_only_read(folder, config, subjects, monkeypatch):
    made = importlib.import_module("experiments.prior_preservation").make_study(config)
    made = study.select_arms(made, [arm.name for arm in made.arms[:2]])
    text = study.run_study(made, load_pretrained(config), all_of(subjects[:1]), folder / "runs")
    check_tabled(made, text, folder / "runs" / "prior_preservation")
    monkeypatch.setattr(study, "personalize_subject", None)
    monkeypatch.setattr(study, "evaluate", None)
    assert study.run_study(made, load_pretrained(config), all_of(subjects[:1]), folder / "runs") == text


@pytest.mark.slow
def test_a_killed_experiment_goes_on(folder, config, subjects, monkeypatch):
    """The second subject's run is cut short while it is being scored."""
    made = study.Study("alone", [study.Arm("alone", config)], [], {}, 2)
    whole = study.run_study(made, load_pretrained(config), all_of(subjects), folder / "whole")
    evaluate = study.evaluate

    def dies(*arguments, **named):
        if arguments[2] == subjects[1].name:
            raise KeyboardInterrupt
        return evaluate(*arguments, **named)

    monkeypatch.setattr(study, "evaluate", dies)
    with pytest.raises(KeyboardInterrupt):
        study.run_study(made, load_pretrained(config), all_of(subjects), folder / "killed")
    monkeypatch.undo()
    assert study.run_study(made, load_pretrained(config), all_of(subjects), folder / "killed") == whole


def test_identifiers_do_not_depend_on_who_asks_first(tmp_path, config):
    """Two parts of an experiment, and one that is about fewer subjects."""
    made = study.Study("pair", [study.Arm("one", config), study.Arm("other", config)], [], {}, 2)
    names, nouns, cascade = ("rex", "tom"), ("dog", "cat", "car"), load_pretrained(config)

    def given(workdir, arm):
        return {subject.name: subject.identifier for subject in Registry(workdir / arm / "registry.json").subjects()}

    for _part in (1, 2):
        study.reserve_identifiers(made, cascade, names, nouns, tmp_path / "parts")
    study.reserve_identifiers(made, cascade, names[:1], nouns, tmp_path / "fewer")
    assert given(tmp_path / "parts", "one") == given(tmp_path / "parts", "other")
    assert given(tmp_path / "parts", "one")["rex"] == given(tmp_path / "fewer", "one")["rex"]
    assert len(set(given(tmp_path / "parts", "one").values())) == 2


def test_runs_share_what_the_pretrained_cascade_draws_if_they_draw_the_same(config, tmp_path):
    """One folder for a class, but for other weights and other ways to draw."""
    cascade = load_pretrained(config)
    other = cascade.replace_params(base=jax.tree.map(lambda leaf: leaf * 2, cascade.params["base"]))
    rounded = ConfigDict({**config, "compute": {"dtype": "bfloat16"}})
    more, fewer = (study.changed(config, **{f"class_images__{key}": 9}) for key in ("count", "num_steps"))

    def folder(part, noun="dog", pretrained=cascade, config=config):
        return folders.shared_folder(tmp_path, part, noun, pretrained, config)

    for part in ("class_images", "class_before"):
        assert folder(part, config=more) == folder(part) and folder(part).parent == tmp_path / part
        others = [folder(part, "traffic light"), folder(part, pretrained=other), folder(part, config=rounded)]
        others += [folder(part, config=fewer)] if part == "class_images" else []
        assert len({folder(part), *others}) == 1 + len(others)

    run = tmp_path / "arm" / "rex"
    for shared in (folder("class_images", config=fewer), folder("class_images")):  # the first as it was called before
        folders.link_class_images(run, shared)
        assert (run / "class_images").resolve() == shared.resolve()


@pytest.mark.slow
def test_weights_can_be_deleted_once_scored(folder, config, subjects):
    made = study.Study("alone", [study.Arm("alone", config)], [], {}, 1)
    how = {"delete_weights": True, "destinations": Destinations(tensorboard=True)}
    study.run_study(made, load_pretrained(config), all_of(subjects[:1]), folder / "light", **how)
    run = folder / "light" / "alone" / subjects[0].name
    assert not [*run.glob("*/checkpoints"), *run.glob("*/trained.safetensors")]
    assert len(read_rows(run / "evaluation" / "rows.jsonl")) == 5 + 2 * 2 + 2 * 4
    study.run_study(made, load_pretrained(config), all_of(subjects[:1]), folder / "light", **how)
    check_tracked(run, config)


def check_tracked(run, config):
    """Training, scores and pictures, each once, though the run was asked for twice."""
    step = config.training.num_steps
    losses = [json.loads(line)["loss"] for line in (run / "base" / "metrics.jsonl").read_text().splitlines()]
    found = event_files.read(run / "tensorboard" / "base")["loss"]
    assert found[step] == np.float32(losses[-1]) and len(found) == len(losses)
    (scores,) = summary(read_rows(run / "evaluation" / "rows.jsonl")).values()
    expected = {metric: {step: np.float32(value)} for metric, value in scores.items()}
    assert event_files.read(run / "tensorboard" / "scores") == expected
    (sheet,) = event_files.read(run / "tensorboard" / "pictures").values()
    assert set(sheet) == {step} and sheet[step].shape[1] > sheet[step].shape[0]  # two pictures side by side


def test_another_configuration_needs_another_directory(folder, config, subjects):
    other = study.changed(config, seed=7)
    made = study.Study("alone", [study.Arm("alone", other)], [], {}, 1)
    manifest.record_config(config, folder / "another" / "alone" / subjects[0].name)
    with pytest.raises(UserError, match="begun with another configuration"):
        study.run_study(made, load_pretrained(other), all_of(subjects[:1]), folder / "another")


def test_encoders_are_looked_for_before_anything_is_begun(folder, tmp_path):
    flags = [f"--config=tests/tiny_world.py:{folder / 'tiny'}", "--config.evaluation.dino=nowhere", "--quick"]
    finished = processes.command(tmp_path, "experiments.num_images", *flags, f"--workdir={tmp_path / 'runs'}")
    assert finished.status == 2 and "'nowhere' is no encoder" in finished.error, finished
    assert not (tmp_path / "runs").exists()


def test_settings_are_chosen_on_subjects_of_their_own(folder, tmp_path):
    """Of which there are five."""
    flags = [f"--config=tests/tiny_world.py:{folder / 'tiny'}", "--num_subjects=6", f"--workdir={tmp_path / 'runs'}"]
    refused = processes.command(tmp_path, "experiments.method_settings", *flags)
    assert refused.status == 2 and "6 subjects were asked for and the benchmark has 5" in refused.error
    assert not (tmp_path / "runs").exists()
