"""What a run keeps of a tuned cascade, and what is made of it."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import personalize_jax as pj
from personalize_jax.export import export
from personalize_jax.method import personalization
from personalize_jax.method.personalization import claim_run_directory
from personalize_jax.models.params import flatten, unflatten
from personalize_jax.pipeline import load_pipeline
from personalize_jax.runtime import manifest
from personalize_jax.runtime.errors import UserError
from personalize_jax.training.trained import FILE, Trained, save_trained
from tests import tiny_world

STAGES = ("base", "super_resolution")
ADAPTERS = {"trainable": ((".*", False),), "lora__rank": 2, "lora__targets": ((r"denoiser/middle/conv_.*/kernel", 3),)}
PATH = "middle/conv_in/kernel"


def personalize(pretrained, photos, workdir, **training):
    config = tiny_world.get_config(
        pretrained,
        subject__registry=str(workdir.parent / f"{workdir.name}.json"),
        **{
            f"{part}__{key}": value
            for part in ("training", "super_resolution_training")
            for key, value in training.items()
        },
    )
    pipeline, subject = pj.load_pipeline(pretrained), pj.load_subject(photos, "dog", 16)
    return pj.personalize_subject(pipeline, subject, config, workdir)


@pytest.fixture(scope="module")
def made(tmp_path_factory, pretrained, photos):
    """A run directory, and the cascade that tuning left in memory."""
    workdir = tmp_path_factory.mktemp("adapters") / "run"
    return workdir, personalize(pretrained, photos, workdir, prior__weight=0.0, **ADAPTERS)


@pytest.fixture
def copied(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / "run")


def test_a_run_with_adapters_keeps_adapters_and_no_network(made):
    workdir, _ = made
    for name in STAGES:
        kept = load_file(workdir / name / FILE)
        assert kept and all(path.startswith("lora/denoiser/") for path in kept)
        assert {path.rpartition("/")[2] for path in kept} == {"down", "up"}
    files = {file.relative_to(workdir).as_posix() for file in workdir.rglob("*.safetensors")}
    assert files == {f"{name}/{FILE}" for name in STAGES}


def test_the_pretrained_cascade_with_what_was_kept_is_the_tuned_one(made):
    workdir, personalized = made
    jax.tree.map(
        np.testing.assert_array_equal, pj.load_personalized(workdir).pipeline.params, personalized.pipeline.params
    )


def test_an_export_is_the_whole_tuned_cascade(made, tmp_path):
    workdir, personalized = made
    assert export(workdir, tmp_path) == dict.fromkeys(STAGES, 6)
    exported = load_pipeline(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, exported.params, personalized.pipeline.params)
    assert [s.sampling for s in exported.stages] == [s.sampling for s in personalized.pipeline.stages]


def test_a_stage_that_was_not_begun_is_exported_as_it_was(copied, pretrained, tmp_path):
    """With its pretrained parameters, and sampled as those are."""
    shutil.rmtree(copied / "super_resolution")
    assert export(copied, tmp_path / "out") == {"base": 6}
    exported, before = load_pipeline(tmp_path / "out"), load_pipeline(pretrained)
    stage = "super_resolution"
    jax.tree.map(np.testing.assert_array_equal, exported.params[stage], before.params[stage])
    assert exported.stage(stage).sampling == before.stage(stage).sampling
    assert not np.array_equal(*(np.asarray(flatten(p.params["base"])[PATH]) for p in (exported, before)))


def test_a_later_checkpoint_is_exported_in_place_of_an_earlier_result(copied, tmp_path):
    """As where a finished run is being prolonged."""
    result = load_file(copied / "base" / FILE)
    earlier = {path: np.zeros_like(value) for path, value in result.items()}
    save_trained(Trained(unflatten(earlier), 3, None), copied / "base")
    assert export(copied, tmp_path / "out") == dict.fromkeys(STAGES, 6)
    later = load_pipeline(tmp_path / "out").params["base"]
    save_trained(Trained(unflatten(result), 6, None), copied / "base")
    jax.tree.map(np.testing.assert_array_equal, later, pj.load_personalized(copied).pipeline.params["base"])


def test_a_run_that_is_not_at_its_end_is_not_sampled_from(copied):
    shutil.rmtree(copied / "super_resolution")
    with pytest.raises(UserError, match="super_resolution is not tuned to its end; run personalize_jax.personalize"):
        pj.load_personalized(copied)


def test_what_was_trained_is_not_put_into_other_weights(copied):
    recorded = json.loads((copied / manifest.FILE).read_text())
    recorded["data"]["pretrained"] = "0" * 16
    (copied / manifest.FILE).write_text(json.dumps(recorded))
    with pytest.raises(UserError, match="begun with other weights of .*Put the former ones back"):
        pj.load_personalized(copied)


def test_a_pretrained_cascade_that_is_gone_is_named(copied, tmp_path):
    recorded = json.loads((copied / manifest.FILE).read_text())
    recorded["config"]["pretrained"] = str(tmp_path / "gone")
    (copied / manifest.FILE).write_text(json.dumps(recorded))
    with pytest.raises(UserError, match="has trained of .*gone, which cannot be read: .*If that was moved"):
        pj.load_personalized(copied)


def test_a_damaged_result_is_taken_from_the_checkpoint(copied, made, caplog):
    file = copied / "base" / FILE
    file.write_bytes(file.read_bytes()[:100])
    found = pj.load_personalized(copied).pipeline.params["base"]
    assert f"{file} cannot be read" in caplog.text
    jax.tree.map(np.testing.assert_array_equal, found, made[1].pipeline.params["base"])


def test_a_pretrained_cascade_may_be_moved_if_the_run_is_told(copied, pretrained, photos, tmp_path):
    moved = shutil.copytree(pretrained, tmp_path / "moved")
    config = manifest.read_config(copied)
    with config.unlocked():
        config.pretrained = str(moved)
    pipeline, subject = pj.load_pipeline(moved), pj.load_subject(photos, "dog", 16)
    claim_run_directory(pipeline, subject, config, copied)
    assert manifest.read_config(copied).pretrained == str(moved)
    pj.load_personalized(copied)
    other = pipeline.replace_params(base=jax.tree.map(lambda leaf: leaf + 1, pipeline.params["base"]))
    with pytest.raises(UserError, match="begun with other weights"):
        claim_run_directory(other, subject, config, copied)


def test_photos_of_another_size_than_the_cascades_are_refused(pretrained, photos, tmp_path):
    config, subject = tiny_world.get_config(pretrained), pj.load_subject(photos, "dog", 32)
    with pytest.raises(UserError, match=r"read at 32 pixels, .* have 16; give load_subject\(..., resolution=16\)"):
        claim_run_directory(pj.load_pipeline(pretrained), subject, config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_without_checkpoints_is_not_prolonged(copied, pretrained, photos):
    shutil.rmtree(copied / "base" / "checkpoints")
    config = manifest.read_config(copied)
    with config.unlocked():
        config.training.num_steps = 12
    pipeline, subject = pj.load_pipeline(pretrained), pj.load_subject(photos, "dog", 16)
    with pytest.raises(UserError, match="has done 6 steps, and its checkpoints have been deleted.*give num_steps=6"):
        claim_run_directory(pipeline, subject, config, copied)


def test_an_export_does_not_replace_what_it_is_made_from(copied, pretrained):
    for out in (copied, pretrained):
        with pytest.raises(UserError, match="--out is .* which the model is read from"):
            export(copied, out)


def test_a_finished_run_needs_no_checkpoints_any_more(made, pretrained, photos, monkeypatch):
    """The same call finds what was trained, and trains nothing."""
    workdir, personalized = made
    for name in STAGES:
        (workdir / name / "checkpoints").rename(workdir / f"checkpoints of {name}")
    monkeypatch.setattr(personalization, "train", lambda *_: pytest.fail("trained again"))
    again = personalize(pretrained, photos, workdir, prior__weight=0.0, **ADAPTERS)
    for name in STAGES:
        (workdir / f"checkpoints of {name}").rename(workdir / name / "checkpoints")
    jax.tree.map(np.testing.assert_array_equal, again.pipeline.params, personalized.pipeline.params)
