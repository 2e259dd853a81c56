"""The DreamBooth dataset (Ruiz et al., CVPR 2023): 30 subjects of 15 classes, 25 prompts each.

    python -m personalize_jax.benchmark.dreambooth --folder=dreambooth/dataset --data_dir=data

prepares it for TensorFlow Datasets from a copy, or without --folder from a download of some 150 photos. TensorFlow
itself is not needed: records are array_record files, read as a data source.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import flags

from personalize_jax.benchmark.prompts import LIVE_CLASSES, dreambooth_prompts
from personalize_jax.benchmark.subjects import Benchmark, BenchmarkSubject
from personalize_jax.pipeline.pictures import encode_png
from personalize_jax.runtime import command
from personalize_jax.runtime.errors import UserError
from personalize_jax.subject.images import list_images, read_image

HOMEPAGE = "https://github.com/google/dreambooth"
ARCHIVE = f"{HOMEPAGE}/archive/refs/heads/main.zip"
FOLDER_IN_ARCHIVE = Path("dreambooth-main") / "dataset"
NUM_PROMPTS = 25
SPLIT = "test"

# The class noun of each subject, as in the dataset's prompts_and_classes.txt.
SUBJECTS = {
    "backpack": "backpack",
    "backpack_dog": "backpack",
    "bear_plushie": "stuffed animal",
    "berry_bowl": "bowl",
    "can": "can",
    "candle": "candle",
    "cat": "cat",
    "cat2": "cat",
    "clock": "clock",
    "colorful_sneaker": "sneaker",
    "dog": "dog",
    "dog2": "dog",
    "dog3": "dog",
    "dog5": "dog",
    "dog6": "dog",
    "dog7": "dog",
    "dog8": "dog",
    "duck_toy": "toy",
    "fancy_boot": "boot",
    "grey_sloth_plushie": "stuffed animal",
    "monster_toy": "toy",
    "pink_sunglasses": "glasses",
    "poop_emoji": "toy",
    "rc_car": "toy",
    "red_cartoon": "cartoon",
    "robot_toy": "toy",
    "shiny_sneaker": "sneaker",
    "teapot": "teapot",
    "vase": "vase",
    "wolf_plushie": "stuffed animal",
}


class DreamBooth(tfds.core.GeneratorBasedBuilder):
    """The DreamBooth paper's subjects, each with its class noun, a few upright photos in sRGB, and 25 prompts."""

    name = "dreambooth"
    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    url_infos = None  # the archive of a branch has no lasting checksum

    def __init__(self, *, folder: str | os.PathLike | None = None, **builder: Any) -> None:
        """Choose the source.

        Args:
            folder: a copy of the dataset, with a folder for each subject; None for a download.
            **builder: arguments of every builder, such as data_dir and file_format="array_record".
        """
        self._folder = folder
        super().__init__(**builder)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "name": text,
                    "class_noun": tfds.features.ClassLabel(names=sorted(set(SUBJECTS.values()))),
                    "is_live": np.bool_,
                    "photos": tfds.features.Sequence(tfds.features.Image(encoding_format="png")),
                    "prompts": tfds.features.Sequence(text, length=NUM_PROMPTS),
                }
            ),
            homepage=HOMEPAGE,
            license="CC BY 4.0; photos by their sources, see references_and_licenses.txt in the dataset",
            citation=(
                "@inproceedings{ruiz2023dreambooth, "
                "title={DreamBooth: Fine Tuning Text-to-Image Diffusion Models for Subject-Driven Generation}, "
                "author={Ruiz, Nataniel and Li, Yuanzhen and Jampani, Varun and Pritch, Yael and Rubinstein, Michael "
                "and Aberman, Kfir}, booktitle={CVPR}, year={2023}}"
            ),
            disable_shuffling=True,  # in the order of SUBJECTS
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        folder = self._folder or Path(dl_manager.download_and_extract(ARCHIVE)) / FOLDER_IN_ARCHIVE
        return {SPLIT: self._generate_examples(read_folder(folder))}

    def _generate_examples(self, subjects: Benchmark) -> Iterator[tuple[int, dict[str, Any]]]:
        for i, subject in enumerate(subjects):
            yield (
                i,
                {
                    "name": subject.name,
                    "class_noun": subject.class_noun,
                    "is_live": subject.is_live,
                    "photos": [encode_png(photo, {}) for photo in subject.photos],
                    "prompts": subject.prompts,
                },
            )


def read_folder(folder: str | os.PathLike) -> Benchmark:
    """Read the dataset from a copy, in which every subject has a folder with its photos.

    Raises:
        UserError: a subject is missing or has no photos; or, when a subject is read, a photo is damaged.
    """
    folder = Path(folder)
    missing = [name for name in SUBJECTS if not (folder / name).is_dir()]
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of the DreamBooth dataset's {len(SUBJECTS)} folders, such as {missing[0]}; "
            f"name the folder {FOLDER_IN_ARCHIVE.name} of a complete copy of {HOMEPAGE}."
        )
    files = [list_images(folder / name) for name in SUBJECTS]
    return _benchmark(lambda index: [read_image(file) for file in files[index]])


def load(data_dir: str | os.PathLike | None = None, folder: str | os.PathLike | None = None) -> Benchmark:
    """Read the dataset as TensorFlow Datasets keeps it, after preparing it if it is not there.

    Args:
        data_dir: the folder of TensorFlow Datasets; by default ~/tensorflow_datasets.
        folder: a copy to prepare the dataset from; None for a download.

    Raises:
        UserError: the copy is not complete, or the download fails.
    """
    builder = DreamBooth(folder=folder, data_dir=data_dir, file_format="array_record")
    try:
        builder.download_and_prepare()
    except (tfds.download.DownloadError, OSError) as error:
        raise UserError(
            f"The DreamBooth dataset could not be prepared in {builder.data_dir} ({error}); check the connection and "
            "the directory, or give the folder of a copy."
        ) from error
    source = builder.as_data_source(split=SPLIT)
    return _benchmark(lambda index: source[index]["photos"])


def _benchmark(read_photos: Callable[[int], list[np.ndarray]]) -> Benchmark:
    names, nouns = tuple(SUBJECTS), tuple(SUBJECTS.values())

    def read(index: int) -> BenchmarkSubject:
        noun, photos = nouns[index], read_photos(index)
        return BenchmarkSubject(names[index], noun, noun in LIVE_CLASSES, photos, dreambooth_prompts(noun))

    return Benchmark(names, nouns, read)


def define_flags() -> None:
    """The command line."""
    flags.DEFINE_string("folder", None, "A copy of the dataset, with a folder for each subject; by default a download.")
    flags.DEFINE_string("data_dir", None, "Folder of TensorFlow Datasets; by default ~/tensorflow_datasets.")


def main(_: list[str]) -> None:
    """Prepare the dataset."""
    arguments = flags.FLAGS
    subjects = load(arguments.data_dir, arguments.folder)
    count = sum(len(subject.photos) for subject in subjects)
    print(f"{len(subjects)} subjects, {count} photos")


if __name__ == "__main__":
    command.run(main, define_flags, required=())
