"""Exact metrics of the rendered world, which compare the probe's reading of pictures with the truth.

A picture of the subject is scored by whether it has each of the subject's properties, and the context and property that
its prompt asks for; a picture of the class, by whether it has become the subject. A property that a prompt changes
counts for the prompt alone, such as the body colour in "a red [V] dog".
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from personalize_jax.metrics.metric import Metric, Picture, SubjectPictures
from personalize_jax.metrics.table import Better, Scores, entropy, mean
from personalize_jax.subject.images import from_pixels
from personalize_jax.world.captions import requested_properties
from personalize_jax.world.probe import RESOLUTION, Probe
from personalize_jax.world.reading import IDENTITY, Reading, fidelities, is_subject, subject_truth
from personalize_jax.world.scene import CLASSES, COLOURS, Subject

# The subject's properties that are scored, and the names of their scores.
_OF_SUBJECT = {
    "class_id": "class",
    "body_colour": "body colour",
    "accent_colour": "accent colour",
    "pattern": "pattern",
    "finish": "finish",
    "shape": "proportions",
}
_CHANGES = ("body_colour", "finish", "accessory")  # properties of the object that prompts may change
_COLOUR_NAMES = tuple(COLOURS)


def truth_of(subject: Subject) -> dict[str, int | np.ndarray]:
    """A rendered subject's true properties that are scored, by name."""
    return {name: getattr(subject, name)[0] for name in _OF_SUBJECT}


def subject_scores(reading: Reading, truth: Mapping[str, int | np.ndarray], prompts: Sequence[str]) -> list[Scores]:
    """Score pictures of a subject.

    Args:
        reading: the probe's reading of N pictures.
        truth: the subject's own properties.
        prompts: the prompt of each picture.

    Returns:
        The scores of each picture, in [0, 1]: "class", "body colour", "accent colour", "pattern", "finish",
        "proportions" unless the probe cannot tell them, and "context" and "property" where the prompt asks for them.
    """
    found = fidelities(reading, **truth)
    scored: list[Scores] = []
    for i, prompt in enumerate(prompts):
        requested = requested_properties(prompt)
        one = Reading(*(p_NK[i : i + 1] for p_NK in reading))
        changed = {name: requested[name] for name in _CHANGES if name in requested}
        own = {name: float(found[name][i]) for name in found if name not in changed}
        scores: Scores = {_OF_SUBJECT[name]: value for name, value in own.items() if not np.isnan(value)}
        if "context" in requested:
            scores["context"] = float(fidelities(one, context=requested["context"])["context"][0])
        if changed:
            scores["property"] = float(min(score[0] for score in fidelities(one, **changed).values()))
        scored.append(scores)
    return scored


def class_scores(reading: Reading, truth: Mapping[str, int | np.ndarray]) -> list[Scores]:
    """Score pictures of the class: "leakage" and "is subject" in [0, 1], and "colours", whose entropy is diversity.

    Args:
        reading: the probe's reading of N pictures.
        truth: the subject's properties, which pictures of the class should not have.
    """
    leaked = fidelities(reading, body_colour=truth["body_colour"])["body_colour"]
    became = is_subject(reading, **{name: truth[name] for name in IDENTITY})
    colours = [_COLOUR_NAMES[colour] for colour in reading.body_colour.argmax(axis=1)]
    return [
        {"leakage": float(one), "is subject": float(all_), "colours": colour}
        for one, all_, colour in zip(leaked, became, colours, strict=True)
    ]


def _scores(subject: SubjectPictures, rows: Sequence[int], probe: Probe) -> list[Scores]:
    """All exact scores of the pictures of one role."""

    def truth() -> Mapping[str, int | np.ndarray]:
        class_id = CLASSES.index(subject.class_noun) if subject.class_noun in CLASSES else None
        return subject_truth(_read(probe, [subject.pictures[i] for i in subject.of_role("photo")]), class_id)

    def scores() -> list[Scores]:
        of_role = [subject.pictures[i] for i in rows]
        known = subject.truth or subject.once("truth", truth)
        if of_role[0].role == "subject":
            return subject_scores(_read(probe, of_role), known, [picture.prompt for picture in of_role])
        return class_scores(_read(probe, of_role), known)

    return subject.once(("exact scores", *rows), scores)


