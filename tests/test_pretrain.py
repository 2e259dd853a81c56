import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from configs import pretrain_world
from personalize_jax.diffusion.process import logit_normal, rectified_flow
from personalize_jax.method.configuration_keys import check_keys, rules_of_pretraining
from personalize_jax.method.pretraining_start import starting_pipeline
from personalize_jax.models.params import flatten
from personalize_jax.pipeline import load_pipeline
from personalize_jax.pretrain import pretrain, world_examples
from personalize_jax.runtime import manifest
from personalize_jax.runtime.errors import UserError
from personalize_jax.world.captions import in_words, sample_phrases
from personalize_jax.world.dataset_builder import block_scenes
from personalize_jax.world.scene import select
from tests import processes, tiny
from tests.tiny_pretraining import SMALLEST, data
from tests.tiny_pretraining import get_config as config


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(directory, pipeline) of a base model's pretraining."""
    directory = tmp_path_factory.mktemp("base")
    return directory, pretrain(config("base"), directory, data())


def test_both_stages_are_pretrained_one_after_the_other_saved_and_sampled(base, tmp_path):
    folder = str(base[0] / "pipeline")
    cascade = pretrain(config("super_resolution", pretrained=folder), tmp_path, data())
    loaded = load_pipeline(tmp_path / "pipeline")
    assert [stage.name for stage in loaded.stages] == ["base", "super_resolution"]
    # The text encoder and its counts are the base model's; training the second stage leaves them as they are.
    np.testing.assert_array_equal(loaded.tokenizer.counts, base[1].tokenizer.counts)
    before = load_pipeline(folder)
    for name in ("text_encoder", "base"):
        jax.tree.map(np.testing.assert_array_equal, loaded.params[name], before.params[name])
    pictures = loaded.sample(["a dog"], [0], batch_size=1)
    assert [p.shape for p in pictures] == [(1, 8, 8, 3), (1, 16, 16, 3)]
    np.testing.assert_allclose(
        loaded.params["super_resolution"]["head"]["kernel"],
        cascade.params["super_resolution"]["head"]["kernel"],
        rtol=1e-3,
        atol=1e-6,
    )


@pytest.mark.slow
def test_a_rectified_flow_is_pretrained_saved_and_sampled(tmp_path):
    """From logit-normal times, predicting the velocity; sampled as pictures are, and as class images are."""
    flow = config("base", num_steps=40).unlock()
    schedule = {"kind": "rectified_flow", "shift": 2.0, "times": {"kind": "logit_normal"}}
    flow.stage = {**flow.stage, "schedule": schedule, "prediction": "velocity"}
    flow.training.update(batch_size=8, ema_decay=0.5)
    check_keys(flow, rules_of_pretraining(flow))
    pretrain(flow.lock(), tmp_path, data())
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").open()]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    loaded = load_pipeline(tmp_path / "pipeline")
    assert loaded.stages[0].process == dataclasses.replace(rectified_flow(2.0), times=logit_normal())
    for sampler in ("ddim", "ancestral"):
        sampling = loaded.stages[0].sampling._replace(sampler=sampler)
        (pictures,) = loaded.sample(["a dog"], [0], batch_size=1, samplings={"base": sampling})
        assert np.all(np.isfinite(pictures)) and np.ptp(pictures) > 0, sampler


def test_what_is_exported_is_the_average_of_what_was_trained(base):
    directory, pipeline = base
    start = starting_pipeline(config("base"))
    moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), pipeline.params, start.params)
    assert moved["base"]["head"]["kernel"] > 0 and moved["text_encoder"]["tokens"]["embedding"] > 0
    assert [json.loads(line)["step"] for line in (directory / "metrics.jsonl").open()] == [1, 2, 3, 4]


def test_fewer_steps_than_are_done_are_refused_before_anything_is_rendered(base, tmp_path):
    workdir = shutil.copytree(base[0], tmp_path / "run")
    manifest.record_config(config("base"), workdir)
    before = (workdir / "manifest.json").read_bytes()
    flags = ["--config=tests/tiny_pretraining.py:base", f"--data_dir={tmp_path / 'data'}", f"--workdir={workdir}"]
    finished = processes.command(tmp_path, "personalize_jax.pretrain", *flags, "--config.training.num_steps=2")
    assert finished.status == 2 and "has done 4 steps already" in finished.error
    assert (workdir / "manifest.json").read_bytes() == before and not (tmp_path / "data").exists()


def test_training_goes_on_from_given_weights(base, tmp_path):
    """One more step of next to no length: the weights and the counts are those given, and a little."""
    more = config("base", num_steps=1, pretrained=str(base[0] / "pipeline")).unlock()
    more.training.optimizer.learning_rate = 1e-9
    given = load_pipeline(base[0] / "pipeline")
    pipeline = pretrain(more, tmp_path, data())
    assert [stage.name for stage in pipeline.stages] == ["base"]
    for name in ("text_encoder", "base"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), pipeline.params[name], given.params[name]
        )
    assert given.tokenizer.counts.sum() < pipeline.tokenizer.counts.sum() <= 2 * given.tokenizer.counts.sum()


