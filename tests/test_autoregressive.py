"""The autoregressive family through the commands' own functions, from pretraining to export."""

import jax
import numpy as np
import pytest

from configs import autoregressive, pretrain_autoregressive
from personalize_jax.evaluate import score_runs
from personalize_jax.export import export
from personalize_jax.method import configuration
from personalize_jax.method.changes import changed
from personalize_jax.method.configuration_keys import check_keys, rules_of_pretraining
from personalize_jax.method.personalization import load_pretrained, load_subject, personalize_subject
from personalize_jax.method.personalized import load_personalized
from personalize_jax.method.pretraining_start import starting_pipeline
from personalize_jax.pipeline import load_pipeline
from personalize_jax.pretrain import pretrain
from personalize_jax.runtime import interruption
from personalize_jax.runtime.errors import UserError
from personalize_jax.training import loop
from tests import tiny, tiny_autoregressive


def data():
    """Eight pictures of 16 pixels, the object in their left half, and two captions each."""
    image = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 4), np.uint8)
    image[..., 3] = 255 * (np.arange(16) < 8)
    captions = np.array([[tiny.CAPTIONS[(i + j) % 3] for j in range(2)] for i in range(8)])
    return {"image": image, "captions": captions}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Folders of the pipelines after the tokenizer's pretraining, and after the transformer's."""
    folder = tmp_path_factory.mktemp("autoregressive")
    pretrain(tiny_autoregressive.pretraining("picture_tokenizer"), folder / "tokenizer", data())
    start = str(folder / "tokenizer" / "pipeline")
    pretrain(tiny_autoregressive.pretraining("base", pretrained=start), folder / "base", data())
    return folder / "tokenizer" / "pipeline", folder / "base" / "pipeline"


@pytest.mark.parametrize("stage", ["picture_tokenizer", "base"])
def test_shipped_configurations_are_complete(stage):
    config = pretrain_autoregressive.get_config(stage)
    check_keys(config, rules_of_pretraining(config))
    with pytest.raises(ValueError, match="picture_tokenizer or base"):
        pretrain_autoregressive.get_config("decoder")


@pytest.mark.parametrize("method", ["dreambooth", "textual_inversion", "lora", "custom_diffusion"])
def test_every_method_finds_its_parameters(method):
    pipeline, config = tiny_autoregressive.pipeline(), autoregressive.get_config(method)
    configuration.check(pipeline, changed(config, class_images__num_steps=4))
    with_prior = changed(config, training__prior__weight=1.0)
    with pytest.raises(UserError, match="num_steps=64, and each of its 4 tokens"):
        configuration.check(pipeline, with_prior)


def test_each_pretraining_trains_its_own_networks(pretrained):
    tokenizer, base = map(load_pipeline, pretrained)
    for name in ("picture_tokenizer", "text_encoder"):
        same = jax.tree.map(np.array_equal, tokenizer.params[name], base.params[name])
        assert all(jax.tree.leaves(same)) == (name == "picture_tokenizer")
    assert not tokenizer.tokenizer.counts.any() and base.tokenizer.counts.any()
    assert (base.sample(["a dog"], [0])[-1]).shape == (1, 8, 8, 3)


def test_a_transformer_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="needs a picture tokenizer; pretrain that first"):
        pretrain(tiny_autoregressive.pretraining("base", pretrained=""), tmp_path, data())


def test_weights_of_another_family_are_refused():
    with pytest.raises(UserError, match="world is no Autoregressive, which the configuration is for"):
        starting_pipeline(tiny_autoregressive.pretraining("base", pretrained="world"))


@pytest.fixture(scope="module", params=[pytest.param("sampled", marks=pytest.mark.slow), "frozen_prediction"])
def run(request, pretrained, photos, tmp_path_factory):
    """A run of a form of the prior term: its configuration, directory and result."""
    workdir = tmp_path_factory.mktemp("runs") / request.param
    registry = str(workdir.parent / "registry.json")
    form = {"training__prior__form": request.param, "subject__registry": registry}
    config = tiny_autoregressive.get_config(pretrained[1], **form)
    pipeline, subject = load_pretrained(config), load_subject(photos, "dog", 8)
    return config, workdir, personalize_subject(pipeline, subject, config, workdir)


def test_a_run_is_sampled_evaluated_and_exported(run, tmp_path):
    config, workdir, tuned = run
    before = load_pretrained(config)
    moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), dict(tuned.pipeline.params), dict(before.params))
    assert any(jax.tree.leaves(moved["base"])) and any(jax.tree.leaves(moved["text_encoder"]))
    assert not any(jax.tree.leaves(moved["picture_tokenizer"]))
    assert len(list((workdir / "class_images" / "base").glob("*.png"))) == 4
    prompt = "a [V] dog in the snow"
    np.testing.assert_array_equal(load_personalized(workdir).sample(prompt), tuned.sample(prompt))
    rows = score_runs({workdir: config}, None)
    assert {row.role for row in rows} == {"photo", "subject", "class", "class before"}
    assert all("DINO" in row.scores for row in rows if row.role == "subject")
    assert export(workdir, tmp_path) == {"base": 6}
    jax.tree.map(np.testing.assert_array_equal, dict(load_pipeline(tmp_path).params), dict(tuned.pipeline.params))


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_like_one_that_was_not(run, photos, tmp_path, monkeypatch):
    config, _, tuned = run
    asked = iter([False] * 4 + [True] + [False] * 10)
    monkeypatch.setattr(loop.interruption, "requested", lambda: next(asked))
    pipeline, subject = load_pretrained(config), load_subject(photos, "dog", 8)
    config = changed(config, subject__registry=str(tmp_path / "registry.json"))
    with pytest.raises(interruption.Stopped):
        personalize_subject(pipeline, subject, config, tmp_path / "run")
    resumed = personalize_subject(pipeline, subject, config, tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, dict(resumed.pipeline.params), dict(tuned.pipeline.params))


@pytest.mark.parametrize("method", ["textual_inversion", pytest.param("lora", marks=pytest.mark.slow)])
def test_other_parameterizations_train(method, pretrained, photos, tmp_path):
    settings = autoregressive.get_config(method).training
    config = tiny_autoregressive.get_config(
        pretrained[1],
        subject__registry=str(tmp_path / "registry.json"),
        training__trainable=settings.trainable,
        training__lora__rank=min(2, settings.lora.rank),
        training__prior__weight=0.0,
    )
    pipeline = load_pretrained(config)
    tuned = personalize_subject(pipeline, load_subject(photos, "dog", 8), config, tmp_path / "run")
    prompt = f"a {tuned.subject.phrase}".replace("[V]", tuned.subject.identifier.text)
    assert tuned.pipeline.fingerprint != pipeline.fingerprint
    np.testing.assert_array_equal(load_personalized(tmp_path / "run").sample(prompt), tuned.sample(prompt))
