"""Encoders and their preprocessing against transformers, from the same files and the same pixels."""

import json

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from PIL import Image
from safetensors.torch import save_model
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from configs import common
from personalize_jax.evaluation.scoring import find_encoders
from personalize_jax.formats.port_weights import load_weights
from personalize_jax.metrics import preprocessing, timm_vit
from personalize_jax.metrics.encoders import (
    BATCH_SIZE,
    ImageEncoder,
    cosine_distance,
    in_batches,
    load_clip,
    load_dino,
    load_lpips,
)
from personalize_jax.metrics.similarity import distances_within
from personalize_jax.models.clip import Clip
from personalize_jax.models.lpips import LAYERS
from personalize_jax.runtime.errors import UserError
from tests import hub_cache, tiny_public
from tests.metrics.conftest import PHOTOS
from tests.metrics.timm_config import TIMM
from tests.models.torch_params import scramble


def test_photographs_are_among_the_pictures(pictures):
    if not PHOTOS.is_dir():
        pytest.skip(f"the DreamBooth dataset is not at {PHOTOS}")
    assert len(pictures) > 5


VITS = {
    "small": {"hidden_size": 16, "num_attention_heads": 2, "patch_size": 4},
    "coarse": {"hidden_size": 24, "num_attention_heads": 3, "patch_size": 8, "num_hidden_layers": 3},
    "loose": {"hidden_size": 16, "num_attention_heads": 4, "patch_size": 16, "layer_norm_eps": 0.1},
}
PROCESSORS = {
    "small": {"size": {"height": 32, "width": 32}, "resample": 2},
    "coarse": {"size": {"height": 32, "width": 32}, "resample": 3, "image_mean": [0.1, 0.2, 0.3]},
    "loose": {"size": {"height": 32, "width": 32}, "resample": 0, "image_std": [0.1, 0.2, 0.3]},
}


@pytest.mark.parametrize("name", VITS)
def test_dino_embeds_as_transformers_does(name, pictures, tmp_path):
    config = ViTConfig(**{"image_size": 32, "num_hidden_layers": 2, "intermediate_size": 40} | VITS[name])
    model = ViTModel(config, add_pooling_layer=name == "coarse")  # a pooler that a file holds is left out
    scramble(model, seed=1)
    model.eval().save_pretrained(tmp_path)
    processor = ViTImageProcessorPil(**PROCESSORS[name])
    processor.save_pretrained(tmp_path)
    with torch.no_grad():
        inputs = processor([Image.fromarray(picture) for picture in pictures], return_tensors="pt")
        theirs = model(**inputs).last_hidden_state[:, 0].numpy()
    dino = load_dino(tmp_path)
    prepared = dino.prepare(pictures)
    np.testing.assert_allclose(prepared, np.moveaxis(inputs["pixel_values"].numpy(), 1, -1), atol=1e-5)
    np.testing.assert_allclose(dino.embed(prepared), theirs, atol=1e-4 * np.abs(theirs).max())
    np.testing.assert_allclose(dino(pictures), theirs / np.linalg.norm(theirs, axis=1, keepdims=True), atol=1e-4)


CLIPS = {
    "quick_gelu": {"text": {}, "vision": {}},
    "gelu": {"text": {"hidden_act": "gelu", "layer_norm_eps": 1e-3}, "vision": {"hidden_act": "gelu"}},
    "deep": {"text": {"num_hidden_layers": 3}, "vision": {"num_hidden_layers": 1, "patch_size": 16}},
}


