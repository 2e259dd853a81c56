"""CLIP-I: how true pictures are to the subject, by an encoder of pictures and texts."""

from collections.abc import Sequence

from personalize_jax.metrics.encoders import ClipEncoder
from personalize_jax.metrics.metric import Metric, SubjectPictures


def score(subject: SubjectPictures, rows: Sequence[int], clip: ClipEncoder) -> Sequence[float | None]:
    """Compare pictures with the photos, and photos with each other."""
    return subject.similarities_to_photos(rows, clip.images)


METRIC = Metric(
    name="CLIP-I",
    definition="mean cosine of a picture of the subject and each of its photos, embedded by CLIP",
    section="4.1",
    unit="cosine, -1 to 1",
    better="higher",
    table="similarity",
    needs=("clip",),
    roles=("photo", "subject"),
    score=score,
)
