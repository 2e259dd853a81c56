"""A cascade of three stages, from photographs to pictures and an exported folder."""

import jax
import numpy as np
import pytest

from personalize_jax.export import export
from personalize_jax.families.world import read_stage
from personalize_jax.method.configuration import training_sections
from personalize_jax.method.personalization import load_pretrained, load_subject, personalize_subject
from personalize_jax.method.personalized import load_personalized
from personalize_jax.pipeline import Pipeline, load_pipeline, save_pipeline
from tests import tiny, tiny_world

pytestmark = pytest.mark.slow

THIRD = {**tiny.SUPER_RESOLUTION, "name": "last", "resolution": 32, "low_resolution": 16}


@pytest.fixture(scope="module")
def run(tmp_path_factory, photos):
    """A run of which every stage is tuned: its pretrained cascade, its configuration, its directory, and the result."""
    folder = tmp_path_factory.mktemp("three_stages")
    two = tiny.pipeline()
    params = {**two.params, "last": tiny.stage_params(read_stage(THIRD))}
    save_pipeline(Pipeline(two.family.with_stage(THIRD), params), folder / "pretrained", np.float32)
    config = tiny_world.get_config(folder / "pretrained").unlock()
    config.last_training = config.super_resolution_training.copy_and_resolve_references()
    config.tune = ("base", "super_resolution", "last")
    config.lock()
    pipeline = load_pretrained(config)
    subject = load_subject(photos, "dog", pipeline.stages[-1].resolution)
    return pipeline, config, folder / "run", personalize_subject(pipeline, subject, config, folder / "run")


def test_every_stage_is_tuned_on_its_own_inputs(run):
    pipeline, config, workdir, tuned = run
    assert training_sections(config)["last"] == "last_training"
    for name in config.tune:
        same = jax.tree.map(np.array_equal, pipeline.params[name], tuned.pipeline.params[name])
        assert not all(jax.tree.leaves(same)), name
        assert (workdir / name / "metrics.jsonl").is_file()
        assert len(list((workdir / "class_images" / name).glob("*.png"))) == config.class_images.count


def test_pictures_pass_through_all_stages_and_come_back_from_the_run_directory(run):
    _, _, workdir, tuned = run
    sides = [pictures.shape[1] for pictures in tuned.pipeline.sample(["a dog"], [0])]
    assert sides == [8, 16, 32]
    prompt = "a [V] dog in the snow"
    np.testing.assert_array_equal(load_personalized(workdir).sample(prompt), tuned.sample(prompt))


def test_it_is_exported_whole(run, tmp_path):
    _, config, workdir, tuned = run
    assert export(workdir, tmp_path) == dict.fromkeys(config.tune, config.training.num_steps)
    exported = load_pipeline(tmp_path)
    assert [stage.name for stage in exported.stages] == list(config.tune)
    jax.tree.map(np.testing.assert_array_equal, exported.params, tuned.pipeline.params)