@pytest.mark.parametrize("name", CLIPS)
def test_clip_embeds_as_transformers_does(name, pictures, tmp_path):
    tokenizer = tiny_public.clip_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(tokenizer), "max_position_embeddings": 20} | CLIPS[name]["text"]
    text |= {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    vision = sizes | {"hidden_size": 24, "image_size": 32, "patch_size": 8} | CLIPS[name]["vision"]
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=10))
    scramble(model, seed=2)
    model.eval().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    prompts = ["a dog", "a photo of a teapot in the snow", "backpack", "dog " * 40]
    with torch.no_grad():
        inputs = processor([Image.fromarray(picture) for picture in pictures], return_tensors="pt")
        tokens = tokenizer(prompts, padding="max_length", max_length=20, truncation=True, return_tensors="pt")
        outputs = model(**inputs, **tokens)
    clip = load_clip(tmp_path)
    prepared = clip.images.prepare(pictures)
    np.testing.assert_allclose(prepared, np.moveaxis(inputs["pixel_values"].numpy(), 1, -1), atol=1e-5)
    np.testing.assert_allclose(clip.images(pictures), outputs.image_embeds.numpy(), atol=1e-4)
    np.testing.assert_allclose(clip.texts(prompts), outputs.text_embeds.numpy(), atol=1e-4)


@pytest.mark.parametrize("end", [2, 5, 29])
def test_texts_end_where_transformers_lets_them(end, tmp_path):
    """2, which stands in old files, means the highest id; any other is the id itself, wherever the highest may be."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 30, "max_position_embeddings": 12, "eos_token_id": end}
    vision = sizes | {"image_size": 8, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=10)).eval()
    scramble(model, seed=4)
    tokens = np.random.default_rng(2).integers(6, 29, (4, 12))
    tokens[np.arange(4), [3, 7, 8, 11]] = 29 if end == 2 else end
    with torch.no_grad():
        theirs = model(input_ids=torch.from_numpy(tokens), pixel_values=torch.zeros(4, 3, 8, 8)).text_embeds
    model.save_pretrained(tmp_path)
    network = Clip.from_config(json.loads((tmp_path / "config.json").read_text()))
    abstract = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)), tokens)["params"]
    params = load_weights(tmp_path, abstract, "clip")
    ours = network.apply({"params": params}, tokens, method=Clip.encode_texts)
    np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-5)


class TorchLpips(torch.nn.Module):
    """LPIPS over torchvision's layers, with the state's names of its authors' package."""

    def __init__(self):
        super().__init__()
        self.net, channels = torch.nn.Module(), 3
        for number, layer in enumerate(LAYERS, start=1):
            part = torch.nn.Sequential()
            if layer.pool:
                part.add_module(str(layer.place - 1), torch.nn.MaxPool2d(layer.pool, 2))
            convolution = torch.nn.Conv2d(channels, layer.channels, layer.size, layer.stride, layer.padding)
            part.add_module(str(layer.place), convolution)
            part.add_module(str(layer.place + 1), torch.nn.ReLU())
            channels = layer.channels
            self.net.add_module(f"slice{number}", part)
            head = torch.nn.Module()
            head.model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Conv2d(channels, 1, 1, bias=False))
            self.add_module(f"lin{number - 1}", head)

    def forward(self, x, y):
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        x, y = ((a - shift[:, None, None]) / scale[:, None, None] for a in (x, y))
        distance = 0
        for number in range(1, 6):
            part = self.net.get_submodule(f"slice{number}")
            x, y = part(x), part(y)
            x1, y1 = (a / (a.square().sum(1, keepdim=True).sqrt() + 1e-10) for a in (x, y))
            distance = distance + self.get_submodule(f"lin{number - 1}").model((x1 - y1) ** 2).mean((1, 2, 3))
        return distance


def test_lpips_agrees_with_torch(tmp_path):
    model = TorchLpips()
    scramble(model, seed=3)
    save_model(model.eval(), tmp_path / "model.safetensors")
    distance = load_lpips(tmp_path)
    rng = np.random.default_rng(1)
    for side in (64, 70):
        x, y = (rng.integers(0, 256, (2, side, 64, 3), np.uint8) for _ in range(2))
        with torch.no_grad():
            theirs = model(*(torch.from_numpy(a).permute(0, 3, 1, 2).float() / 127.5 - 1 for a in (x, y))).numpy()
        np.testing.assert_allclose(distance(x, y), theirs, atol=1e-4 * np.abs(theirs).max())
        np.testing.assert_allclose(distance(x, x), 0, atol=1e-12)