def test_a_stage_that_goes_on_is_as_its_configuration_says(base):
    folder = str(base[0] / "pipeline")
    more = config("base", pretrained=folder).unlock()
    more.stage.sampling = {**more.stage.sampling, "guidance_scale": 7.5}
    pipeline = starting_pipeline(more)
    assert pipeline.stages[0].sampling.guidance_scale == 7.5
    assert pipeline.family.specs[0]["sampling"]["guidance_scale"] == 7.5
    jax.tree.map(np.testing.assert_array_equal, pipeline.params["base"], load_pipeline(folder).params["base"])
    more.stage.network = {**SMALLEST, "channels": (32,)}
    with pytest.raises(UserError, match="another network than config.stage"):
        starting_pipeline(more)


def test_a_stage_goes_on_with_more_blocks_than_the_pipeline_has(base):
    """At first they change nothing; the parameters that the pipeline has are kept."""
    given = load_pipeline(base[0] / "pipeline")
    more = config("base", pretrained=str(base[0] / "pipeline")).unlock()
    more.stage.network = {**SMALLEST, "down_blocks": (2,)}
    grown = starting_pipeline(more)
    old, new = (flatten(pipeline.params["base"]) for pipeline in (given, grown))
    assert {path.split("/")[0] for path in new.keys() - old.keys()} == {"down_0_1"}
    for path, value in old.items():
        np.testing.assert_array_equal(new[path], value)
    pictures = [p.sample_stage(p.stages[0], ["a dog"], [0]) for p in (given, grown)]
    np.testing.assert_allclose(*(np.asarray(picture, int) for picture in pictures), atol=1)


def test_counts_are_of_the_words_that_were_seen(base):
    counts, tokenizer = base[1].tokenizer.counts, base[1].tokenizer
    seen = {token for caption in tiny.CAPTIONS for token in tokenizer.encode(caption)}
    assert set(np.flatnonzero(counts)) <= seen
    assert counts[tokenizer.encode("a")[0]] > 0
    assert not any(counts[token] for token in tokenizer.special_ids)
    # Sixteen captions of at most seven words or parts of words.
    assert 0 < counts.sum() <= 16 * (tiny.TEXT["max_length"] - 1)


@pytest.mark.slow
def test_a_finished_pretraining_is_prolonged(base, tmp_path):
    """Nothing but the end of the learning rate's schedule depends on the number of steps."""
    constant = {"decay_steps": 0, "warmup_steps": 0}

    def run(directory, num_steps):
        changed = config("base", num_steps).unlock()
        changed.training.optimizer.update(constant)
        return pretrain(changed.lock(), directory, data())

    run(tmp_path / "prolonged", 2)
    prolonged, straight = run(tmp_path / "prolonged", 4), run(tmp_path / "straight", 4)
    jax.tree.map(np.testing.assert_array_equal, prolonged.params, straight.params)
    np.testing.assert_array_equal(prolonged.tokenizer.counts, straight.tokenizer.counts)


def test_examples_have_the_resolutions_of_their_stage_and_the_object_as_mask(base):
    given = data()
    pipeline = starting_pipeline(config("super_resolution", pretrained=str(base[0] / "pipeline")))
    examples = world_examples(pipeline, given)
    np.testing.assert_array_equal(examples.image, given["image"][..., :3])
    assert examples.low_res.shape == (10, 8, 8, 3)
    mean = given["image"][:, 2:4, 4:6, :3].mean((1, 2))
    np.testing.assert_allclose(examples.low_res[:, 1, 2], mean, atol=0.5)
    np.testing.assert_array_equal(examples.object_mask, given["image"][..., 3])
    tokens = pipeline.tokenizer(given["captions"][3].tolist())
    np.testing.assert_array_equal(examples.tokens[examples.caption[3]], tokens)


def test_examples_have_the_captions_of_their_phrases(base):
    scenes = select(block_scenes("train", 0), slice(10))
    phrases = sample_phrases(scenes, np.random.default_rng(0), 2)
    examples = world_examples(base[1], {"image": data()["image"], "phrases": phrases})
    assert examples.caption.shape == (10, 2)
    expected = [base[1].tokenizer(captions) for captions in in_words(phrases)]
    np.testing.assert_array_equal(examples.tokens[examples.caption], expected)
    np.testing.assert_array_equal(examples.tokens[:1], base[1].tokenizer([""]))


def test_the_first_stage_must_exist_before_the_second(tmp_path):
    with pytest.raises(UserError, match="No pipeline"):
        pretrain(config("super_resolution", pretrained=str(tmp_path)), tmp_path / "run", data())


@pytest.mark.parametrize("stage", ["base", "super_resolution"])
def test_shipped_configurations_are_complete_and_locked(stage):
    shipped = pretrain_world.get_config(stage)
    assert shipped.is_locked and shipped.stage.name == stage
    training = shipped.training
    assert training.num_steps % training.steps_per_dispatch == 0
    assert training.optimizer.warmup_steps + training.optimizer.decay_steps <= training.num_steps
    with pytest.raises(AttributeError):
        shipped.training.learning_rate = 1.0
    with pytest.raises(ValueError, match="base or super_resolution"):
        pretrain_world.get_config("latent")


@pytest.mark.slow
def test_the_command_renders_trains_and_saves(tmp_path):
    command = "personalize_jax.pretrain", "--config=tests/tiny_pretraining.py:base", f"--data_dir={tmp_path / 'data'}"
    finished = processes.command(tmp_path, *command, f"--workdir={tmp_path / 'run'}")
    assert finished.status == 0, finished.error
    assert manifest.read(tmp_path / "run")["done"]
    assert [stage.name for stage in load_pipeline(tmp_path / "run" / "pipeline").stages] == ["base"]
