"""The interface of metrics, each of which has a file of its own; `evaluation.metric_registry` lists them all."""

import dataclasses
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

from personalize_jax.metrics.similarity import similarities, similarities_within
from personalize_jax.metrics.table import Better, mean

MetricEncoders = Mapping[str, Any]  # by their names in `Metric.needs`
T = TypeVar("T")


class Picture(NamedTuple):
    """A picture to be scored, uint8 [H, W, 3]; for the other attributes see `metrics.table.Row`."""

    role: str
    prompt: str
    seed: int | None
    file: str
    pixels: np.ndarray


class SubjectPictures:
    """The pictures of one subject, and a cache of the computations that metrics share.

    Attributes:
        pictures: the pictures of all roles, photos included.
        class_noun: the subject's class noun, or None where it is not known.
        truth: a rendered subject's true properties, or None where they are not known.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        class_noun: str | None = None,
        truth: Mapping[str, int | np.ndarray] | None = None,
    ) -> None:
        self.pictures, self.class_noun, self.truth = pictures, class_noun, truth
        self._computed: dict[Hashable, Any] = {}

    def of_role(self, role: str) -> list[int]:
        """The indices of the pictures of a role."""
        return [i for i, picture in enumerate(self.pictures) if picture.role == role]

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Compute a value at the first call with its key, and keep it for later calls."""
        if key not in self._computed:
            self._computed[key] = compute()
        return self._computed[key]

    def embedded(self, encoder: Callable[[Sequence[np.ndarray]], np.ndarray]) -> np.ndarray:
        """The embeddings of all pictures, float32 [N, D] of unit length, computed once for each encoder."""
        return self.once(("embedded", encoder), lambda: encoder([picture.pixels for picture in self.pictures]))

    def similarities_to_photos(
        self, rows: Sequence[int], encoder: Callable[[Sequence[np.ndarray]], np.ndarray]
    ) -> Sequence[float | None]:
        """The mean cosine of each picture to the photos, in [-1, 1].

        Args:
            rows: the indices of pictures of one role; photos are compared with the other photos.
            encoder: embeds pictures.

        Returns:
            A number for each of the pictures; None for the only photo.
        """
        embedded_ND, photos = self.embedded(encoder), self.of_role("photo")
        if rows != photos:
            return similarities(embedded_ND[rows], embedded_ND[photos]).tolist()
        return similarities_within(embedded_ND[photos]).tolist() if len(photos) > 1 else [None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric, which either scores pictures one by one (`score`) or follows from a subject's other metrics (`derive`).

    Attributes:
        name: the metric's name in tables.
        definition: its definition, in a phrase.
        section: the section of Ruiz et al. 2023 that defines it; empty for a metric that is not the paper's.
        unit: the unit, or the kind of number and its range.
        better: which way is better; None for neither.
        table: the table of an experiment that shows it: "similarity", beside the paper's own rows, or the exact metrics
            of the "subject" or of its "class".
        in_figure: whether an experiment's figure shows it, too.
        needs: the names of the encoders that it needs, of those in `evaluation.scoring.ENCODERS`. The metric is left
            out where one of them is not configured.
        roles: the roles of the pictures that are scored; see `metrics.table.Row`.
        score: takes a subject's pictures, the indices of those of one role, and the encoders in the order of `needs`;
            gives the score of each, a number or a category, or None where a picture has none.
        combine: takes the scores of a subject's pictures; gives the subject's score.
        derive: takes a subject's other metrics by name; gives this one, or None where it cannot be derived.
        version: the number of the metric's definition; scores of different versions cannot be compared.
    """

    name: str
    definition: str
    section: str = ""
    unit: str
    better: Better | None
    table: Literal["similarity", "subject", "class"]
    in_figure: bool = False
    needs: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    score: Callable[..., Sequence[float | str | None]] | None = None
    combine: Callable[[Sequence[Any]], float] = mean
    derive: Callable[[Mapping[str, float]], float | None] | None = None
    version: int = 1