def test_cosine_distance_is_one_minus_the_cosine():
    """An encoder that sees the mean colour: equal pictures are 0 apart, colours at right angles 1."""
    encoder = ImageEncoder(np.array, lambda x: jnp.mean(x, axis=(1, 2)))
    red, green, blue = (np.broadcast_to(np.eye(3, dtype=np.uint8)[i] * 200, (8, 8, 3)) for i in range(3))
    distance = cosine_distance(encoder)
    apart = distance(np.stack([red, red, red + green]), np.stack([red, green, green]))
    np.testing.assert_allclose(apart, [0, 1, 1 - 0.5**0.5], atol=1e-6)
    np.testing.assert_allclose(distances_within([red, red, blue], distance), [0.5, 0.5, 1], atol=1e-6)


@pytest.mark.parametrize("count", [1, BATCH_SIZE - 1, BATCH_SIZE, BATCH_SIZE + 1, 2 * BATCH_SIZE + 3])
def test_batches_lose_and_repeat_nothing(count):
    sizes = set()

    def double(part):
        sizes.add(len(part))
        return 2 * np.array(part)

    np.testing.assert_array_equal(in_batches(double, range(count)), 2 * np.arange(count))
    assert len(sizes) == 1  # one program


def test_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one picture"):
        in_batches(np.array, [])


VIT_PROCESSOR = {
    "feature_extractor_type": "ViTFeatureExtractor",
    "size": 224,
    "resample": 3,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}


CLIP_PROCESSOR = VIT_PROCESSOR | {"feature_extractor_type": "CLIPFeatureExtractor", "crop_size": 224}


def test_processors_of_old_files_are_understood():
    vit = preprocessing.Preprocessing.from_config(VIT_PROCESSOR)
    assert (vit.size, vit.crop) == ((224, 224), None)
    clip = preprocessing.Preprocessing.from_config(CLIP_PROCESSOR)
    assert (clip.size, clip.crop) == (224, 224)


def test_dinos_own_preparation_keeps_the_middle():
    picture = np.zeros((300, 600, 3), np.uint8)
    picture[:, 150:450] = 255
    prepare = timm_vit.preprocessing(224)
    prepared = prepare([picture])
    assert prepared.shape == (1, 224, 224, 3)
    white = (1 - np.array(prepare.mean)) / np.array(prepare.deviation)
    np.testing.assert_allclose(prepared[0, :, 8:-8], np.broadcast_to(white, (224, 208, 3)), atol=1e-5)


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"feature_extractor_type": "BlipImageProcessor"}, "describes a BlipImageProcessor; give .* ViTImageProcessor"),
        ({"feature_extractor_type": None}, "has no image_processor_type; add"),
        ({"do_normalize": False}, "^preprocessor_config.json switches do_normalize off"),
        ({"do_center_crop": True, "crop_size": {"height": 10, "width": 20}}, "crops to 10 x 20 pixels; only squares"),
    ],
)
def test_other_preparations_are_refused(change, sentence, tmp_path):
    (tmp_path / preprocessing.FILE).write_text(json.dumps(VIT_PROCESSOR | change))
    with pytest.raises(UserError, match=sentence) as refused:
        preprocessing.Preprocessing.read(tmp_path)
    assert "UserError" not in str(refused.value)


