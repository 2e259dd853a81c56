import json
import shutil
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from personalize_jax.families.registry import LAYOUTS
from personalize_jax.formats.diffusers_folder import (
    read_components,
    resolve,
    write_component_config,
    write_model_index,
)
from personalize_jax.runtime.errors import UserError
from tests import tiny_public

MAKERS = {
    "StableDiffusionPipeline": tiny_public.stable_diffusion,
    "IFPipeline": tiny_public.deepfloyd_if,
    "IFSuperResolutionPipeline": tiny_public.deepfloyd_if_super_resolution,
}


@pytest.fixture(scope="module")
def theirs():
    return {name: make() for name, make in MAKERS.items()}


@pytest.fixture(scope="module")
def saved(theirs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines")
    for name, pipeline in theirs.items():
        pipeline.save_pretrained(folder / name)
    return folder


@pytest.fixture
def stable_diffusion(saved, tmp_path):
    """A copy that may be changed."""
    return shutil.copytree(saved / "StableDiffusionPipeline", tmp_path / "pipeline")


def change_index(folder, **changes):
    file = folder / "model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def files(folder):
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def said(scheduler):
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


@pytest.mark.parametrize("name", LAYOUTS)
def test_reads_what_diffusers_saves(name, theirs, saved):
    components = read_components(saved / name, LAYOUTS)
    assert components.pipeline == name
    present = {key: value for key, value in theirs[name].components.items() if value is not None}
    assert components.classes == {key: type(value).__name__ for key, value in present.items()}
    for key, config in components.configs.items():
        expected = present[key].config
        expected = dict(expected) if key != "text_encoder" else expected.to_dict()
        for field in ("block_out_channels", "num_train_timesteps", "d_model", "hidden_size", "beta_schedule"):
            assert config.get(field) == json.loads(json.dumps(expected.get(field)))
    assert components.configs.keys() == present.keys() - {"tokenizer"}
    assert "tokenizer" in components.classes


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("size", ["10GB", "50KB"])
def test_diffusers_loads_what_we_write(name, size, theirs, saved, tmp_path):
    components = read_components(saved / name, LAYOUTS)
    for key, config in components.configs.items():
        write_component_config(tmp_path, key, config)
        if key in ("unet", "vae", "text_encoder"):
            theirs[name].components[key].save_pretrained(tmp_path / "weights" / key, max_shard_size=size)
            for file in (tmp_path / "weights" / key).glob("*.safetensors*"):
                shutil.move(file, tmp_path / key)
    shutil.rmtree(tmp_path / "weights")
    shutil.copytree(saved / name / "tokenizer", tmp_path / "tokenizer")
    write_model_index(tmp_path, name, components.layout, components.classes)
    assert size == "50KB" or files(tmp_path) == files(saved / name)
    again = getattr(diffusers, name).from_pretrained(tmp_path)
    for key, component in theirs[name].components.items():
        assert type(again.components[key]) is type(component)
        if isinstance(component, torch.nn.Module):
            state = again.components[key].state_dict()
            assert all(torch.equal(state[tensor], value) for tensor, value in component.state_dict().items())
        elif key.endswith("scheduler"):
            assert said(again.components[key]) == said(component)
    words = "a photo of a zx dog"
    assert again.tokenizer(words).input_ids == theirs[name].tokenizer(words).input_ids


def test_super_resolution_may_share_the_text_encoder(saved, tmp_path):
    source = saved / "IFSuperResolutionPipeline"
    whole = read_components(source, LAYOUTS)
    classes = {name: whole.classes[name] for name in ("unet", "scheduler", "image_noising_scheduler")}
    for name in classes:
        shutil.copytree(source / name, tmp_path / name)
    write_model_index(tmp_path, whole.pipeline, whole.layout, classes)
    components = read_components(tmp_path, LAYOUTS)
    assert components.classes == classes
    again = diffusers.IFSuperResolutionPipeline.from_pretrained(tmp_path)
    assert again.text_encoder is None and again.tokenizer is None


@pytest.mark.parametrize("name", ["StableDiffusionXLPipeline", "IFImg2ImgPipeline", None, ["IFPipeline"]])
def test_names_pipelines_that_cannot_be_used(name, stable_diffusion):
    change_index(stable_diffusion, _class_name=name)
    with pytest.raises(UserError, match=str(name).strip("[]")):
        read_components(stable_diffusion, LAYOUTS)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"unet": ["diffusers", "UNetMotionModel"]}, "unet UNetMotionModel"),
        ({"vae": ["diffusers", "AutoencoderTiny"]}, "vae AutoencoderTiny"),
        ({"vae": [None, None]}, "no vae"),
        ({"vae": [None, "AutoencoderKL"]}, "no vae"),
        ({"unet": []}, "no unet"),
        ({"unet": ["diffusers", ["UNet2DConditionModel"]]}, "unet"),
    ],
)
def test_names_components_that_cannot_be_used(changes, words, stable_diffusion):
    change_index(stable_diffusion, **changes)
    with pytest.raises(UserError, match=words):
        read_components(stable_diffusion, LAYOUTS)


