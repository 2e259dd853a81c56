"""Public models from photographs to exported folders, with tiny random pipelines in the exact shapes."""

import json
from pathlib import Path

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers

from configs import deepfloyd_if, stable_diffusion
from personalize_jax.export import export
from personalize_jax.method import personalization
from personalize_jax.method.personalization import (
    load_pretrained,
    load_subject,
    personalize_subject,
    stage_examples,
    with_embeddings,
)
from personalize_jax.method.personalized import load_personalized
from personalize_jax.models.params import flatten
from personalize_jax.pipeline import load_pipeline
from personalize_jax.runtime.interruption import Stopped
from personalize_jax.training.examples import sample_batch
from tests import published_folders, tiny, tiny_public

PHOTOS = Path(__file__).parents[1] / ".." / "shared" / "dreambooth" / "dataset"
LORA = {"lora.rank": 2, "trainable": ((".*", False),)}


def photos_of(subject):
    """The first four photographs of a subject of the DreamBooth dataset."""
    folder = PHOTOS / subject
    if not folder.is_dir():
        pytest.skip(f"the DreamBooth dataset is not at {folder}")
    return sorted(folder.glob("*.jpg"))[:4]


def small(config, pretrained, tmp_path, **training):
    """The configuration with a run's length and sizes cut down."""
    config = config.copy_and_resolve_references().unlock()
    config.pretrained = pretrained
    config.compute.dtype = "float32"
    config.subject.update(registry=str(tmp_path / "registry.json"), rule="rarest")
    config.class_images.update(count=4, num_steps=3, batch_size=4)
    for name in ("training", "super_resolution_training"):
        if name in config:
            config[name].update(num_steps=12, batch_size=4, steps_per_dispatch=1, log_every=4, checkpoint_every=6)
            config[name].optimizer.learning_rate = 3e-3
            config[name].update_from_flattened_dict(training)
    return config.lock()


def save_if(folder):
    tiny_public.deepfloyd_if().save_pretrained(folder / "first")
    tiny_public.deepfloyd_if_super_resolution().save_pretrained(folder / "second")
    return (str(folder / "first"), str(folder / "second"))


def save_sd(folder, prediction="epsilon"):
    tiny_public.stable_diffusion(prediction).save_pretrained(folder / "sd")
    return str(folder / "sd")


def save_published_sd(folder, name):
    return str(published_folders.write(name, folder / name, side=8))


def save_published_if(folder):
    sides = {"IF-I-M": 8, "IF-II-M": 16}
    return tuple(str(published_folders.write(name, folder / name, side)) for name, side in sides.items())


def loss_on_fixed_batch(pipeline, subject, stage, config):
    """The loss of the subject's group, for always the same pictures, times and noise."""
    examples = with_embeddings(pipeline, stage_examples(pipeline, stage, subject.images_NHWC, subject.labels))
    batch = {"instance": sample_batch(examples, jax.random.key(0), 16, 0.0)}
    objective = tiny.objective(config.weighting, 0.0, augmentation_levels=tuple(config.augmentation_levels))
    params = pipeline.networks(stage.name)

    @jax.jit
    def loss(params, batch):
        key = jax.random.key(1)
        return pipeline.family.loss(stage, objective, params, params, batch, key)[0]

    return float(loss(params, batch))


