"""Specs of public pipelines: what diffusers' pipelines mend, and what cannot be used and is said before any compute."""

import inspect
import json

import numpy as np
import pytest
from diffusers import IFPipeline, IFSuperResolutionPipeline, StableDiffusionPipeline

from personalize_jax.families import public, registry
from personalize_jax.families.public import OURS
from personalize_jax.pipeline import load_pipeline, save_pipeline
from personalize_jax.planning import published
from personalize_jax.runtime.errors import UserError
from tests import tiny_public

STABLE_DIFFUSION = ["stable-diffusion-v1-5/stable-diffusion-v1-5"]
IF = ["DeepFloyd/IF-I-M-v1.0", "DeepFloyd/IF-II-M-v1.0"]


def built(repositories, stage=-1, **changes):
    """The architecture of a published pipeline with other values for keys of one stage's components, or others'."""
    spec = json.loads(json.dumps(published.spec(repositories)))
    for name, values in changes.items():
        (spec if name in spec else spec["stages"][stage])[name].update(values)
    return public.build(registry.family_of(spec["stages"][0]["class"]), spec, None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd")
    tiny_public.stable_diffusion().save_pretrained(folder)
    return folder


def edit(file, **changes):
    """Change a JSON file; what stood there."""
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | changes))
    return before


@pytest.mark.parametrize(
    ("unet", "words"),
    [
        ({"in_channels": 9}, "in_channels 9 and out_channels 4.*inpainting"),
        ({"in_channels": 5}, "in_channels 5"),
        ({"in_channels": 7}, "in_channels 7"),
        ({"out_channels": 3}, "out_channels 3"),
        ({"class_embed_type": "timestep"}, "class_embed_type 'timestep'"),
        ({"num_class_embeds": 1000}, "num_class_embeds"),
        ({"sample_size": None}, "sample_size is None"),
        ({"sample_size": [64, 96]}, r"sample_size is \[64, 96\]"),
        ({"sample_size": 0}, "sample_size is 0"),
        ({"cross_attention_dim": 1024}, "768 wide, and the base U-Net takes 1024"),
    ],
)
def test_a_unet_of_another_kind_is_refused(unet, words):
    with pytest.raises(UserError, match=words):
        built(STABLE_DIFFUSION, unet=unet)


@pytest.mark.parametrize(
    ("stage", "unet", "words"),
    [
        (0, {"in_channels": 6}, "IFPipeline takes 3 channels.*in_channels 6"),
        (1, {"in_channels": 3}, "IFSuperResolutionPipeline takes 6 channels.*in_channels 3"),
        (0, {"class_embed_type": "timestep"}, "IFPipeline has no input"),
        (0, {"out_channels": 3}, "learned_range.*second half"),
    ],
)
def test_a_unet_of_the_other_stage_is_refused(stage, unet, words):
    with pytest.raises(UserError, match=words):
        built(IF, stage, unet=unet)


def test_the_side_may_be_said_twice():
    assert built(STABLE_DIFFUSION, unet={"sample_size": [64, 64]}).stages == built(STABLE_DIFFUSION).stages


@pytest.mark.parametrize(
    "unet", [{"attention_head_dim": 7}, {"addition_embed_type": "text", "addition_embed_type_num_heads": 7}]
)
def test_sizes_that_do_not_fit_each_other_are_answered_in_a_sentence(unet):
    with pytest.raises(UserError, match="sizes do not fit each other.*give a model"):
        built(STABLE_DIFFUSION, unet=unet).shapes()


@pytest.mark.parametrize(
    ("version", "size", "expected"),
    [
        ("0.8.0", 32, 64),
        ("0.8.0.dev0", 8, 64),
        ("0.9.0.dev0", 32, 32),
        ("1.0.0", 8, 8),
    ],
)
def test_models_of_512_pixels_are_told_by_their_age(version, size, expected, saved, monkeypatch, caplog):
    file = saved / "unet" / "config.json"
    before = edit(file, sample_size=size, _diffusers_version=version)
    theirs = StableDiffusionPipeline.from_pretrained(saved)
    monkeypatch.setattr("personalize_jax.families.public.load_weights", lambda folder, abstract, *_: abstract)
    pipeline = load_pipeline(saved)
    file.write_text(before)
    assert pipeline.stages[0].shape[0] == theirs.unet.config.sample_size == expected
    assert pipeline.family.spec["stages"][0]["unet"]["sample_size"] == expected
    assert ("sample_size is" in caplog.text) == (size != expected)


def test_a_tokenizer_with_more_tokens_than_rows_is_refused_before_weights_are_read(saved, monkeypatch):
    monkeypatch.setattr("personalize_jax.families.public.load_weights", lambda *_: pytest.fail("weights were read"))
    file = saved / "text_encoder" / "config.json"
    before = edit(file, vocab_size=len(tiny_public.clip_tokenizer()) - 1)
    with pytest.raises(UserError, match=r"token '<\|endoftext\|>' with id 568.*568 rows"):
        load_pipeline(saved)
    file.write_text(before)


def test_captions_are_cleaned_as_by_diffusers_for_a_stage_of_if_alone_and_not_for_stable_diffusion(
    saved, tmp_path, monkeypatch
):
    monkeypatch.setattr("personalize_jax.families.public.load_weights", lambda folder, abstract, *_: abstract)
    caption, padded = "A Dog in the snow, at https://example.com/dogs", {"padding": "max_length", "max_length": 77}
    (alone := tiny_public.deepfloyd_if()).save_pretrained(tmp_path)
    [cleaned] = alone._text_preprocessing(caption, clean_caption=True)
    assert cleaned == "a dog in the snow, at"
    np.testing.assert_array_equal(
        load_pipeline(tmp_path).tokenizer([caption])[0], alone.tokenizer(cleaned, **padded)[0].ids
    )
    as_written = tiny_public.clip_tokenizer()(caption, **padded)[0].ids
    np.testing.assert_array_equal(load_pipeline(saved).tokenizer([caption])[0], as_written)


@pytest.mark.parametrize("content", ["{", '{"sampling": {"odd": 1}}', '{"sampling": 3}'])
def test_a_damaged_file_of_our_own_is_named(content, saved):
    file = saved / OURS
    file.write_text(content)
    with pytest.raises(UserError, match=OURS):
        load_pipeline(saved)
    file.unlink()


def test_super_resolution_is_told_the_level_of_diffusers():
    stage = built(IF).stages[1]
    theirs = inspect.signature(IFSuperResolutionPipeline.__call__).parameters["noise_level"].default
    assert stage.augmentation.network_time(stage.sampling.augmentation_level) == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize(("variance", "theirs"), [("small", "fixed_small"), ("learned_range", "learned_range")])
def test_diffusers_samples_a_saved_stage_by_the_variance_that_it_is_sampled_with_here(variance, theirs, tmp_path):
    tiny_public.deepfloyd_if().save_pretrained(tmp_path / "before")
    pipeline = load_pipeline(tmp_path / "before")
    sampling = pipeline.stages[0].sampling._replace(variance=variance)
    save_pipeline(pipeline.replace_sampling(base=sampling), tmp_path / "after", "float32")
    assert IFPipeline.from_pretrained(tmp_path / "after").scheduler.config.variance_type == theirs
