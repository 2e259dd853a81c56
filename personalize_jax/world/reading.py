"""The properties that a probe reads off pictures of the rendered world, compared with the true ones.

A picture counts as showing the likeliest value of each property; a probe's own mistakes therefore lower fidelities,
and its held-out accuracies are their ceilings.
"""

from typing import NamedTuple

import numpy as np

IDENTITY = ("class_id", "body_colour", "accent_colour", "pattern")  # no two splits of the world's subjects share all


class Reading(NamedTuple):
    """A probe's reading of N pictures: probabilities float32 [N, K] over the K values of each property, and the shape.

    The names are those of `scene.Subject` and `scene.View`.
    """

    class_id: np.ndarray
    body_colour: np.ndarray
    accent_colour: np.ndarray
    pattern: np.ndarray
    finish: np.ndarray
    context: np.ndarray
    accessory: np.ndarray
    shape: np.ndarray  # float32 [N, S] in [0, 1], proportions of the likeliest class; NaN where the probe cannot tell


def fidelities(reading: Reading, **truth: int | np.ndarray) -> dict[str, np.ndarray]:
    """How well each picture shows each property.

    For a property with several values: 1 where the likeliest one is the true one, else 0. For the shape: 1 less the
    mean absolute error of the proportions that the probe can tell; since proportions belong to a class, 0 where a
    picture shows another class.

    Args:
        reading: the reading of N pictures.
        **truth: the true value of each property to compare: an int, or int [N] where it varies; for "shape"
            float [S] or [N, S] in [0, 1], NaN where unknown, with "class_id" beside it.

    Returns:
        float32 [N] in [0, 1] by property; NaN for a shape of which no proportion is known or can be told.

    Raises:
        ValueError: no pictures, a truth of another length or outside the property's values, or a shape without class.
    """
    scores = {name: _shows(getattr(reading, name), truth[name], name) for name in truth if name != "shape"}
    if "shape" in truth:
        if "class_id" not in truth:
            raise ValueError("Proportions are those of a class; give class_id beside shape.")
        scores["shape"] = np.where(
            scores["class_id"] == 1, _likeness(reading.shape, np.asarray(truth["shape"])), np.float32(0)
        )
    return scores


def accuracy(reading: Reading, **truth: int | np.ndarray) -> dict[str, float]:
    """Means of `fidelities` over the pictures: shares of pictures that show the true value, in [0, 1], by property."""
    return {name: float(scores.mean()) for name, scores in fidelities(reading, **truth).items()}


def subject_truth(reading: Reading, class_id: int | None = None) -> dict[str, int | np.ndarray]:
    """Estimate a subject's properties from its photos.

    All photos show one subject, so their evidence is pooled: the value with the highest mean log-probability. The
    accent never has the body's colour. Proportions are averaged over the photos read as showing the subject's class.

    Args:
        reading: the reading of N photos.
        class_id: the subject's class; None to estimate it, too.

    Returns:
        The properties, as `fidelities` takes them; without "shape" where no photo is read as showing the class.

    Raises:
        ValueError: no photos.
    """
    likeliest = {name: int(_pooled(getattr(reading, name)).argmax()) for name in ("body_colour", "pattern", "finish")}
    accent = _pooled(reading.accent_colour)
    accent[likeliest["body_colour"]] = -np.inf
    class_id = int(_pooled(reading.class_id).argmax()) if class_id is None else class_id
    truth: dict[str, int | np.ndarray] = {
        **likeliest,
        "class_id": class_id,
        "accent_colour": int(accent.argmax()),
    }
    of_class = _likeliest(reading.class_id) == class_id
    return truth | {"shape": reading.shape[of_class].mean(axis=0)} if of_class.any() else truth


def is_subject(
    reading: Reading,
    class_id: int | np.ndarray,
    body_colour: int | np.ndarray,
    accent_colour: int | np.ndarray,
    pattern: int | np.ndarray,
) -> np.ndarray:
    """Whether each picture shows the very subject: bool [N], true where all properties of IDENTITY are the subject's.

    The mean over pictures of the class is the share in which the class has become the subject.

    Raises:
        ValueError: see `fidelities`.
    """
    own = dict(zip(IDENTITY, (class_id, body_colour, accent_colour, pattern), strict=True))
    return np.all([scores == 1 for scores in fidelities(reading, **own).values()], axis=0)


def _likeliest(p_NK: np.ndarray) -> np.ndarray:
    if not len(p_NK):
        raise ValueError("The reading holds no pictures; at least one is needed.")
    return p_NK.argmax(axis=1)


def _pooled(p_NK: np.ndarray) -> np.ndarray:
    """Mean log-probabilities [K]."""
    if not len(p_NK):
        raise ValueError("The reading holds no photos; at least one is needed.")
    return np.log(np.maximum(p_NK, 1e-12)).mean(axis=0)


def _shows(p_NK: np.ndarray, truth: int | np.ndarray, name: str) -> np.ndarray:
    """1 where the likeliest value is the true one: float32 [N]."""
    read, truth = _likeliest(p_NK), np.asarray(truth)
    if truth.shape not in ((), read.shape) or np.any((truth < 0) | (truth >= p_NK.shape[1])):
        raise ValueError(
            f"The truth of {name} is {truth.tolist() if truth.size < 5 else list(truth.shape)}; give one value, or one "
            f"for each of the {len(read)} pictures, in 0 to {p_NK.shape[1] - 1}."
        )
    return (read == truth).astype(np.float32)


def _likeness(shape_NS: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """1 less the mean absolute error over the proportions that are known on both sides: float32 [N]."""
    if truth.shape not in (shape_NS.shape[1:], shape_NS.shape) or np.any((truth < 0) | (truth > 1)):
        raise ValueError(
            f"The truth of shape is {list(truth.shape)} in {np.min(truth)} to {np.max(truth)}; give "
            f"{list(shape_NS.shape[1:])} or {list(shape_NS.shape)} proportions in [0, 1]."
        )
    error = np.ma.masked_invalid(shape_NS - truth)
    return (1 - np.abs(error).mean(axis=1)).filled(np.nan).astype(np.float32)
