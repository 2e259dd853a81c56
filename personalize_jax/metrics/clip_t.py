"""CLIP-T: how true pictures are to their prompts."""

from collections.abc import Sequence

from personalize_jax.metrics.encoders import ClipEncoder
from personalize_jax.metrics.metric import Metric, SubjectPictures
from personalize_jax.metrics.similarity import prompt_similarities
from personalize_jax.subject.class_noun import class_prompt


def score(subject: SubjectPictures, rows: Sequence[int], clip: ClipEncoder) -> list[float]:
    """Compare pictures with their own prompts, without the identifier, which CLIP does not know."""
    texts_ND = clip.texts([class_prompt(subject.pictures[i].prompt) for i in rows])
    return prompt_similarities(subject.embedded(clip.images)[rows], texts_ND).tolist()


METRIC = Metric(
    name="CLIP-T",
    definition="cosine of a picture of the subject and its prompt without the identifier, embedded by CLIP",
    section="4.1",
    unit="cosine, -1 to 1",
    better="higher",
    table="similarity",
    in_figure=True,
    needs=("clip",),
    roles=("subject",),
    score=score,
)
