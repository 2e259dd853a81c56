"""Exact metrics of the rendered world: what the probe reads off pictures, held against the truth.

Of a picture of the subject: whether each of its properties is the subject's, and whether context and property are those
that the prompt asks for. Of a picture of the class: whether it has become the subject. What a prompt changes is not
asked of the subject: in "a red [V] dog" the body colour counts for the prompt.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from personalize_jax.metrics.metric import Metric, Picture, SubjectPictures
from personalize_jax.metrics.table import Scores, entropy
from personalize_jax.subject.images import from_pixels
from personalize_jax.world.captions import asked
from personalize_jax.world.probe import RESOLUTION, Probe
from personalize_jax.world.reading import IDENTITY, Reading, fidelities, is_subject, subject_truth
from personalize_jax.world.scene import CLASSES, COLOURS, Subject

# Of the subject's truth, what is scored and how the scores are called.
_OF_SUBJECT = {
    "class_id": "class",
    "body_colour": "body colour",
    "accent_colour": "accent colour",
    "pattern": "pattern",
    "finish": "finish",
    "shape": "proportions",
}
_CHANGES = ("body_colour", "finish", "accessory")  # what prompts ask of the object itself
_COLOUR_NAMES = tuple(COLOURS)


def truth_of(subject: Subject) -> dict[str, int | np.ndarray]:
    """A rendered subject's true properties, as the metrics take them."""
    return {name: getattr(subject, name)[0] for name in _OF_SUBJECT}


def subject_scores(reading: Reading, truth: Mapping[str, int | np.ndarray], prompts: Sequence[str]) -> list[Scores]:
    """Score pictures of a subject.

    Args:
        reading: of N pictures.
        truth: the subject's own properties.
        prompts: what each picture was drawn for.

    Returns:
        Scores in [0, 1] of each picture: "class", "body colour", "accent colour", "pattern", "finish", "proportions",
        and where the prompt asks for it "context" and "property". Proportions are left out where they cannot be told.
    """
    found = fidelities(reading, **truth)
    scored: list[Scores] = []
    for i, prompt in enumerate(prompts):
        wanted = asked(prompt)
        one = Reading(*(p_NK[i : i + 1] for p_NK in reading))
        changed = {name: wanted[name] for name in _CHANGES if name in wanted}
        own = {name: float(found[name][i]) for name in found if name not in changed}
        scores: Scores = {_OF_SUBJECT[name]: value for name, value in own.items() if not np.isnan(value)}
        if "context" in wanted:
            scores["context"] = float(fidelities(one, context=wanted["context"])["context"][0])
        if changed:
            scores["property"] = float(min(score[0] for score in fidelities(one, **changed).values()))
        scored.append(scores)
    return scored


def class_scores(reading: Reading, truth: Mapping[str, int | np.ndarray]) -> list[Scores]:
    """Score pictures of "a class": "leakage" and "is subject" in [0, 1], and "colours", whose entropy is diversity.

    Args:
        reading: of N pictures.
        truth: the properties of the subject that they should not have become.
    """
    leaked = fidelities(reading, body_colour=truth["body_colour"])["body_colour"]
    became = is_subject(reading, **{name: truth[name] for name in IDENTITY})
    colours = [_COLOUR_NAMES[colour] for colour in reading.body_colour.argmax(axis=1)]
    return [
        {"leakage": float(one), "is subject": float(all_), "colours": colour}
        for one, all_, colour in zip(leaked, became, colours, strict=True)
    ]


def _scores(subject: SubjectPictures, rows: Sequence[int], probe: Probe) -> list[Scores]:
    """All exact scores of pictures of one role."""

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
    """What the probe reads off pictures of any size: their middle squares, in the sides that it takes."""
    least = min(min(picture.pixels.shape[:2]) for picture in pictures)
    side = max(least // RESOLUTION, 1) * RESOLUTION
    return probe.read(np.stack([from_pixels(p.file, p.pixels, side).pixels for p in pictures]))


def _diversity_kept(metrics: Mapping[str, float]) -> float | None:
    """None where the class had no diversity before, which could be kept."""
    after, before = metrics.get("colours"), metrics.get("colours before")
    return after / before if before and after is not None else None


def _metric(name: str, table: str, definition: str, **further: Any) -> Metric:
    """A metric that `subject_scores` or `class_scores` have by its name."""

    def score(subject: SubjectPictures, rows: Sequence[int], probe: Probe) -> list[float | str | None]:
        return [scores.get(name) for scores in _scores(subject, rows, probe)]

    roles = {"subject": ("subject",), "class": ("class", "class before")}[table]
    usual = {"unit": "share, 0 to 1", "better": "higher", "needs": ("probe",), "roles": roles, "score": score}
    return Metric(name=name, table=table, definition=definition, **usual | further)


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
