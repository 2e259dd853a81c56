import json
import resource
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest

import personalize_jax as pj
from personalize_jax.method.class_images import prior_sampling
from personalize_jax.method.personalization import claim_run_directory, stage_examples
from personalize_jax.pipeline.pictures import read_png
from personalize_jax.runtime.errors import UserError
from personalize_jax.training.examples import downsample_uint8
from tests import event_files, processes, tiny_world
from tests.deaths import DEATHS, STOPS

TRAININGS = ("base", "super_resolution", "base_without_prior")


def personalize(folder, pretrained, photos, workdir, *flags, before=None):
    return processes.command(
        folder,
        "personalize_jax.personalize",
        f"--config=tests/tiny_world.py:{pretrained}",
        f"--images={photos}",
        "--class_noun=dog",
        f"--workdir={workdir}",
        *flags,
        before=before,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory, pretrained, photos):
    """The run directory of the command, brought to its end; tracked, as those compared with it are not."""
    folder = tmp_path_factory.mktemp("personalized")
    finished = personalize(folder, pretrained, photos, folder / "run", "--tensorboard", "--profile")
    assert finished.status == 0, finished.error
    return folder / "run"


@pytest.fixture
def copied(run, tmp_path):
    return shutil.copytree(run, tmp_path / "run")


def contents(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def tuned(workdir):
    return pj.load_personalized(workdir).pipeline


def equal(a, b):
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))


def test_a_run_leaves_what_the_readme_says(run, pretrained):
    subject = json.loads((run / "subject" / "subject.json").read_text())
    assert subject["class_noun"] == "dog" and len(subject["images"]) == 3
    assert {entry["label"] for entry in subject["images"]} == {f"a {subject['identifier']} dog"}
    for name in TRAININGS:
        steps = [json.loads(line)["step"] for line in (run / name / "metrics.jsonl").read_text().splitlines()]
        assert steps == [2, 4, 6]
        assert (run / name / "checkpoints" / "6").is_dir() and (run / name / "trained.safetensors").is_file()
    manifest = json.loads((run / "manifest.json").read_text())
    assert [call["status"] for call in manifest["calls"]] == ["done"]
    assert [name for name, state in manifest["phases"].items() if state["done"]] == [
        "subject",
        "class images",
        "tuning base",
        "tuning super_resolution",
        "tuning base without prior",
        "samples",
        "report",
    ]
    assert manifest["done"] and manifest["config"]["training"]["num_steps"] == 6
    assert manifest["seeds"] == {
        "training": 0,
        "class images": [0, 3],
        "samples": [0, 1],
        "class samples": [1000, 1008],
    }
    sources = [entry["source_sha256"] for entry in subject["images"]]
    assert manifest["data"] == {"pretrained": pj.load_pipeline(pretrained).fingerprint, "photos": sources}
    assert (run / "gallery.png").stat().st_size > 1000
    page = (run / "report.html").read_text()
    identifier = subject["identifier"]
    named = {"name": f"a {identifier} dog", "identifier": identifier, "in prompts": "a [V] dog"}
    assert manifest["subject"] == named and f"&quot;{named['name']}&quot;" in page
    assert subject["identifier"] in page and "on the moon" in page and "after, without the prior term" in page


def test_the_comparison_is_tuned_without_the_prior_term(run):
    logged = {name: (run / name / "metrics.jsonl").read_text() for name in TRAININGS}
    assert [name for name, lines in logged.items() if "prior_loss" in lines] == ["base", "super_resolution"]


def test_a_tracked_run_has_its_numbers_and_pictures_in_event_files_and_its_trainings_traced(run):
    for name in TRAININGS:
        lines = [json.loads(line) for line in (run / name / "metrics.jsonl").read_text().splitlines()]
        found = event_files.read(run / "tensorboard" / name)
        assert found["loss"] == {line["step"]: np.float32(line["loss"]) for line in lines}
        assert set(found) == set(lines[0]) - {"step"}
        assert list((run / name / "profile").rglob("*.xplane.pb"))
    pictures = event_files.read(run / "tensorboard" / "pictures")
    assert {"a [V] dog", "a [V] dog on the moon", "a dog, before", "a dog, after"} < set(pictures)
    assert all(set(of_step) == {12} for of_step in pictures.values())  # six of each stage


