"""DINO: how true pictures are to the subject, by an encoder that tells members of one class apart."""

from collections.abc import Sequence

from personalize_jax.metrics.encoders import ImageEncoder
from personalize_jax.metrics.metric import Metric, SubjectPictures


def score(subject: SubjectPictures, rows: Sequence[int], dino: ImageEncoder) -> Sequence[float | None]:
    """Compare pictures with the photos, and photos with each other."""
    return subject.similarities_to_photos(rows, dino)


METRIC = Metric(
    name="DINO",
    definition="mean cosine of a picture of the subject and each of its photos, embedded by DINO",
    section="4.1",
    unit="cosine, -1 to 1",
    better="higher",
    table="similarity",
    in_figure=True,
    needs=("dino",),
    roles=("photo", "subject"),
    score=score,
)