def test_folders_that_hold_no_model_are_refused(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match="config.json cannot be read"):
        load_dino(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="model_type is 'bert'"):
        load_dino(tmp_path)
    with pytest.raises(UserError, match="describes a 'bert'; give the folder of a CLIP"):
        load_clip(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        load_clip(tmp_path)
    with pytest.raises(UserError, match="preprocessor_config.json cannot be read"):
        preprocessing.Preprocessing.read(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("[]")
    with pytest.raises(UserError, match="cannot be read as a processor's configuration .*; restore it"):
        preprocessing.Preprocessing.read(tmp_path)


HUB = {
    "config.json": "{",
    "preprocessor_config.json": "{}",
    "model.safetensors": "",
    "vocab.json": "{}",
    "merges.txt": "",
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "special_tokens_map.json": "{}",
}


@pytest.mark.parametrize("load", [load_dino, load_clip])
def test_names_on_the_hub_are_downloaded_without_pickles(load, tmp_path, monkeypatch):
    unwanted = ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack", "onnx/model.safetensors", "README.md")
    asked = []

    def snapshot_download(name, revision, allow_patterns, ignore_patterns):
        asked.append((name, revision))
        files = (*HUB, *unwanted)
        chosen = set(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        assert chosen == set(HUB)
        for file, text in HUB.items():
            (tmp_path / file).write_text(text)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for name, revision in (("someone/model-1.0", None), ("someone/model-1.0@refs/pr/66", "refs/pr/66")):
        with pytest.raises(UserError, match=str(tmp_path)):  # of what was downloaded, none of which can be read
            load(name)
        assert asked.pop() == ("someone/model-1.0", revision)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache, and no network."""
    hub_cache.use(monkeypatch, tmp_path / "cache")
    return tmp_path / "cache"


def test_public_configurations_name_encoders_that_are_found(cache, tmp_path):
    """In the forms in which they are published: CLIP in a pull request's revision, DINO as timm saves it."""
    settings = common.public("").evaluation.copy_and_resolve_references()
    weights = {"model.safetensors": b""}
    clip = {"config.json": b'{"model_type": "clip"}', "preprocessor_config.json": json.dumps(CLIP_PROCESSOR).encode()}
    tiny_public.clip_tokenizer().save_pretrained(tmp_path / "tokenizer")
    tokenizer = {file.name: file.read_bytes() for file in (tmp_path / "tokenizer").iterdir()}
    for name in settings.clips:
        hub_cache.lay_out(cache, name, clip | tokenizer | weights)
    hub_cache.lay_out(cache, settings.dino, {"config.json": json.dumps(TIMM).encode()} | weights)
    settings.lpips = str(tmp_path / "lpips")
    with pytest.raises(UserError, match=r"lpips' is no folder with LPIPS .* `import lpips, .*lpips/model.safetensors'"):
        find_encoders(settings)
    (tmp_path / "lpips").mkdir()
    (tmp_path / "lpips" / "model.safetensors").touch()
    find_encoders(settings)


@pytest.mark.parametrize("load", [load_dino, load_clip])
def test_encoders_that_are_pickled_only_are_refused_with_how_to_convert_them(load, cache, tmp_path):
    content = {name: b"{}" for name in HUB if "safetensors" not in name} | {"pytorch_model.bin": b""}
    folder = hub_cache.lay_out(cache, "someone/model", content)
    for source in ("someone/model", folder):
        with pytest.raises(UserError, match="has no weights as safetensors.*pickled ones .* are not read") as refused:
            load(source)
        assert f".from_pretrained({str(source)!r}).save_pretrained(folder)" in str(refused.value)
    assert "@refs/pr/NUMBER" not in str(refused.value)


@pytest.mark.parametrize("load", [load_dino, load_clip, load_lpips])
def test_pointers_of_git_lfs_are_no_weights(load, tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match="model.safetensors is a pointer of Git LFS"):
        load(tmp_path)


@pytest.mark.parametrize("load", [load_dino, load_clip])
@pytest.mark.parametrize("source", ["", "nothing", "../a", "/no/such/folder"])
def test_what_is_neither_folder_nor_name_is_refused(load, source):
    with pytest.raises(UserError, match="is no encoder; give 'world', a folder, or a name on the Hugging Face hub"):
        load(source)


def test_a_slash_at_the_end_of_a_name_is_pointed_out():
    with pytest.raises(UserError, match="is no encoder; .*without a slash at its end: 'someone/model'"):
        load_dino("someone/model/")


@pytest.mark.parametrize("source", ["", "nothing", "/no/such/folder", "world", "models/lpips"])
def test_lpips_is_a_folder_that_is_made_once(source):
    with pytest.raises(UserError, match="is no folder with LPIPS as safetensors.*published as pickles only.*import lp"):
        load_lpips(source)
