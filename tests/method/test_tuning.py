"""How a stage is tuned: what it is given, and the same again in another way."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

import personalize_jax as pj
from personalize_jax.method import personalization
from personalize_jax.method.changes import changed
from personalize_jax.method.personalization import retune_stage
from personalize_jax.runtime.errors import UserError
from tests import tiny, tiny_world
from tests.method.test_personalization import equal

FROZEN_TEXT = (("denoiser/", True), ("text_encoder/", False))


def test_each_group_learns_its_own_pictures_under_its_own_caption(monkeypatch, tmp_path):
    """Captions are embedded once, unless the text encoder is trained."""
    pipeline, given = tiny.pipeline(), []
    monkeypatch.setattr(personalization, "stage_program", lambda *arguments: given.append(arguments[3]))
    monkeypatch.setattr(personalization, "train", lambda *arguments: None)
    for name in ("trained_of", "save_trained", "with_trained"):
        monkeypatch.setattr(personalization, name, lambda *arguments: None)
    photos, drawn = (np.full((n, 16, 16, 3), value, np.uint8) for n, value in ((2, 10), (3, 200)))
    subject = SimpleNamespace(
        identifier=SimpleNamespace(token_ids=[5]),
        class_noun=SimpleNamespace(noun="dog"),
        images_NHWC=photos,
        labels=["a red dog"] * 2,
        class_prompt="a dog",
    )
    for trainable in (FROZEN_TEXT, ((".*", True),)):
        config = tiny.training(prior__weight=1.0, trainable=trainable)
        personalization.tune(pipeline, pipeline.stages[1], subject, {"super_resolution": drawn}, config, 0, tmp_path)
    for group, pictures, caption in (("instance", photos, "a red dog"), ("prior", drawn, "a dog")):
        examples = given[0][group]
        np.testing.assert_array_equal(examples.image, pictures)
        np.testing.assert_array_equal(examples.tokens, pipeline.tokenizer(["", caption]))
        np.testing.assert_allclose(examples.cond.embeddings, pipeline.condition(["", caption]).embeddings, atol=1e-5)
        assert given[1][group].cond is None


@pytest.mark.parametrize(("vlb_weight", "variance"), [(0.0, "small"), (1.0, "learned_range")])
def test_variances_that_were_not_trained_are_not_sampled_with(vlb_weight, variance):
    pipeline = tiny.pipeline()
    sampling = pipeline.stages[0].sampling._replace(sampler="ancestral", variance="learned_range")
    base = dataclasses.replace(pipeline.stages[0], sampling=sampling, learned_variance=True)
    pipeline = dataclasses.replace(pipeline, family=pipeline.family.with_stages((base, pipeline.stages[1])))
    config = tiny_world.get_config("pretrained", training__vlb_weight=vlb_weight)
    tuned = personalization.with_tuned_sampling(pipeline, config, ["base"])
    assert tuned.stage("base").sampling.variance == variance
    assert tuned.stage("super_resolution") == pipeline.stages[1]


@pytest.fixture(scope="module")
def with_text(tmp_path_factory, pretrained, photos):
    """(run directory, pretrained, personalised, configuration) of a run whose base stage trains the text encoder."""
    folder = tmp_path_factory.mktemp("with_text")
    parts = ("training", "super_resolution_training")
    once = {"num_steps": 1, "checkpoint_every": 1, "prior__weight": 0.0, "optimizer__learning_rate": 0.01}
    config = tiny_world.get_config(
        pretrained,
        subject__registry=str(folder / "registry.json"),
        **{f"{part}__{key}": value for part in parts for key, value in once.items()},
        training__trainable=((".*", True),),
        training__optimizer__decay_steps=0,
    )
    pipeline = pj.load_pipeline(pretrained)
    subject = pj.load_subject(photos, "dog", 16)
    return folder / "run", pipeline, pj.personalize_subject(pipeline, subject, config, folder / "run"), config


def test_a_text_encoder_that_is_tuned_is_kept(with_text):
    workdir, pipeline, personalized, _ = with_text
    assert not (workdir / "class_images").exists()
    kept = pj.load_personalized(workdir).pipeline.params
    for name in ("base", "super_resolution", "text_encoder"):
        assert not equal(personalized.pipeline.params[name], pipeline.params[name])
        assert equal(personalized.pipeline.params[name], kept[name])


def test_a_text_encoder_that_a_later_stage_was_tuned_to_is_not_trained_further(with_text, photos):
    workdir, pipeline, _, config = with_text
    subject, longer = pj.load_subject(photos, "dog", 16), changed(config, training__num_steps=2)
    with pytest.raises(UserError, match="tuned super_resolution to the text encoder .* give training.num_steps=1"):
        personalization.claim_run_directory(pipeline, subject, longer, workdir)


@pytest.mark.parametrize("name", ["base", "super_resolution"])
def test_a_stage_tuned_again_in_the_same_way_is_the_same_stage(with_text, tmp_path, name):
    """Both are fitted to the text encoder that they are sampled with."""
    workdir, pipeline, personalized, config = with_text
    again = retune_stage(pipeline, personalized, name, config, workdir, tmp_path / name).pipeline
    for network, params in personalized.pipeline.params.items():
        assert equal(again.params[network], params), network


@pytest.mark.parametrize("change", [{"tune": ("super_resolution",)}, {"training__trainable": FROZEN_TEXT}])
def test_without_its_training_the_text_encoder_is_the_pretrained_one(with_text, tmp_path, change):
    workdir, pipeline, personalized, config = with_text
    other = retune_stage(pipeline, personalized, "base", changed(config, **change), workdir, tmp_path / "base").pipeline
    assert equal(other.params["text_encoder"], pipeline.params["text_encoder"])
    assert equal(other.params["base"], pipeline.params["base"]) == ("tune" in change)
