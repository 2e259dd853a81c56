"""Exact metrics on the rendered world: shares of pictures in which a probe reads what should be seen.

A picture counts as showing the likeliest value of each property; a probe's own mistakes therefore lower fidelities,
and its held-out accuracies are their ceilings.
"""

from typing import NamedTuple

import numpy as np


class Reading(NamedTuple):
    """What a probe reads off N pictures: probabilities float32 [N, K] over the K values of each property.

    The names are those of the truth in the world's subjects and views.
    """

    class_id: np.ndarray
    body_colour: np.ndarray
    accent_colour: np.ndarray
    pattern: np.ndarray
    context: np.ndarray
    accessory: np.ndarray


def accuracy(reading: Reading, **truth: int | np.ndarray) -> dict[str, float]:
    """Share of pictures whose likeliest value is the true one, in [0, 1], by property.

    Args:
        reading: of N pictures.
        **truth: for each property asked about its true value: an int, or int [N] where it varies.

    Raises:
        ValueError: no pictures, or a truth of another length or outside the property's values.
    """
    return {name: _share(getattr(reading, name), values, name) for name, values in truth.items()}


def prompt_fidelity(
    reading: Reading,
    class_ids: int | np.ndarray,
    contexts: int | np.ndarray | None = None,
    colours: int | np.ndarray | None = None,
) -> dict[str, float]:
    """How often pictures show what their prompts name.

    Args:
        reading: of N pictures.
        class_ids: the class of each prompt, an int or int [N].
        contexts: the context of each prompt; None where prompts name none.
        colours: the body colour of each prompt; None where prompts name none.

    Returns:
        The `accuracy` of "class_id" and, where given, of "context" and "body_colour".
    """
    named = {"class_id": class_ids, "context": contexts, "body_colour": colours}
    return accuracy(reading, **{name: values for name, values in named.items() if values is not None})


def subject_fidelity(
    reading: Reading,
    body_colour: int | np.ndarray,
    accent_colour: int | np.ndarray,
    pattern: int | np.ndarray,
    class_id: int | np.ndarray,
) -> dict[str, float]:
    """How often pictures show the subject's own properties.

    Args:
        reading: of N pictures, all of one subject (an int for each property), or of several (int [N]).
        body_colour: the subject's own.
        accent_colour: the subject's own.
        pattern: the subject's own.
        class_id: the subject's own.

    Returns:
        The `accuracy` of each of the four.
    """
    return accuracy(reading, class_id=class_id, body_colour=body_colour, accent_colour=accent_colour, pattern=pattern)


def subject_truth(reading: Reading) -> dict[str, int]:
    """The properties of a subject of which only photos are known.

    All photos show one subject, so their evidence is pooled: the value with the highest mean log-probability. An
    accent is never of the body's colour.

    Args:
        reading: of the N photos.

    Returns:
        The arguments of `subject_fidelity`: "class_id", "body_colour", "accent_colour" and "pattern".

    Raises:
        ValueError: no photos.
    """
    body_colour = _pooled(reading.body_colour).argmax()
    accent = _pooled(reading.accent_colour)
    accent[body_colour] = -np.inf
    return {
        "class_id": int(_pooled(reading.class_id).argmax()),
        "body_colour": int(body_colour),
        "accent_colour": int(accent.argmax()),
        "pattern": int(_pooled(reading.pattern).argmax()),
    }


def colour_entropy(reading: Reading) -> float:
    """Diversity of N pictures of "a class": the entropy of their body colours in bits, in [0, log2 K].

    H = -sum_k q_k log2 q_k with q_k the share of pictures whose likeliest body colour is k: 0 where all pictures
    are copies of one, log2 11 = 3.46 where all colours are as frequent. Likeliest colours are counted, rather than
    probabilities averaged, so that pictures in which the probe is unsure are not taken for varied ones. This
    plug-in estimator is too low by about (K - 1) / (2 N ln 2) bits (Miller 1955; .11 at N = 64, K = 11): compare
    entropies of equal N.

    Raises:
        ValueError: no pictures.
    """
    colours = _likeliest(reading.body_colour)
    q = np.unique(colours, return_counts=True)[1] / len(colours)
    return float(np.sum(q * np.log2(1 / q)))


def leakage(reading: Reading, body_colour: int) -> float:
    """Share of N pictures of "a class" that have the subject's body colour, in [0, 1]; compare with `chance`.

    Raises:
        ValueError: no pictures, or no such colour.
    """
    return accuracy(reading, body_colour=body_colour)["body_colour"]


def chance(reading: Reading, name: str) -> float:
    """What `accuracy` is on the average where pictures have nothing to do with the truth: 1 / K, for one property."""
    return 1 / getattr(reading, name).shape[1]


def _likeliest(p_NK: np.ndarray) -> np.ndarray:
    if not len(p_NK):
        raise ValueError("The reading holds no pictures; at least one is needed.")
    return p_NK.argmax(axis=1)


def _pooled(p_NK: np.ndarray) -> np.ndarray:
    """Mean log-probabilities [K]."""
    if not len(p_NK):
        raise ValueError("The reading holds no photos; at least one is needed.")
    return np.log(np.maximum(p_NK, 1e-12)).mean(axis=0)


def _share(p_NK: np.ndarray, truth: int | np.ndarray, name: str) -> float:
    read, truth = _likeliest(p_NK), np.asarray(truth)
    if truth.shape not in ((), read.shape) or np.any((truth < 0) | (truth >= p_NK.shape[1])):
        raise ValueError(
            f"The truth of {name} is {truth.tolist() if truth.size < 5 else list(truth.shape)}; give one value, or one "
            f"for each of the {len(read)} pictures, in 0 to {p_NK.shape[1] - 1}."
        )
    return float(np.mean(read == truth))