CASES = {
    "stable_diffusion": ("dog", lambda f: save_sd(f), stable_diffusion.get_config("1.5"), {}),
    "stable_diffusion_v_lora": (
        "backpack",
        lambda f: save_sd(f, "v_prediction"),
        stable_diffusion.get_config("2.1"),
        LORA,
    ),
    "deepfloyd_if": ("dog", save_if, deepfloyd_if.get_config("M"), {"weighting": "min_snr", "microbatches": 2}),
    "published 1.5": ("dog", lambda f: save_published_sd(f, "sd-1.5"), stable_diffusion.get_config("1.5"), {}),
    "published 2.1": ("dog", lambda f: save_published_sd(f, "sd-2.1"), stable_diffusion.get_config("2.1"), {}),
    "published 2.1-base": (
        "dog",
        lambda f: save_published_sd(f, "sd-2.1-base"),
        stable_diffusion.get_config("2.1-base"),
        {},
    ),
    "published IF": ("dog", save_published_if, deepfloyd_if.get_config("M"), {}),
    "deepfloyd_if_bound": ("backpack", save_if, deepfloyd_if.get_config("XL"), {"vlb_weight": 1.0, "ema_decay": 0.9}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_photographs_to_exported_folders(case, tmp_path):
    subject_name, save, config, changes = CASES[case]
    files = photos_of(subject_name)
    config = small(config, save(tmp_path), tmp_path, **changes)
    workdir = tmp_path / "run"
    pipeline = load_pretrained(config)
    photos = load_subject(files, subject_name, pipeline.stages[-1].resolution)
    tuned = personalize_subject(pipeline, photos, config, workdir)

    for stage in pipeline.stages:
        training = config.training if stage.name == "base" else config.super_resolution_training
        before = loss_on_fixed_batch(pipeline, tuned.subject, stage, training)
        after = loss_on_fixed_batch(tuned.pipeline, tuned.subject, stage, training)
        assert after < 0.97 * before, stage.name
    pictures = tuned.sample(f"a [V] {subject_name} in the snow", num_images=2, batch_size=2)
    side = pipeline.stages[-1].resolution
    assert pictures.shape == (2, side, side, 3) and pictures.dtype == np.uint8
    np.testing.assert_array_equal(
        load_personalized(workdir).sample(f"a [V] {subject_name} in the snow", num_images=2, batch_size=2), pictures
    )

    assert export(workdir, tmp_path / "out") == dict.fromkeys(config.tune, 12)
    again = load_pipeline(tmp_path / "out")
    for name, params in tuned.pipeline.params.items():
        for path, value in flatten(params).items():
            np.testing.assert_array_equal(flatten(again.params[name])[path], value)
    learned = bool(changes.get("vlb_weight"))
    for stage in again.stages:
        assert stage.sampling == tuned.pipeline.stage(stage.name).sampling
        if stage.learned_variance:
            assert stage.sampling.variance == ("learned_range" if learned else "small")
    theirs_read_it(again, tmp_path / "out", adapters="lora.rank" in changes)


def theirs_read_it(pipeline, folder, adapters):
    """diffusers loads what we wrote, and its networks give the same outputs; adapters give them to the pretrained."""
    for stage in pipeline.stages:
        target = folder if len(pipeline.stages) == 1 else folder / stage.name
        theirs = diffusers.DiffusionPipeline.from_pretrained(target)
        assert json.loads((target / "model_index.json").read_text())["_class_name"] == type(theirs).__name__
        if theirs.tokenizer is not None:
            assert theirs.tokenizer("a dog").input_ids == pipeline.tokenizer.backend("a dog").input_ids
        rng = np.random.default_rng(0)
        channels = stage.channels * (1 if stage.low_resolution is None else 2)
        x = rng.normal(size=(2, *stage.shape[:2], channels)).astype(np.float32)
        z, low = x[..., : stage.channels], x[..., stage.channels :]
        text = pipeline.condition(["a dog", "a teapot"])
        low_res = None if stage.low_resolution is None else (low, np.array([0.3, 0.5], np.float32))
        ours = jax.jit(stage.apply)(pipeline.params[stage.name], z, np.array([0.5, 0.1], np.float32), text, low_res)
        options = {} if low_res is None else {"class_labels": torch.tensor([299, 499])}
        unets = [theirs.unet]
        if adapters:
            pretrained = tiny_public.stable_diffusion("v_prediction")
            pretrained.load_lora_weights(folder / "lora")
            unets.append(pretrained.unet)
        for unet in unets:
            with torch.no_grad():
                output = unet(
                    torch.from_numpy(np.moveaxis(x, -1, 1).copy()),
                    torch.tensor([499, 99]),
                    encoder_hidden_states=torch.tensor(np.asarray(text.embeddings)),
                    **options,
                ).sample
            reference = np.moveaxis(output.numpy(), 1, -1)
            np.testing.assert_allclose(ours, reference, atol=1e-4 * np.abs(reference).max())


@pytest.mark.slow
def test_an_export_halfway_takes_the_last_checkpoint_and_leaves_other_stages_alone(tmp_path, monkeypatch):
    files = photos_of("dog")
    config = small(deepfloyd_if.get_config("M"), save_if(tmp_path), tmp_path)
    pipeline, whole = load_pretrained(config), personalization.train

    def train(program, directory, *others):
        if directory.name == "super_resolution":
            raise Stopped
        return whole(program, directory, *others)

    monkeypatch.setattr(personalization, "train", train)
    with pytest.raises(Stopped):
        personalize_subject(pipeline, load_subject(files, "dog", 16), config, tmp_path / "run")
    assert export(tmp_path / "run", tmp_path / "out") == {"base": 12}
    again = load_pipeline(tmp_path / "out")
    for path, value in flatten(pipeline.params["super_resolution"]).items():
        np.testing.assert_array_equal(flatten(again.params["super_resolution"])[path], value)
    assert json.loads((tmp_path / "out" / "base" / "scheduler" / "scheduler_config.json").read_text())[
        "variance_type"
    ] == ("fixed_small")


@pytest.mark.slow
def test_an_inverted_text_is_a_row_of_the_exported_table(tmp_path):
    """Textual Inversion of Stable Diffusion: transformers reads the table, of which one row has moved."""
    config = small(stable_diffusion.get_config("1.5:textual_inversion"), save_sd(tmp_path), tmp_path)
    pipeline = load_pretrained(config)
    tuned = personalize_subject(pipeline, load_subject(photos_of("dog"), "dog", 64), config, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out")
    before, after = (
        transformers.CLIPTextModel.from_pretrained(folder / "text_encoder").get_input_embeddings().weight.detach()
        for folder in (tmp_path / "sd", tmp_path / "out")
    )
    moved = torch.nonzero((before != after).any(1)).ravel().tolist()
    assert moved == list(tuned.subject.identifier.token_ids)
    for path, value in flatten(pipeline.params["base"]).items():
        np.testing.assert_array_equal(flatten(tuned.pipeline.params["base"])[path], value)
