"""CLIP-T: how true pictures are to their prompts."""

from collections.abc import Sequence

import numpy as np

from personalize_jax.metrics.encoders import ClipEncoder
from personalize_jax.metrics.metric import Metric, SubjectPictures
from personalize_jax.metrics.similarity import prompt_similarities
from personalize_jax.subject.class_noun import class_prompt


def score(subject: SubjectPictures, rows: Sequence[int], clip: ClipEncoder) -> np.ndarray:
    """Compare pictures with their own prompts, without the identifier, of which CLIP knows nothing."""
    texts_ND = clip.texts([class_prompt(subject.pictures[i].prompt) for i in rows])
    return prompt_similarities(subject.embedded(clip.images)[rows], texts_ND)


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
