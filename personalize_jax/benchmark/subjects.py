"""A benchmark: subjects with a few photos each, and prompts for pictures unlike any of the photos."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from personalize_jax.world.scene import Subject


class BenchmarkSubject(NamedTuple):
    """One subject and its prompts.

    Attributes:
        name: a name unique within the benchmark, of a-z, 0-9 and _, so that a folder can bear it.
        class_noun: the subject's class noun.
        is_live: whether the subject is an animal, for which the paper has prompts of its own.
        photos: upright photos in sRGB, uint8 [H, W, 3], each of its own size.
        prompts: 25 prompts with "[V]" before the class noun.
        truth: the exact properties of a rendered subject, arrays of length 1; None for others.
    """

    name: str
    class_noun: str
    is_live: bool
    photos: list[np.ndarray]
    prompts: tuple[str, ...]
    truth: Subject | None = None


@dataclass(frozen=True)
class Benchmark(Sequence[BenchmarkSubject]):
    """The subjects of a benchmark, in order; indexing one reads, or renders, its photos.

    Attributes:
        names: the names of all subjects.
        class_nouns: the class noun of each subject.
        read: reads the subject at an index.
    """

    names: tuple[str, ...]
    class_nouns: tuple[str, ...]
    read: Callable[[int], BenchmarkSubject]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> BenchmarkSubject:  # type: ignore[override]  # no slices
        return self.read(range(len(self.names))[index])  # the range refuses other indices and resolves negative ones
