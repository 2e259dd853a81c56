"""DIV: how varied the subject's pictures of one prompt are."""

from collections.abc import Sequence

from personalize_jax.metrics.metric import Metric, SubjectPictures
from personalize_jax.metrics.similarity import Distance, distances_within


def score(subject: SubjectPictures, rows: Sequence[int], distance: Distance) -> list[float | None]:
    """Compare pictures with the others of their prompt; None for the only picture of a prompt."""
    scores: dict[int, float | None] = dict.fromkeys(rows)
    of_prompt: dict[str, list[int]] = {}
    for i in rows:
        of_prompt.setdefault(subject.pictures[i].prompt, []).append(i)
    for alike in of_prompt.values():
        if len(alike) > 1:
            distances = distances_within([subject.pictures[i].pixels for i in alike], distance)
            scores.update(zip(alike, distances.tolist(), strict=True))
    return list(scores.values())


METRIC = Metric(
    name="DIV",
    definition="mean distance of a picture of the subject to the others of its prompt: LPIPS or, without "
    "`config.evaluation.lpips`, one less DINO's cosine",
    section="4.3",
    unit="distance, 0 or more",
    better="higher",
    table="similarity",
    in_figure=True,
    needs=("distance",),
    roles=("subject",),
    score=score,
)
