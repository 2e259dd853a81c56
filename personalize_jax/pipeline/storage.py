"""Reading and writing pipelines, in the layouts of their families."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from personalize_jax.families import registry
from personalize_jax.families.base import Place
from personalize_jax.pipeline.cascade import Pipeline
from personalize_jax.runtime import hosts


def load_pipeline(source: str | Path | Sequence[str | Path], place: Place | None = None, **compute: Any) -> Pipeline:
    """Read a pipeline.

    Args:
        source: "world" for the embedded cascade; a folder that `save_pipeline` wrote; or a public pipeline, as a folder
            that diffusers wrote or the name of a repository on the Hugging Face hub: a list of them for a cascade.
        place: maps a tree of shapes to a tree of shardings for the parameters; None for the default device.
        **compute: how public networks compute: dtype, remat, attention.

    Raises:
        UserError: there is nothing of that name, or it cannot be used.
    """
    sources = [source] if isinstance(source, str | Path) else list(source)
    loaded = registry.load(sources, place, **compute)
    origins = {} if loaded.origin is None else dict.fromkeys(loaded.params, loaded.origin)
    return Pipeline(loaded.family, loaded.params, loaded.read_float32, origins=origins)


def save_pipeline(pipeline: Pipeline, folder: Path, dtype: Any = jnp.float16) -> None:
    """Write a pipeline for `load_pipeline`, in the layout that it came in, each file to a temporary name first.

    Args:
        pipeline: the pipeline to write.
        folder: made if missing; files of the same names are replaced.
        dtype: dtype of the stored parameters.

    Raises:
        UserError: a file cannot be written.
    """
    if jax.process_count() > 1:  # each of which has a part of the parameters
        params = {name: hosts.gather_on_first(pipeline.float32_params(name)) for name in pipeline.params}
        pipeline = pipeline.replace_params(**params)
    hosts.first_does(lambda: pipeline.family.write(pipeline.float32_params, folder, dtype))
