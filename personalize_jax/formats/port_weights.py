"""Parameters of public networks, from and to safetensors files that name and lay out tensors as PyTorch does.

Paths of parameters mirror PyTorch's names: `down_blocks_0/resnets_1/conv1/kernel` here is
`down_blocks.0.resnets.1.conv1.weight` there. Kernels are [I, O] and [h, w, I, O] here, [O, I] and [O, I, h, w] there.
"""

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from personalize_jax.models.params import Params, flatten, unflatten
from personalize_jax.runtime import hosts
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import replacing

Naming = Literal["unet", "autoencoder", "clip", "t5", "vit", "lpips"]
Shape = tuple[int, ...]

MAX_SHARD_BYTES = 10 * 10**9  # as diffusers
_STEMS = ("diffusion_pytorch_model", "model")
_PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth")
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16}
_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
# A number is an index into a list, except in the names linear_1, linear_2, wi_0 and wi_1.
_INDEX = re.compile(r"(?<!\blinear)(?<!\bwi)_(\d+)(?=/|$)")

# Names that differ from the paths here by more than punctuation: patterns and replacements.
_RENAMED: Mapping[Naming, tuple[tuple[str, str], ...]] = {
    "vit": (
        (r"^(cls_token|position_embeddings|patch_embeddings)", r"embeddings.\1"),
        (r"^layers\.(\d+)\.(query|key|value)\.", r"encoder.layer.\1.attention.attention.\2."),
        (r"^layers\.(\d+)\.attention_output\.", r"encoder.layer.\1.attention.output.dense."),
        (r"^layers\.(\d+)\.mlp_in\.", r"encoder.layer.\1.intermediate.dense."),
        (r"^layers\.(\d+)\.mlp_out\.", r"encoder.layer.\1.output.dense."),
        (r"^layers\.(\d+)\.layernorm", r"encoder.layer.\1.layernorm"),
    ),
}
# Other names that files have for the same tensor: patterns over the name that is written, and replacements.
_ALTERNATIVES: Mapping[Naming, tuple[tuple[str, str], ...]] = {
    "unet": (),
    "autoencoder": (  # before diffusers 0.15
        (r"\.to_q\.", ".query."),
        (r"\.to_k\.", ".key."),
        (r"\.to_v\.", ".value."),
        (r"\.to_out\.0\.", ".proj_attn."),
    ),
    "clip": ((r"^text_model\.", ""),),  # since transformers 5
    "t5": ((r"^shared\.", "encoder.embed_tokens."),),
    "vit": (),
    "lpips": ((r"^lin(\d)\.", r"lins.\1."),),
}
# Tensors that are no parameters, buffers of older files among them, and parameters of layers that are left out here.
_IGNORED: Mapping[Naming, str] = {
    "unet": "(?!)",
    "autoencoder": "(?!)",
    "clip": r".*\.position_ids",
    "t5": "(?!)",
    "vit": r"pooler\..*",
    "lpips": r"scaling_layer\..*",
}


def torch_names(path: str, naming: Naming) -> list[str]:
    """PyTorch's names for a parameter: the one that is written, then others that files may have for it.

    Args:
        path: slash-separated path of the parameter.
        naming: naming of its network.
    """
    modules, _, leaf = path.rpartition("/")
    name = ".".join([*_INDEX.sub(r".\1", modules).split("/"), _LEAVES.get(leaf, leaf)]).lstrip(".")
    for pattern, other in _RENAMED.get(naming, ()):
        name = re.sub(pattern, other, name)
    others = [re.sub(pattern, other, name) for pattern, other in _ALTERNATIVES[naming] if re.search(pattern, name)]
    return [name, *others]


def load_weights(folder: Path, abstract: Params, naming: Naming, sharding: Params | None = None) -> Params:
    """Read the parameters of one network from a component's folder.

    Arrays go one by one to their dtype and sharding, so that the host never holds much more than the result.

    Args:
        folder: the component's folder, with `diffusion_pytorch_model.safetensors` or `model.safetensors`, whole or
            sharded; the variant `fp16` is read if there is no other.
        abstract: tree of the parameters' shapes and dtypes.
        naming: names and layout of the tensors in the file.
        sharding: tree as `abstract` with a sharding for each parameter; None for the default device.

    Raises:
        UserError: no such file, a damaged one, pickled weights, or tensors missing, surplus or of other shapes.
    """
    wanted = flatten(abstract)
    shapes = {path: tuple(leaf.shape) for path, leaf in wanted.items()}
    shardings = {} if sharding is None else flatten(sharding)
    stored = {tensor.name: tensor for file in _weight_files(folder) for tensor in _read_header(file)}
    tensors = _match(shapes, stored, naming, folder)
    params = {}
    # Largest first: the array in conversion lies beside the result, and must be small once the result is large.
    for path in sorted(shapes, key=lambda path: math.prod(shapes[path]), reverse=True):
        array = _from_torch(tensors[path].read(), len(shapes[path]), path)
        array = hosts.device_put(np.asarray(array, wanted[path].dtype, order="C"), shardings.get(path))
        params[path] = jax.block_until_ready(array)  # the host's copy lives as long as the transfer
    return unflatten({path: params[path] for path in shapes})


