"""The rendered world as a TensorFlow Datasets builder, and as plain arrays.

TensorFlow itself is not needed: records are array_record files, written from numpy and read as a data source.

TFDS writes a dataset in one go and starts again when it is interrupted. Rendering is the slow part, so it is done in
blocks, each a function of (split, block number) alone and kept beside the dataset until the last one is rendered: a
preparation that was killed continues with the first block that is missing.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from personalize_jax.runtime import interruption
from personalize_jax.runtime.files import replacing
from personalize_jax.world.captions import caption_variants
from personalize_jax.world.render import render
from personalize_jax.world.scene import (
    LABELS,
    SPLITS,
    Scene,
    Split,
    Subject,
    View,
    sample_subjects,
    sample_views,
    select,
)

Example = tuple[int, dict[str, Any]]  # its number and features

CAPTIONS_PER_IMAGE = 4
BLOCK_SIZE = 1024
SEED = 20230315


@dataclass(kw_only=True)
class WorldConfig(tfds.core.BuilderConfig):
    """The size of the pictures, and the number of pictures of each split; a split without a number is left out."""

    resolution: int
    counts: Mapping[str, int]


class World(tfds.core.ShardBasedBuilder):
    """Rendered objects of named classes in named places: pictures with masks, captions and exact properties."""

    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES = {
        "1.0.0": "First version.",
        "1.1.0": "The ordinary words in captions name colourings.",
    }
    url_infos = None  # nothing is downloaded

    def _info(self) -> tfds.core.DatasetInfo:
        r = self.builder_config.resolution
        picture = tfds.features.Tensor(shape=(r, r, 4), dtype=np.uint8, encoding=tfds.features.Encoding.BYTES)
        captions = tfds.features.Sequence(tfds.features.Text(), length=CAPTIONS_PER_IMAGE)
        truth = {name: _feature(name, column) for name, column in columns_of(block_scenes("train", 0)).items()}
        return self.dataset_info_from_configs(
            description=self.__doc__,
            features=tfds.features.FeaturesDict({"image": picture, "captions": captions} | truth),
        )

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Callable[[], Iterator[Example]]]]:
        """The blocks of each split, a shard each: scenes are independent samples, so that any order is random."""
        counts = self.builder_config.counts
        return {split: self._blocks(split, counts[split]) for split in SPLITS if counts.get(split)}

    def _blocks(self, split: Split, count: int) -> list[Callable[[], Iterator[Example]]]:
        resolution = self.builder_config.resolution
        progress = tqdm(total=count, desc=f"rendering {split} at {resolution}x{resolution}", unit="img")
        starts = range(0, count, BLOCK_SIZE)
        return [partial(self._generate_block, split, start, count, progress) for start in starts]

    def _generate_block(self, split: Split, start: int, count: int, progress: tqdm) -> Iterator[Example]:
        resolution = self.builder_config.resolution
        folder = Path(self.data_dir).parents[2] / "world_blocks" / f"{resolution}_{split}"
        block, size = start // BLOCK_SIZE, min(BLOCK_SIZE, count - start)
        scenes = select(block_scenes(split, block), slice(size))
        columns: dict[str, np.ndarray | list[list[str]]] = {
            **columns_of(scenes),
            "image": rendered_once(folder / f"{block:05d}_{size}.npy", scenes, resolution),
            "captions": caption_variants(scenes, block_rng(split, block, "captions"), CAPTIONS_PER_IMAGE),
        }
        for i in range(size):
            yield start + i, {name: column[i] for name, column in columns.items()}
        progress.update(size)
        if start + size == count:
            progress.close()
            shutil.rmtree(folder)


def load(resolution: int, split: Split, count: int, data_dir: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read one split into memory, after rendering it if the data directory does not hold it yet.

    A smaller count gives the first examples of a larger one.

    Returns:
        "image" uint8 [count, resolution, resolution, 4] (red, green, blue, object mask), "captions" str [count, 4], and
        every field of Subject and View under its own name, with a leading [count].

    Raises:
        ValueError: the split is none of SPLITS, or the count is not positive.
    """
    check_request(split, count)
    config = WorldConfig(name=f"{resolution}_{split}_{count}", resolution=resolution, counts={split: count})
    builder = World(config=config, data_dir=os.fspath(data_dir), file_format="array_record")
    tfds.disable_progress_bar()  # one bar is enough
    builder.download_and_prepare()
    arrays: dict[str, np.ndarray] = {
        name: np.empty((count, *feature.shape), np.int32 if name in LABELS else feature.np_dtype)
        for name, feature in builder.info.features.items()
        if name != "captions"
    }
    captions = []
    source = builder.as_data_source(split=split)
    for i, example in enumerate(tqdm(source, desc=f"reading {split} at {resolution}x{resolution}", unit="img")):
        captions.append([text.decode() for text in example.pop("captions")])
        for name, value in example.items():
            arrays[name][i] = value
    return arrays | {"captions": np.array(captions)}


def check_request(split: Split, count: int) -> None:
    """Refuse what `load` cannot give.

    Raises:
        ValueError: the split is none of SPLITS, or the count is not positive.
    """
    if split not in SPLITS or count < 1:
        raise ValueError(f"Asked for {count} images of split {split!r}; expected at least 1 of {', '.join(SPLITS)}.")


def scenes_of(arrays: Mapping[str, np.ndarray]) -> Scene:
    """The scenes from which loaded images were rendered."""
    subject, view = ({name: arrays[name] for name in kind._fields} for kind in (Subject, View))
    return Scene(Subject(**subject), View(**view))


def columns_of(scenes: Scene) -> dict[str, np.ndarray]:
    """The truth about scenes: every field of Subject and View under its own name."""
    return scenes.subject._asdict() | scenes.view._asdict()


def _feature(name: str, column: np.ndarray) -> tfds.features.FeatureConnector:
    if name in LABELS:
        return tfds.features.ClassLabel(names=LABELS[name])
    return tfds.features.Tensor(shape=column.shape[1:], dtype=column.dtype.type)


def block_rng(split: Split, block: int, purpose: Literal["scenes", "captions"]) -> np.random.Generator:
    """The randomness of one block's scenes or captions."""
    return np.random.default_rng([SEED, SPLITS.index(split), block, purpose == "captions"])


def block_scenes(split: Split, block: int) -> Scene:
    """The scenes of one block, which depend on its split and number alone."""
    rng = block_rng(split, block, "scenes")
    subjects = sample_subjects(rng, BLOCK_SIZE, split)
    return Scene(subjects, sample_views(rng, subjects))


def rendered_once(path: Path, scenes: Scene, resolution: int) -> np.ndarray:
    """Render scenes into a file, or read the file of an earlier run: uint8 [N, H, W, 4]."""
    if not path.exists():
        interruption.check()
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.save(file, render(scenes, resolution), allow_pickle=False)
    return np.load(path, allow_pickle=False, mmap_mode="r")
