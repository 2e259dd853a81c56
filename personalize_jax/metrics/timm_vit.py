"""Reads vision transformers as timm publishes them: timm's configuration, and its names and shapes of parameters.

The network is that of `models.vit`. timm joins the kernels of queries, keys and values in one, and adds 1e-6 in layer
norms, as DINO's own code does.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file

from personalize_jax.metrics.preprocessing import Preprocessing
from personalize_jax.models.params import Params
from personalize_jax.models.vit import VisionTransformer
from personalize_jax.runtime.errors import UserError

ARCHITECTURE = "architecture"  # the key by which timm's config.json differs from transformers'
FILE = "model.safetensors"
_NAME = re.compile(r"vit_(tiny|small|base|large)_patch(\d+)_(\d+)")  # size, side of a patch, side of the pictures
_SIZES = {"tiny": (192, 12), "small": (384, 12), "base": (768, 12), "large": (1024, 24)}  # width, layers
_HEAD_WIDTH = 64
_EPSILON = 1e-6
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colours


def network(config: Mapping[str, Any]) -> VisionTransformer:
    """Build the network that timm's `config.json` describes.

    Raises:
        UserError: the architecture is no plain vision transformer.
    """
    match = _NAME.fullmatch(str(config[ARCHITECTURE]))
    if match is None:
        raise UserError(
            f"The architecture of timm is {config[ARCHITECTURE]!r}; give a vision transformer such as "
            "'vit_small_patch16_224'."
        )
    width, num_layers = _SIZES[match[1]]
    return VisionTransformer(
        resolution=int(match[3]),
        patch=int(match[2]),
        width=width,
        num_layers=num_layers,
        num_heads=width // _HEAD_WIDTH,
        mlp_width=4 * width,
        epsilon=_EPSILON,
    )


def preprocessing(resolution: int) -> Preprocessing:
    """The preprocessing of DINO's own code, by which papers report this metric.

    timm's file crops to .9 of the shorter side instead, as for all its vision transformers.

    Args:
        resolution: the side of the network's input, in pixels.
    """
    size = resolution * 256 // 224
    return Preprocessing(size, Image.Resampling.BICUBIC, resolution, _MEAN, _DEVIATION)


def load_params(folder: Path, num_layers: int, abstract: Params) -> Params:
    """Read a network's parameters.

    Args:
        folder: the folder of timm's `model.safetensors`.
        num_layers: the number of the network's layers.
        abstract: the tree of the parameters' shapes.

    Raises:
        UserError: the file is missing or damaged, or holds another network.
    """
    file = folder / FILE
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError, TypeError) as error:
        raise UserError(f"{file} cannot be read as safetensors ({error}); download the model again.") from error
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
    try:
        params = _renamed(tensors, num_layers)
    except KeyError as error:
        raise UserError(f"{file} has no tensor {error}; give a model whose config.json describes it.") from error
    if tensors:
        raise UserError(f"{file} has a tensor {min(tensors)}, which a plain vision transformer does not have.")
    expected, found = (jax.tree.map(lambda leaf: tuple(leaf.shape), tree) for tree in (abstract, params))
    if expected != found:
        raise UserError(f"{file} has tensors of other shapes than the architecture's in its config.json.")
    return params


def _renamed(tensors: dict[str, np.ndarray], num_layers: int) -> Params:
    """The parameters by our names; their tensors are removed from `tensors`."""

    def norm(name: str) -> Params:
        return {"scale": tensors.pop(f"{name}.weight"), "bias": tensors.pop(f"{name}.bias")}

    def dense(name: str) -> Params:
        return {"kernel": tensors.pop(f"{name}.weight").T, "bias": tensors.pop(f"{name}.bias")}

    def thirds(name: str) -> list[Params]:
        parts = (np.split(tensors.pop(f"{name}.{leaf}"), 3) for leaf in ("weight", "bias"))
        return [{"kernel": weight.T, "bias": bias} for weight, bias in zip(*parts, strict=True)]

    def layer(name: str) -> Params:
        query, key, value = thirds(f"{name}.attn.qkv")
        return {
            "layernorm_before": norm(f"{name}.norm1"),
            "query": query,
            "key": key,
            "value": value,
            "attention_output": dense(f"{name}.attn.proj"),
            "layernorm_after": norm(f"{name}.norm2"),
            "mlp_in": dense(f"{name}.mlp.fc1"),
            "mlp_out": dense(f"{name}.mlp.fc2"),
        }

    projection = {
        "kernel": tensors.pop("patch_embed.proj.weight").transpose(2, 3, 1, 0),
        "bias": tensors.pop("patch_embed.proj.bias"),
    }
    return {
        "patch_embeddings": {"projection": projection},
        "cls_token": tensors.pop("cls_token"),
        "position_embeddings": tensors.pop("pos_embed"),
        "layernorm": norm("norm"),
        **{f"layers_{i}": layer(f"blocks.{i}") for i in range(num_layers)},
    }