def test_wandb_that_is_not_installed_is_missed_before_anything_is_done(pretrained, photos, tmp_path):
    run, before = tmp_path / "run", processes.without_wandb
    refused = personalize(tmp_path, pretrained, photos, run, "--wandb=dogs", before=before)
    assert refused.status == 2 and not run.exists()
    assert refused.error.strip().splitlines()[-1].startswith("error: --wandb=dogs needs Weights & Biases")


def test_samples_tell_their_prompt_and_seed(run):
    identifier = json.loads((run / "subject" / "subject.json").read_text())["identifier"]
    found = [read_png(file)[1] for file in sorted((run / "samples").iterdir())]
    expected = [(place, seed) for place in ("in the snow", "on the moon") for seed in ("0", "1")]
    assert [(text["prompt"], text["seed"]) for text in found] == [
        (f"a {identifier} dog {place}", seed) for place, seed in expected
    ]


def test_class_images_are_ancestral_and_enlarged_from_the_cascades_own(run, pretrained):
    pipeline = pj.load_pipeline(pretrained)
    found = {}
    for stage in pipeline.stages:
        pictures = [read_png(file) for file in sorted((run / "class_images" / stage.name).iterdir())]
        assert [(text["prompt"], text["seed"]) for _, text in pictures] == [("a dog", str(i)) for i in range(4)]
        assert {json.loads(text["sampling"])[stage.name]["sampler"] for _, text in pictures} == {"ancestral"}
        found[stage.name] = np.stack([pixels for pixels, _ in pictures])
    settings = tiny_world.get_config(pretrained).class_images
    samplings = {stage.name: prior_sampling(stage, settings) for stage in pipeline.stages}
    drawn = pipeline.sample(["a dog"] * 4, range(4), settings.batch_size, samplings)
    for name, pictures in zip(found, drawn, strict=True):
        np.testing.assert_array_equal(found[name], pictures)


def test_a_second_call_says_that_all_is_done_and_changes_nothing(run, pretrained, photos, tmp_path):
    before = contents(run)
    finished = personalize(tmp_path, pretrained, photos, run)
    assert finished.status == 0 and "All is done" in finished.output and str(run / "gallery.png") in finished.output
    name = json.loads((run / "manifest.json").read_text())["subject"]["name"]
    assert f'The subject is "{name}". Its identifier is ' in finished.output
    assert f"--workdir={run} --prompt='a [V] dog in the snow'" in finished.output
    assert contents(run) == before


@pytest.mark.slow
def test_more_steps_prolong_a_finished_run(copied, pretrained, photos, tmp_path):
    page = (copied / "report.html").read_text()
    flag = "--config.super_resolution_training.num_steps=7"
    assert personalize(tmp_path, pretrained, photos, copied, flag).status == 0
    assert (copied / "super_resolution" / "checkpoints" / "7").is_dir()
    assert (copied / "report.html").read_text() != page
    manifest = json.loads((copied / "manifest.json").read_text())
    assert manifest["done"] and manifest["config"]["super_resolution_training"]["num_steps"] == 7


def test_tuning_changes_both_denoisers_and_nothing_else(run, pretrained):
    before, after = pj.load_pipeline(pretrained), tuned(run)
    assert equal(before.params["text_encoder"], after.params["text_encoder"])
    for name in ("base", "super_resolution"):
        assert not equal(before.params[name], after.params[name])
    np.testing.assert_array_equal(before.tokenizer.counts, after.tokenizer.counts)


def test_super_resolution_is_sampled_at_the_level_that_it_was_tuned_with(run, pretrained):
    training = tiny_world.get_config(pretrained).super_resolution_training
    before, after = pj.load_pipeline(pretrained).stages, tuned(run).stages
    assert after[1].sampling.augmentation_level == training.augmentation_levels[1]
    assert after[1].sampling.augmentation_level < before[1].sampling.augmentation_level
    assert after[0] == before[0]


def test_a_stage_learns_from_pictures_at_its_own_resolution(pretrained):
    pipeline = pj.load_pipeline(pretrained)
    pictures = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    base, super_resolution = (stage_examples(pipeline, s, pictures, ["a dog"] * 2) for s in pipeline.stages)
    np.testing.assert_array_equal(super_resolution.image, pictures)
    np.testing.assert_array_equal(super_resolution.low_res, downsample_uint8(pictures, 8))
    np.testing.assert_array_equal(base.image, super_resolution.low_res)
    assert base.low_res is None


