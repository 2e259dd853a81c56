"""A benchmark: subjects with a few photos each, and prompts that put them where no photo shows them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from personalize_jax.world.scene import Subject


class BenchmarkSubject(NamedTuple):
    """One subject, and what is asked of a method that has learnt it.

    Attributes:
        name: unique within the benchmark; of a-z, 0-9 and _, so that it can name a folder.
        class_noun: such as "dog".
        is_live: whether it is an animal, for which the paper has prompts of its own.
        photos: uint8 [H, W, 3] each, of sizes of their own, upright, sRGB.
        prompts: 25, with "[V]" before the class noun.
        truth: its exact properties, arrays of length 1, where it is of the rendered world; else None.
    """

    name: str
    class_noun: str
    is_live: bool
    photos: list[np.ndarray]
    prompts: tuple[str, ...]
    truth: Subject | None = None


@dataclass(frozen=True)
class Benchmark(Sequence[BenchmarkSubject]):
    """The subjects of a benchmark in order; the photos of one are read, or rendered, whenever it is taken out.

    Attributes:
        names: of all subjects, known without reading any.
        class_nouns: theirs, likewise.
        read: gives the subject at an index.
    """

    names: tuple[str, ...]
    class_nouns: tuple[str, ...]
    read: Callable[[int], BenchmarkSubject]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> BenchmarkSubject:  # type: ignore[override]  # no slices
        return self.read(range(len(self.names))[index])  # the range refuses what is outside and knows negatives
