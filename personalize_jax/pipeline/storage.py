"""Pipelines on disk: a folder of JSON and safetensors.

pipeline.json               the stages and the text encoder, as plain data
tokenizer.json              the vocabulary
token_counts.json           how often each token was processed in pretraining
text_encoder.safetensors    parameters, one file a network
base.safetensors ...
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.flax import load_file, save_file

from personalize_jax.errors import UserError
from personalize_jax.models.params import Params, flatten, unflatten
from personalize_jax.models.text_encoder import TextEncoder
from personalize_jax.pipeline.cascade import Pipeline
from personalize_jax.pipeline.stage import Stage
from personalize_jax.pipeline.tokenizer import Tokenizer

ASSETS = Path(__file__).parent.parent / "assets"
EMBEDDED = ("world",)


def load_pipeline(source: str | Path) -> Pipeline:
    """Read a pipeline.

    Args:
        source: "world" for the embedded cascade, or a folder that `save_pipeline` wrote.

    Raises:
        UserError: nothing of that name, or the folder is no pipeline.
    """
    folder = ASSETS / source if str(source) in EMBEDDED else Path(source)
    if not (folder / "pipeline.json").is_file():
        raise UserError(
            f"No pipeline at {str(source)!r}: "
            f"give {' or '.join(map(repr, EMBEDDED))}, or a folder with a pipeline.json."
        )
    spec = json.loads((folder / "pipeline.json").read_text())
    text_encoder = TextEncoder(**spec["text_encoder"])
    counts = np.array(json.loads((folder / "token_counts.json").read_text()), np.int64)
    tokenizer = Tokenizer.read(folder / "tokenizer.json", text_encoder.max_length, counts)
    stages = tuple(Stage.from_spec(stage) for stage in spec["stages"])
    params = {name: load_params(folder / f"{name}.safetensors") for name in ["text_encoder", *(s.name for s in stages)]}
    return Pipeline(tokenizer, text_encoder, stages, params, spec)


def save_pipeline(pipeline: Pipeline, folder: Path, dtype: Any = jnp.float16) -> None:
    """Write a pipeline for `load_pipeline`, each file to a temporary name first.

    Args:
        pipeline: what to write.
        folder: made if missing; files of the same names are replaced.
        dtype: of the stored parameters.
    """
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
    return unflatten({k: jnp.asarray(v, jnp.float32) for k, v in flat.items()})


def save_params(params: Params, file: Path, dtype: Any = jnp.float32) -> None:
    """Write parameters under their slash-separated paths.

    Raises:
        UserError: the file cannot be written.
    """
    flat = flatten(jax.tree.map(lambda a: jnp.asarray(a, dtype), params))
    with _replacing(file) as temporary:
        try:
            save_file(flat, temporary)
        except SafetensorError as error:
            raise UserError(f"{file} cannot be written ({error}); check free space and permissions.") from error


def write_text(file: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    with _replacing(file) as temporary:
        temporary.write_text(text)


@contextlib.contextmanager
def _replacing(file: Path) -> Iterator[Path]:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