def test_the_same_command_draws_the_same_bytes(run, tmp_path):
    flags = [f"--workdir={run}", "--prompt=a [V] dog in the snow", "--prompt=a dog", "--num_images=2", "--seed=3"]
    flags += ["--batch_size=4"]
    first, second = (
        processes.command(tmp_path, "personalize_jax.sample", *flags, f"--out={tmp_path / name}") for name in "ab"
    )
    assert first.status == second.status == 0
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == [f"a-{v}-{seed:04d}.png" for v in ("V-dog-in-the-snow", "dog") for seed in (3, 4)]
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)
    assert len({(tmp_path / "a" / n).read_bytes() for n in names}) == 4
    assert first.error.count("has no [V]") == 1 and '"a dog" has no [V]' in first.error


def test_the_notebook_draws_what_the_command_draws(run, tmp_path):
    flags = [f"--workdir={run}", "--prompt=a [V] dog", "--num_images=2", "--seed=5", "--batch_size=2"]
    assert processes.command(tmp_path, "personalize_jax.sample", *flags, f"--out={tmp_path}").status == 0
    drawn = pj.load_personalized(run).sample("a [V] dog", num_images=2, seed=5, batch_size=2)
    assert drawn.shape == (2, 16, 16, 3) and drawn.dtype == np.uint8
    for seed, picture in zip((5, 6), drawn, strict=True):
        np.testing.assert_array_equal(read_png(tmp_path / f"a-V-dog-{seed:04d}.png")[0], picture)


# What cuts a run short costs no more than time.


@pytest.mark.slow
def test_a_run_killed_in_every_phase_ends_like_one_that_was_not(run, pretrained, photos, tmp_path):
    workdir = tmp_path / "run"
    flag = f"--config.subject.registry={tmp_path / 'registry.json'}"  # where the same identifier is free
    for death, reached in DEATHS.items():
        assert not (workdir / reached).exists()
        assert personalize(tmp_path, pretrained, photos, workdir, flag, before=death).status == -signal.SIGKILL, death
        assert (workdir / reached).exists(), death
    assert personalize(tmp_path, pretrained, photos, workdir, flag).status == 0
    statuses = [call["status"] for call in json.loads((workdir / "manifest.json").read_text())["calls"]]
    assert statuses == ["killed"] * len(DEATHS) + ["done"]
    assert not [path for path in workdir.rglob(".*") if "tmp" in path.name or path.is_file()]
    assert not list(workdir.rglob("*orbax-checkpoint-tmp*"))
    expected, found = tuned(run), tuned(workdir)
    for name in ("base", "super_resolution"):
        assert equal(expected.params[name], found.params[name])
    for folder in ("subject", "class_images", "samples", "class_samples"):
        for file in (run / folder).rglob("*.*"):
            assert (workdir / file.relative_to(run)).read_bytes() == file.read_bytes()
    for name in TRAININGS:
        lines = [(d / name / "metrics.jsonl").read_text().splitlines() for d in (run, workdir)]
        losses = [[json.loads(line)["loss"] for line in of_run] for of_run in lines]
        assert losses[0] == losses[1] and len(losses[0]) == 3


def test_a_run_asked_to_stop_saves_says_so_and_goes_on(run, pretrained, photos, tmp_path):
    workdir = tmp_path / "run"
    flags = [f"--config.subject.registry={tmp_path / 'registry.json'}", "--config.tune=('base',)"]
    flags += ["--config.report.without_prior=False"]
    for stop, (phase, done, undone) in STOPS.items():
        stopped = personalize(tmp_path, pretrained, photos, workdir, *flags, before=stop)
        assert stopped.status == 75 and "the same command goes on" in stopped.error, stopped.error
        call = json.loads((workdir / "manifest.json").read_text())["calls"][-1]
        assert (call["status"], call["phase"]) == ("stopped", phase)
        assert (workdir / done).exists() and not (workdir / undone).exists()
    assert personalize(tmp_path, pretrained, photos, workdir, *flags).status == 0
    assert json.loads((workdir / "manifest.json").read_text())["done"]
    assert equal(*(tuned(folder).params["base"] for folder in (run, workdir)))


