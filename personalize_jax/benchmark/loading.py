"""Benchmarks by name."""

import os
from pathlib import Path

from personalize_jax.benchmark import dreambooth
from personalize_jax.benchmark.subjects import Benchmark
from personalize_jax.benchmark.world import rendered_benchmark
from personalize_jax.runtime.errors import UserError


def load_benchmark(name: str | Path, data_dir: str | os.PathLike | None = None) -> Benchmark:
    """Load a benchmark; photos are read, or rendered, one subject at a time as subjects are taken out.

    Args:
        name: "world", the rendered one; "dreambooth", the paper's dataset, prepared by TensorFlow Datasets and
            downloaded where it was not prepared before; or a folder that holds a copy of the paper's dataset.
        data_dir: where TensorFlow Datasets keeps what it prepared; by default ~/tensorflow_datasets. For "dreambooth".

    Raises:
        UserError: there is no such benchmark or folder, the folder lacks subjects, or the download fails.
    """
    if name == "world":
        return rendered_benchmark()
    if name == "dreambooth":
        return dreambooth.load(data_dir)
    if not Path(name).is_dir():
        raise UserError(
            f"{name} is no benchmark; give world, dreambooth, or a folder that holds a copy of the DreamBooth dataset."
        )
    return dreambooth.read_folder(name)
