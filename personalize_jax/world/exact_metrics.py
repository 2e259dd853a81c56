"""Exact scores of single pictures of the rendered world, as the probe reads them.

Of a picture of the subject: whether each of its properties is the subject's, and whether context and property are those
that the prompt asks for. Of a picture of the class: whether it has become the subject. What a prompt changes is not
asked of the subject: in "a red [V] dog" the body colour counts for the prompt.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from personalize_jax.metrics.table import Scores
from personalize_jax.world.captions import asked
from personalize_jax.world.reading import IDENTITY, Reading, fidelities, is_subject
from personalize_jax.world.scene import COLOURS, Subject

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