def unfinish(workdir, *names):
    """Remove the report and what else is named."""
    for name in ("report.html", *names):
        path = workdir / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_a_damaged_checkpoint_costs_a_few_steps_only(run, copied, pretrained, photos, tmp_path):
    unfinish(copied, "base/trained.safetensors")
    for file in (copied / "base" / "checkpoints" / "6").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    finished = personalize(tmp_path, pretrained, photos, copied)
    assert finished.status == 0 and "Checkpoint 6" in finished.error
    assert equal(*(tuned(folder).params["base"] for folder in (run, copied)))


def test_damaged_class_images_are_named(copied, pretrained, photos, tmp_path):
    unfinish(copied)
    file = copied / "class_images" / "base" / "00001.png"
    file.write_bytes(file.read_bytes()[:100])
    finished = personalize(tmp_path, pretrained, photos, copied)
    assert finished.status == 2 and f"error: {file} is damaged" in finished.error


def little_space():
    # Enough for pictures and messages, too little for parameters.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


@pytest.mark.parametrize(
    "lost",
    [
        pytest.param(("base/checkpoints", "base/trained.safetensors"), marks=pytest.mark.slow),
        ("super_resolution/trained.safetensors",),
    ],
)
def test_a_full_disk_is_one_sentence_and_can_be_mended(run, copied, pretrained, photos, tmp_path, lost):
    unfinish(copied, *lost)
    finished = personalize(tmp_path, pretrained, photos, copied, before=little_space)
    assert finished.status == 2, finished.error
    sentence = finished.error.splitlines()[-1]
    assert "Traceback" not in finished.error
    assert sentence.startswith("error: ") and "cannot be written" in sentence and "free space" in sentence
    assert personalize(tmp_path, pretrained, photos, copied).status == 0
    assert equal(*(tuned(folder).params for folder in (run, copied)))


# The run directory belongs to one subject and one configuration.


def test_a_run_directory_refuses_another_configuration_or_subject(run, pretrained, photos, tmp_path):
    before = contents(run)
    others = tmp_path / "others"
    others.mkdir()
    shutil.copy(photos / "0.png", others)
    assert "different: class_images.count" in refusal(run, pretrained, photos, class_images__count=5)
    assert "other images" in refusal(run, pretrained, others)
    assert "begun with a dog, not a cat" in refusal(run, pretrained, photos, noun="cat")
    assert "done 6 of 6 steps, and the learning rate falls" in refusal(run, pretrained, photos, training__num_steps=8)
    fewer = {"super_resolution_training__num_steps": 5}
    assert "has done 6 steps already, more than num_steps=5" in refusal(run, pretrained, photos, **fewer)
    assert contents(run) == before


def refusal(workdir, pretrained, photos, noun="dog", **changes):
    with pytest.raises(UserError) as caught:
        claim_run_directory(
            pj.load_pipeline(pretrained),
            pj.load_subject(photos, noun, 16),
            tiny_world.get_config(pretrained, **changes),
            Path(workdir),
        )
    return str(caught.value)


# Other ways to tune.


@pytest.fixture(scope="module")
def base_only(tmp_path_factory, run, pretrained, photos):
    """(run directory, pretrained, personalised) after two steps on the base towards the class images.

    `run` comes before it in the registry.
    """
    workdir = tmp_path_factory.mktemp("base_only") / "run"
    pipeline = pj.load_pipeline(pretrained)
    config = tiny_world.get_config(
        pretrained, tune=("base",), training__num_steps=2, training__prior__form="sampled", seed=4
    )
    return workdir, pipeline, pj.personalize_subject(pipeline, pj.load_subject(photos, "Dog", 16), config, workdir)


def test_one_stage_can_be_tuned_alone_with_class_images_as_targets(base_only, pretrained):
    workdir, pipeline, personalized = base_only
    tuned = personalized.pipeline
    assert not equal(tuned.params["base"], pipeline.params["base"])
    for name in ("text_encoder", "super_resolution"):
        assert equal(tuned.params[name], pipeline.params[name])
    assert tuned.stages == pipeline.stages
    assert [path.name for path in (workdir / "class_images").iterdir()] == ["base"]
    assert not (workdir / "super_resolution").exists()
    assert equal(pipeline.params["base"], pj.load_pipeline(pretrained).params["base"])
    rows = [json.loads(line) for line in (workdir / "base" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["prior_loss"] > 0


def test_runs_of_one_registry_have_identifiers_of_their_own(run, base_only):
    names = [json.loads((d / "subject" / "subject.json").read_text()) for d in (run, base_only[0])]
    assert not set(names[0]["token_ids"]) & set(names[1]["token_ids"])