@pytest.mark.parametrize("name", ["../outside", "transformer", "image_noising_scheduler"])
def test_a_component_that_the_pipeline_does_not_know_is_ignored_with_a_warning(name, stable_diffusion, caplog):
    before = read_components(stable_diffusion, LAYOUTS)
    change_index(stable_diffusion, **{name: ["diffusers", "AutoencoderKL"]})
    assert read_components(stable_diffusion, LAYOUTS) == before
    assert f"component {name!r}" in caplog.text
    assert (
        diffusers.StableDiffusionPipeline.from_pretrained(stable_diffusion).components.keys() >= before.classes.keys()
    )


def test_names_that_begin_with_an_underscore_are_no_components(stable_diffusion, caplog):
    before = read_components(stable_diffusion, LAYOUTS)
    change_index(stable_diffusion, _ignore_files=["unet/diffusion_pytorch_model.bin"], _note=["diffusers", "Note"])
    assert read_components(stable_diffusion, LAYOUTS) == before and not caplog.records


def test_components_are_of_the_classes_that_the_index_names(stable_diffusion):
    """As in diffusers, where a scheduler's or text encoder's file may be another class's."""
    text_encoder = stable_diffusion / "text_encoder" / "config.json"
    config = json.loads(text_encoder.read_text())
    text_encoder.write_text(json.dumps({"model_type": "clip", "text_config": config, "vision_config": {}}))
    change_index(stable_diffusion, scheduler=["diffusers", "EulerDiscreteScheduler"])
    components = read_components(stable_diffusion, LAYOUTS)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(stable_diffusion)
    assert components.configs["scheduler"]["_class_name"] == type(theirs.scheduler).__name__
    assert components.configs["text_encoder"] == {**config, "model_type": "clip_text_model"}
    assert theirs.text_encoder.config.hidden_size == config["hidden_size"]


def test_the_safety_checker_counts_for_nothing(stable_diffusion):
    change_index(stable_diffusion, safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    assert "safety_checker" not in read_components(stable_diffusion, LAYOUTS).classes


@pytest.mark.parametrize("file", ["model_index.json", "unet/config.json", "scheduler/scheduler_config.json"])
@pytest.mark.parametrize("content", [None, "{", "[]", b"\xff\xfe"])
def test_names_a_file_that_is_missing_or_damaged(file, content, stable_diffusion):
    if content is None:
        (stable_diffusion / file).unlink()
    else:
        (stable_diffusion / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=file):
        read_components(stable_diffusion, LAYOUTS)


def test_names_a_missing_tokenizer(stable_diffusion):
    shutil.rmtree(stable_diffusion / "tokenizer")
    with pytest.raises(UserError, match="tokenizer"):
        read_components(stable_diffusion, LAYOUTS)


def test_writes_no_component_that_is_unknown(tmp_path):
    with pytest.raises(UserError, match="outside"):
        write_component_config(tmp_path, "../outside", {})
    assert not files(tmp_path)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository, from which downloads copy what they ask for."""
    repository, cache = tmp_path / "repository", tmp_path / "cache"

    def snapshot_download(name, revision, allow_patterns, ignore_patterns):
        assert name == "someone/model-1.0"
        for file in filter_repo_objects(
            files(repository), allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
        ):
            (cache / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(repository / file, cache / file)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return repository


def test_downloads_one_variant_and_no_pickles(hub, saved):
    shutil.copytree(saved / "StableDiffusionPipeline", hub)
    wanted = files(hub) | {"tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/spiece.model"}
    unwanted = {
        "README.md",
        "v1-5-pruned.ckpt",
        "v1-5-pruned.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
        "safety_checker/model.safetensors",
        "text_encoder/pytorch_model.fp16.bin",
        "text_encoder/flax_model.msgpack",
    }
    for file in wanted | unwanted:
        (hub / file).parent.mkdir(exist_ok=True)
        (hub / file).touch()
    folder = resolve("someone/model-1.0", LAYOUTS)
    assert files(folder) == wanted


def test_downloads_the_variant_of_components_that_have_no_other(hub, saved):
    shutil.copytree(saved / "StableDiffusionPipeline", hub)
    unet = hub / "unet"
    (unet / "diffusion_pytorch_model.safetensors").rename(unet / "diffusion_pytorch_model.fp16.safetensors")
    for file in ("unet/diffusion_pytorch_model.fp16.bin", "vae/diffusion_pytorch_model.fp16.safetensors"):
        (hub / file).touch()
    folder = resolve("someone/model-1.0", LAYOUTS)
    weights = {file for file in files(folder) if "model.fp16" in file}
    assert weights == {"unet/diffusion_pytorch_model.fp16.safetensors"}
    assert read_components(folder, LAYOUTS).pipeline == "StableDiffusionPipeline"


def test_a_folder_is_taken_as_it_is(saved, monkeypatch):
    assert resolve(saved, LAYOUTS) == saved
    monkeypatch.chdir(saved.parent)
    assert resolve(f"{saved.name}/IFPipeline", LAYOUTS) == Path(saved.name) / "IFPipeline"


@pytest.mark.parametrize("source", ["nothing", "/no/such/folder", "../a", "a/b/c", "a b/c", ""])
def test_names_what_is_neither_folder_nor_repository(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="is no folder; give one"):
        resolve(source, LAYOUTS)
