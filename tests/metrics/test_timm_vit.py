"""Vision transformers as timm publishes them, against transformers from the same tensors under its own names."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, ViTConfig, ViTModel

from personalize_jax.metrics.encoders import load_dino
from personalize_jax.runtime.errors import UserError
from tests.metrics.timm_config import TIMM
from tests.models.torch_params import scramble


def timm_names(file):
    """Tensors that transformers saved of a ViT by timm's names: queries, keys and values joined in this order."""
    state = load_file(file)
    renamed = {
        "cls_token": state["embeddings.cls_token"],
        "pos_embed": state["embeddings.position_embeddings"],
        "patch_embed.proj.weight": state["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": state["embeddings.patch_embeddings.projection.bias"],
    }
    parts = {
        "norm1": "layernorm_before",
        "attn.proj": "attention.output.dense",
        "norm2": "layernorm_after",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    for leaf in ("weight", "bias"):
        renamed[f"norm.{leaf}"] = state[f"layernorm.{leaf}"]
        for i in range(12):
            layer, block = f"encoder.layer.{i}", f"blocks.{i}"
            joined = [state[f"{layer}.attention.attention.{name}.{leaf}"] for name in ("query", "key", "value")]
            renamed[f"{block}.attn.qkv.{leaf}"] = torch.cat(joined)
            renamed |= {f"{block}.{ours}.{leaf}": state[f"{layer}.{theirs}.{leaf}"] for ours, theirs in parts.items()}
    return {name: tensor.contiguous() for name, tensor in renamed.items()}


@pytest.fixture(scope="module")
def timm(tmp_path_factory):
    """A ViT of transformers, a folder in which it lies as timm saves it, and its tensors there."""
    folder = tmp_path_factory.mktemp("timm")
    sizes = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768, "image_size": 32}
    model = ViTModel(ViTConfig(**sizes, layer_norm_eps=1e-6), add_pooling_layer=False)
    scramble(model, seed=6)
    model.eval().save_pretrained(folder / "transformers")
    tensors = timm_names(folder / "transformers" / "model.safetensors")
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(TIMM))
    return model, folder, tensors


def test_dino_as_timm_saves_it_embeds_as_transformers_does(timm, pictures):
    model, folder, _ = timm
    dino = load_dino(folder)
    assert (dino.prepare.size, dino.prepare.crop) == (36, 32)  # DINO's own code has 256 and 224
    prepared = dino.prepare(pictures)
    with torch.no_grad():
        theirs = model(torch.from_numpy(np.moveaxis(prepared, -1, 1).copy())).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(dino.embed(prepared), theirs, atol=1e-4 * np.abs(theirs).max())
    normalised = {"image_mean": TIMM["pretrained_cfg"]["mean"], "image_std": TIMM["pretrained_cfg"]["std"]}
    sizes = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
    processor = CLIPImageProcessorPil(**normalised, **sizes)
    square = [picture for picture in pictures if picture.shape[0] == picture.shape[1]]
    expected = processor([Image.fromarray(picture) for picture in square], return_tensors="pt")["pixel_values"]
    np.testing.assert_allclose(dino.prepare(square), np.moveaxis(expected.numpy(), 1, -1), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"architecture": "resnet50"}, "architecture of timm is 'resnet50'; give a vision transformer"),
        ({"architecture": "vit_tiny_patch8_32"}, "tensors of other shapes than"),
        ({"architecture": "vit_large_patch16_32"}, "has no tensor 'blocks.12"),
    ],
)
def test_other_models_of_timm_are_refused(change, sentence, timm, tmp_path):
    _, folder, _ = timm
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(TIMM | change))
    with pytest.raises(UserError, match=sentence):
        load_dino(tmp_path)


def test_surplus_and_damaged_tensors_of_timm_are_refused(timm, tmp_path):
    _, _, tensors = timm
    (tmp_path / "config.json").write_text(json.dumps(TIMM))
    save_file(tensors | {"head.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    load_dino(tmp_path)  # of classes, which nobody asks for
    save_file(tensors | {"blocks.0.ls1.gamma": torch.zeros(192)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="has a tensor blocks.0.ls1.gamma, which a plain"):
        load_dino(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(UserError, match="cannot be read as safetensors .*; download"):
        load_dino(tmp_path)