def save_weights(
    params: Params,
    folder: Path,
    file_name: str,
    naming: Naming,
    dtype: DTypeLike,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the parameters of one network so that diffusers or transformers loads them.

    A reader sees a file's old content or the new, never a part. Other files of an earlier save are removed.

    Args:
        params: the parameters.
        folder: the component's folder; made if missing.
        file_name: `diffusion_pytorch_model.safetensors` for diffusers, `model.safetensors` for transformers.
        naming: names and layout of the tensors in the file.
        dtype: dtype of the stored tensors.
        max_shard_bytes: larger networks are written as several files of at most that size, and their index.

    Raises:
        UserError: the files cannot be written.
    """
    from huggingface_hub import split_state_dict_into_shards_factory  # slow to import, and seldom needed

    flat, stem = flatten(params), file_name.removesuffix(".safetensors")
    paths = {torch_names(path, naming)[0]: path for path in flat}
    split = split_state_dict_into_shards_factory(
        {name: flat[path] for name, path in paths.items()},
        get_storage_size=lambda leaf: leaf.size * jnp.dtype(dtype).itemsize,
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    files = list(split.filename_to_tensors)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:  # files get their names at its end
            for file, names in split.filename_to_tensors.items():
                arrays = {name: _to_torch(np.asarray(flat[paths[name]]), paths[name], dtype) for name in names}
                save_file(arrays, stack.enter_context(replacing(folder / file, own_folder=True)), {"format": "pt"})
            if split.is_sharded:
                index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
                files.append(f"{file_name}.index.json")
                stack.enter_context(replacing(folder / files[-1])).write_text(json.dumps(index, indent=2))
        for pattern in (file_name, f"{file_name}.index.json", f"{stem}-*-of-*.safetensors"):
            for old in folder.glob(pattern):
                if old.name not in files:
                    old.unlink()
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be written ({error}); check free space and permissions.") from error


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor's place in a file."""

    name: str
    file: Path
    dtype: str
    shape: Shape
    offset: int

    def read(self) -> np.ndarray:
        # Mapping the file into memory instead would count its pages as ours, beside the result.
        try:
            array = np.fromfile(self.file, _DTYPES[self.dtype], math.prod(self.shape), offset=self.offset)
            return array.reshape(self.shape)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.file} cannot be read ({error}); restore the file.") from error


def _read_header(file: Path) -> list[_Tensor]:
    try:
        # The format: the length of a header in JSON, the header, the tensors. safe_open checks that all is sound, but
        # hands out no bfloat16 as numpy array.
        with safe_open(file, "numpy"), file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header: dict[str, Any] = json.loads(stream.read(length))
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(f"{file} cannot be read as safetensors ({error}); restore the file.") from error
    header.pop("__metadata__", None)
    return [
        _Tensor(name, file, spec["dtype"], tuple(spec["shape"]), 8 + length + spec["data_offsets"][0])
        for name, spec in header.items()
    ]


def _weight_files(folder: Path) -> list[Path]:
    """The files of the variant to load."""
    for variant in ("", ".fp16"):
        for stem in _STEMS:
            if (file := folder / f"{stem}{variant}.safetensors").is_file():
                return [file]
            for name in {f"{stem}.safetensors.index{variant}.json", f"{stem}{variant}.safetensors.index.json"}:
                if (file := folder / name).is_file():
                    return _shards(file)
    if any(file for pattern in _PICKLES for file in folder.glob(pattern)):
        raise UserError(
            f"{folder} has pickled weights only, which may run code and are not read; convert them in Python with "
            "`diffusers.DiffusionPipeline.from_pretrained(folder).save_pretrained(out, safe_serialization=True)`, or "
            "for a network on its own with its class in transformers in place of the pipeline's."
        )
    raise UserError(
        f"{folder} has no {' or '.join(f'{stem}.safetensors' for stem in _STEMS)}; give weights as safetensors."
    )


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} cannot be read as an index of shards ({error!r}); restore the file.") from error
    for name in names:
        # The index comes with the model: the files that it names must lie in its folder.
        if not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise UserError(f"{index} names {name!r} where the name of a safetensors file in its folder is expected.")
        if not (index.parent / name).is_file():
            raise UserError(f"{index} names {name}, which is not in its folder; download the model again.")
    return [index.parent / name for name in names]


def _match(
    shapes: Mapping[str, Shape], stored: Mapping[str, _Tensor], naming: Naming, folder: Path
) -> dict[str, _Tensor]:
    """The tensor for each path, after checking that they fit each other."""
    matched, known = {}, set()
    for path, shape in shapes.items():
        names = torch_names(path, naming)
        known.update(names)
        name = next((name for name in names if name in stored), None)
        if name is None:
            raise UserError(f"{folder} has no tensor {names[0]}; give a model whose config.json describes its weights.")
        tensor, expected = stored[name], _torch_shape(shape, path)
        # Linear layers of old files are 1x1 convolutions.
        if tensor.shape != expected and not (len(shape) == 2 and tensor.shape == (*expected, 1, 1)):
            raise UserError(f"{folder} has {name} of shape {tensor.shape} where config.json asks for {expected}.")
        if tensor.dtype not in _DTYPES:
            raise UserError(f"{folder} has {name} of type {tensor.dtype}; the types {', '.join(_DTYPES)} can be read.")
        matched[path] = tensor
    for name in sorted(stored.keys() - known):
        if not re.fullmatch(_IGNORED[naming], name):
            raise UserError(f"{folder} has a tensor {name} that the network of its config.json does not have.")
    return matched


def _torch_shape(shape: Shape, path: str) -> Shape:
    if not path.endswith("kernel"):
        return shape
    return (shape[-1], shape[-2], *shape[:-2])


def _from_torch(array: np.ndarray, ndim: int, path: str) -> np.ndarray:
    """A view of the array in our layout, with `ndim` dimensions."""
    if not path.endswith("kernel"):
        return array
    if ndim == 2 and array.ndim == 4:
        array = array[:, :, 0, 0]
    return np.moveaxis(array, (1, 0), (-2, -1))


def _to_torch(array: np.ndarray, path: str, dtype: DTypeLike) -> np.ndarray:
    if path.endswith("kernel"):
        array = np.moveaxis(array, (-1, -2), (0, 1))
    return np.asarray(array, dtype, order="C")
