"""Benchmarks by name."""

from pathlib import Path

from personalize_jax.benchmark import dreambooth
from personalize_jax.benchmark.subjects import Benchmark
from personalize_jax.benchmark.world import rendered_benchmark, settings_benchmark
from personalize_jax.runtime.errors import UserError


def load_benchmark(name: str | Path) -> Benchmark:
    """Load a benchmark.

    Args:
        name: "world", the rendered one; "world:settings", other subjects of that kind, to choose settings on;
            "dreambooth", the paper's dataset, which TensorFlow Datasets prepares in ~/tensorflow_datasets, from a
            download, if it is not there; or the folder of a copy of the paper's dataset.

    Raises:
        UserError: there is no such benchmark or folder, the folder lacks subjects, or the download fails.
    """
    if name == "world":
        return rendered_benchmark()
    if name == "world:settings":
        return settings_benchmark()
    if name == "dreambooth":
        return dreambooth.load()
    if not Path(name).is_dir():
        raise UserError(
            f"{name} is no benchmark; give world, world:settings, dreambooth, or a folder that holds a copy of the "
            "DreamBooth dataset."
        )
    return dreambooth.read_folder(name)