def _read(probe: Probe, pictures: Sequence[Picture]) -> Reading:
    """Let the probe read the middle squares of pictures, all scaled to one side that it takes."""
    least = min(min(picture.pixels.shape[:2]) for picture in pictures)
    side = max(least // RESOLUTION, 1) * RESOLUTION
    return probe.read(np.stack([from_pixels(p.file, p.pixels, side).pixels for p in pictures]))


def _diversity_kept(metrics: Mapping[str, float]) -> float | None:
    """The ratio of diversity after to before; None where there was none before."""
    after, before = metrics.get("colours"), metrics.get("colours before")
    return after / before if before and after is not None else None


def _leakage_added(metrics: Mapping[str, float]) -> float | None:
    """How much more of the class has the subject's body colour than before; None where either is unknown."""
    after, before = metrics.get("leakage"), metrics.get("leakage before")
    return None if after is None or before is None else after - before


def _metric(
    name: str,
    table: Literal["subject", "class"],
    definition: str,
    unit: str = "share, 0 to 1",
    better: Better | None = "higher",
    in_figure: bool = False,
    combine: Callable[[Sequence[Any]], float] = mean,
) -> Metric:
    """The metric of a score that `subject_scores` or `class_scores` give under its name."""

    def score(subject: SubjectPictures, rows: Sequence[int], probe: Probe) -> list[float | str | None]:
        return [scores.get(name) for scores in _scores(subject, rows, probe)]

    return Metric(
        name=name,
        definition=definition,
        unit=unit,
        better=better,
        table=table,
        in_figure=in_figure,
        needs=("probe",),
        roles=("subject",) if table == "subject" else ("class", "class before"),
        score=score,
        combine=combine,
    )


METRICS = (
    _metric("class", "subject", "pictures of the subject that show its class"),
    _metric(
        "body colour",
        "subject",
        "pictures of the subject in its body colour, where the prompt asks for no colour",
        in_figure=True,
    ),
    _metric("accent colour", "subject", "pictures of the subject in its accent colour"),
    _metric("pattern", "subject", "pictures of the subject with its pattern", in_figure=True),
    _metric("finish", "subject", "pictures of the subject with its finish, where the prompt asks for none"),
    _metric(
        "proportions",
        "subject",
        "one less the mean absolute error of the subject's proportions, of those that the probe can tell; 0 where a "
        "picture shows another class",
        unit="likeness, 0 to 1",
    ),
    _metric("context", "subject", "pictures of the subject in the context that the prompt asks for", in_figure=True),
    _metric("property", "subject", "pictures of the subject with the colour, finish or hat that the prompt asks for"),
    _metric("leakage", "class", "pictures of the class in the subject's body colour", better="lower"),
    Metric(
        name="leakage added",
        definition='"leakage" after tuning less "leakage" before it, which is the class\'s own rate of that colour',
        unit="difference of shares, -1 to 1",
        better="lower",
        table="class",
        needs=("probe",),
        derive=_leakage_added,
    ),
    _metric(
        "is subject",
        "class",
        "pictures of the class that equal the subject in class, colours and pattern",
        better="lower",
    ),
    _metric(
        "colours",
        "class",
        "entropy of the body colours of the class's pictures; for N pictures it is too low by some 7 / N",
        unit="bits, 0 to 3.46",
        better=None,
        combine=entropy,
    ),
    Metric(
        name="diversity kept",
        definition='"colours" after tuning, as a share of "colours" before it',
        unit="ratio, 0 or more",
        better="higher",
        table="class",
        in_figure=True,
        needs=("probe",),
        derive=_diversity_kept,
    ),
)
