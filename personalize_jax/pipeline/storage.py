"""Pipelines on disk: public ones as diffusers lays them out, and our own as a folder of JSON and safetensors.

pipeline.json               the stages and the text encoder, as plain data
tokenizer.json              the vocabulary
token_counts.json           how often each token was processed in pretraining
text_encoder.safetensors    parameters, one file a network
base.safetensors ...
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from personalize_jax import hosts
from personalize_jax.errors import UserError
from personalize_jax.files import replacing, write_text
from personalize_jax.models.params import Params, flatten, unflatten
from personalize_jax.models.text_encoder import TextEncoder
from personalize_jax.pipeline import hub
from personalize_jax.pipeline.cascade import Pipeline
from personalize_jax.pipeline.public import load_public, save_public, saved_folders
from personalize_jax.pipeline.stage import Stage
from personalize_jax.pipeline.tokenizer import Tokenizer

ASSETS = Path(__file__).parent.parent / "assets"
EMBEDDED = ("world",)


def load_pipeline(
    source: str | Path | Sequence[str | Path], place: Callable[[Params], Params] | None = None, **compute: Any
) -> Pipeline:
    """Read a pipeline.

    Args:
        source: "world" for the embedded cascade; a folder that `save_pipeline` wrote; or a public pipeline, as a folder
            that diffusers wrote or the name of a repository on the Hugging Face hub: a list of them for a cascade.
        place: of public pipelines: from a tree of shapes to a tree of shardings for the parameters.
        **compute: of public networks: dtype, remat, attention.

    Raises:
        UserError: nothing of that name, or it cannot be used.
    """
    sources = [source] if isinstance(source, str | Path) else list(source)
    if len(sources) > 1:
        return load_public(sources, place, **compute)
    folder = ASSETS / sources[0] if str(sources[0]) in EMBEDDED else Path(sources[0])
    if not (folder / "pipeline.json").is_file():
        folders = saved_folders(folder)
        if not folders and not hub.is_name(str(sources[0]).rstrip("/")):
            raise UserError(
                f"No pipeline at {str(sources[0])!r}: give {' or '.join(map(repr, EMBEDDED))}, or a folder with a "
                "pipeline.json or a model_index.json."
            )
        return load_public(folders or sources, place, **compute)
    spec = json.loads((folder / "pipeline.json").read_text())
    text_encoder = TextEncoder(**spec["text_encoder"])
    counts = np.array(json.loads((folder / "token_counts.json").read_text()), np.int64)
    tokenizer = Tokenizer.read(folder / "tokenizer.json", text_encoder.max_length, counts)
    tokenizer.check_rows(text_encoder.vocab_size)
    stages = tuple(Stage.from_spec(stage) for stage in spec["stages"])
    params = {name: load_params(folder / f"{name}.safetensors") for name in ["text_encoder", *(s.name for s in stages)]}
    return Pipeline(tokenizer, text_encoder, stages, params, spec)


def is_pipeline(folder: Path) -> bool:
    """Whether a folder holds a pipeline, of ours or of diffusers."""
    return (folder / "pipeline.json").is_file() or bool(saved_folders(folder))


def save_pipeline(pipeline: Pipeline, folder: Path, dtype: Any = jnp.float16) -> None:
    """Write a pipeline for `load_pipeline`, in the layout that it came in, each file to a temporary name first.

    Args:
        pipeline: what to write.
        folder: made if missing; files of the same names are replaced.
        dtype: of the stored parameters.

    Raises:
        UserError: a file cannot be written.
    """
    if jax.process_count() > 1:  # which hold parts of it
        params = {name: hosts.gathered(pipeline.params_in_full(name)) for name in pipeline.params}
        pipeline = pipeline.replace_params(**params)
    write = save_public if pipeline.is_public else _save_own
    hosts.first_does(lambda: write(pipeline, folder, dtype))


def _save_own(pipeline: Pipeline, folder: Path, dtype: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, params in pipeline.params.items():
        save_params(params, folder / f"{name}.safetensors", dtype)
    write_text(folder / "tokenizer.json", pipeline.tokenizer.backend.backend_tokenizer.to_str())
    write_text(folder / "token_counts.json", json.dumps(pipeline.tokenizer.counts.tolist()))
    write_text(folder / "pipeline.json", json.dumps(pipeline.spec, indent=2))


def load_params(file: Path) -> Params:
    """Parameters of one network as a nested dict of float32 arrays.

    Raises:
        UserError: the file is cut short or no safetensors file.
    """
    try:
        flat = load_file(file)
    except Exception as error:  # safetensors raises its own, undocumented kinds
        raise UserError(
            f"{file} cannot be read as safetensors ({error}); restore the file or write it again."
        ) from error
    # Converted here: on a device that takes a program for every shape, seconds to compile whenever a command starts.
    return unflatten(jax.device_put({k: np.asarray(v, np.float32) for k, v in flat.items()}))


def save_params(params: Params, file: Path, dtype: Any = jnp.float32) -> None:
    """Write parameters under their slash-separated paths.

    Raises:
        UserError: the file cannot be written.
    """
    flat = flatten(jax.tree.map(lambda a: np.asarray(a, dtype, order="C"), params))  # as files hold them
    with replacing(file, apart=True) as temporary:
        try:
            save_file(flat, temporary)
        except SafetensorError as error:
            raise UserError(f"{file} cannot be written ({error}); check free space and permissions.") from error
