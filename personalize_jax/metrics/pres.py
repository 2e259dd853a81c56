"""PRES: how far the class has become the subject."""

from collections.abc import Sequence

from personalize_jax.metrics.encoders import ImageEncoder
from personalize_jax.metrics.metric import Metric, SubjectPictures


def score(subject: SubjectPictures, rows: Sequence[int], dino: ImageEncoder) -> Sequence[float | None]:
    """Compare pictures of the class with the subject's photos."""
    return subject.similarities_to_photos(rows, dino)


METRIC = Metric(
    name="PRES",
    definition="mean cosine of a picture of the class, sampled without the identifier, and each of the subject's "
    "photos, embedded by DINO",
    section="4.3",
    unit="cosine, -1 to 1",
    better="lower",
    table="similarity",
    in_figure=True,
    needs=("dino",),
    roles=("class", "class before"),
    score=score,
)
