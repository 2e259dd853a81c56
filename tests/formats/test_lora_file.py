"""Adapters are read by diffusers itself, into networks of the kinds that it trains."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, IFPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel

from personalize_jax.formats.lora_file import FILE, save_lora
from personalize_jax.models.params import unflatten
from personalize_jax.runtime.errors import UserError

RANK = 3
NETWORKS = {"denoiser": ("unet", "unet"), "text_encoder": ("text_encoder", "clip")}
BLOCKS = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
    "sample_size": 8,
}
STABLE_DIFFUSION = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
DEEPFLOYD_IF = {
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
}
LAYERS = {
    "stable_diffusion": (
        STABLE_DIFFUSION,
        ("to_q", "to_k", "to_v", "to_out.0", "net.2", "conv1", "proj_in", "linear_1"),
    ),
    "deepfloyd_if": (DEEPFLOYD_IF, ("to_q", "to_out.0", "add_k_proj", "add_v_proj", "time_emb_proj")),
}


def unet(kind):
    torch.manual_seed(0)
    return UNet2DConditionModel(**BLOCKS, **LAYERS[kind][0])


def clip():
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "projection_dim": 16}
    torch.manual_seed(1)
    return CLIPTextModel(CLIPTextConfig(**sizes, num_hidden_layers=2, num_attention_heads=2))


def targets(network, endings):
    """Linear layers and convolutions by name."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    return {n: m for n, m in network.named_modules() if n.endswith(endings) and isinstance(m, kinds)}


def random_adapters(layers, path_of):
    """Random factors for torch layers, under the paths that `path_of` gives."""
    rng, flat = np.random.default_rng(0), {}
    for name, layer in layers.items():
        out, inputs, *window = layer.weight.shape
        flat[f"{path_of(name)}/kernel/down"] = rng.normal(size=(*window, inputs, RANK)).astype(np.float32)
        flat[f"{path_of(name)}/kernel/up"] = rng.normal(size=(RANK, out)).astype(np.float32)
    return flat


def unet_path(name):
    """By the U-Net's lists, to which the text of the file format gives a dot and a path an underscore."""
    parts, path = name.split("."), []
    for part in parts:
        if part.isdigit():
            path[-1] += f"_{part}"
        else:
            path.append(part)
    return "denoiser/" + "/".join(path)


def answer(layer, weight, x):
    if isinstance(layer, torch.nn.Linear):
        return torch.nn.functional.linear(x, weight, layer.bias)
    return torch.nn.functional.conv2d(x, weight, layer.bias, layer.stride, layer.padding)


def assert_adapted(layers, loaded, flat, path_of):
    """Every target answers with W + down up, in the layout of Flax, and no other layer is adapted."""
    adapted = {name.removesuffix(".base_layer") for name, _ in loaded.named_modules() if name.endswith(".base_layer")}
    assert adapted == set(layers)
    modules = dict(loaded.named_modules())
    for name, layer in layers.items():
        change = np.tensordot(flat[f"{path_of(name)}/kernel/down"], flat[f"{path_of(name)}/kernel/up"], axes=1)
        torch_change = change.T if change.ndim == 2 else change.transpose(3, 2, 0, 1)
        x = torch.randn(2, layer.weight.shape[1], *(5,) * (change.ndim - 2))
        with torch.no_grad():
            expected = answer(layer, layer.weight + torch.from_numpy(np.ascontiguousarray(torch_change)), x)
            np.testing.assert_allclose(modules[name](x), expected, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("kind", LAYERS)
def test_diffusers_answers_with_the_adapted_unet(tmp_path, kind):
    network = unet(kind)
    layers = targets(network, LAYERS[kind][1])
    assert {ending for ending in LAYERS[kind][1] for name in layers if name.endswith(ending)} == set(LAYERS[kind][1])
    flat = random_adapters(layers, unet_path)
    save_lora(unflatten(flat), tmp_path / "new" / "folder", NETWORKS)
    (file,) = (tmp_path / "new" / "folder").iterdir()
    assert file.name == FILE
    loaded = unet(kind)
    loaded.load_lora_adapter(load_file(file), prefix="unet")
    assert_adapted(layers, loaded, flat, unet_path)


def test_a_stable_diffusion_pipeline_reads_unet_and_text_encoder_from_the_folder(tmp_path):
    def clip_path(name):
        return "text_encoder/text_model/" + name.removeprefix("text_model.").replace(".", "/").replace("s/", "s_")

    of_unet, of_clip = targets(unet("stable_diffusion"), ("to_q", "to_out.0")), targets(clip(), ("q_proj", "out_proj"))
    assert "text_encoder/text_model/encoder/layers_1/self_attn/q_proj" in map(clip_path, of_clip)
    flat = random_adapters(of_unet, unet_path) | random_adapters(of_clip, clip_path)
    save_lora(unflatten(flat), tmp_path, NETWORKS)
    pipeline = pipeline_of(StableDiffusionPipeline, "stable_diffusion", vae=None, text_encoder=clip())
    pipeline.load_lora_weights(tmp_path)
    assert_adapted(of_unet, pipeline.unet, flat, unet_path)
    assert_adapted(of_clip, pipeline.text_encoder, flat, clip_path)


def test_a_deepfloyd_if_pipeline_reads_its_unet_from_the_folder(tmp_path):
    layers = targets(unet("deepfloyd_if"), ("to_q", "add_k_proj"))
    flat = random_adapters(layers, unet_path)
    save_lora(unflatten(flat), tmp_path, NETWORKS)
    pipeline = pipeline_of(IFPipeline, "deepfloyd_if", watermarker=None, text_encoder=None)
    pipeline.load_lora_weights(tmp_path)
    assert_adapted(layers, pipeline.unet, flat, unet_path)


def pipeline_of(kind, unet_kind, **parts):
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    absent = {"tokenizer": None, "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return kind(unet=unet(unet_kind), scheduler=scheduler, **absent, **parts)


def test_adapters_of_layers_that_diffusers_lacks_are_refused(tmp_path):
    several_heads = {"down": np.ones((8, 2)), "up": np.ones((2, 4, 2))}
    with pytest.raises(UserError, match=r"attention/query/kernel.*\(8, 2\) and \(2, 4, 2\).*whole pipeline"):
        save_lora({"denoiser": {"attention": {"query": {"kernel": several_heads}}}}, tmp_path, NETWORKS)
    assert not list(tmp_path.iterdir())
