"""The class noun of a subject, given by the user or found by a classifier (specification [0053], [0075])."""

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from personalize_jax.runtime.errors import UserError
from personalize_jax.subject.identifier import PLACEHOLDER
from personalize_jax.subject.images import SubjectImage

MAX_CHARACTERS = 40
_ARTICLE = re.compile(r"^(?:a|an|the) ")
# Words that begin with a vowel's letter and the sound of "you" or "won": eucalyptus, unicorn, ukulele, one-piece; and
# words that begin with a silent h: hourglass, heirloom.
_SOUNDS_AS_CONSONANT = re.compile(r"eu|ewe|one\b|once\b|uni(?![dmn])|u[bfkrst][aeiou]", re.IGNORECASE)
_SILENT_H = re.compile(r"hour|heir|honest|hono", re.IGNORECASE)

# Images, uint8 [N, R, R, 3] -> K nouns and their probabilities for each image, [N, K].
Classifier = Callable[[np.ndarray], tuple[list[str], np.ndarray]]


class ClassNoun(NamedTuple):
    """The name of the subject's class.

    Attributes:
        noun: the name, such as "dog".
        score: its probability in [0, 1]; 1 when the user gave it.
        source: its origin: "given" or "classifier".
    """

    noun: str
    score: float
    source: Literal["given", "classifier"]


def determine(
    images: Sequence[SubjectImage],
    given: str | None,
    classifier: Classifier | None = None,
    known_nouns: Sequence[str] | None = None,
    threshold: float = 0.6,
) -> ClassNoun:
    """Find the class noun of the subject in the images; a given one wins over the classifier.

    All images show one subject, so the classifier's evidence is pooled: p_k is proportional to
    exp(mean_n log p_nk), the geometric mean over the N images.

    Args:
        images: the N images of the subject.
        given: the noun that the user gave, if any; returned in lower case with single spaces, without an article.
        classifier: names the subject when no noun is given.
        known_nouns: the nouns that the pretrained cascade knows; None where any may be given.
        threshold: the least pooled probability in [0, 1] with which the classifier's noun is accepted.

    Raises:
        UserError: the given noun cannot be used, or there is none and the classifier is missing or unsure.
    """
    if given is not None:
        return ClassNoun(_checked(given, known_nouns), 1.0, "given")
    if classifier is None:
        raise UserError("No class noun was given, and no classifier is at hand; name the subject by --class_noun.")
    nouns, scores = _pool(*classifier(np.stack([image.pixels for image in images])))
    if scores[0] < threshold:
        guesses = ", ".join(f"{noun} ({score:.2f})" for noun, score in zip(nouns[:3], scores, strict=False))
        raise UserError(
            f"The classifier is not sure what the images show (best guesses: {guesses}; "
            f"{threshold:.2f} is needed); name it by --class_noun."
        )
    return ClassNoun(_checked(nouns[0], known_nouns), float(scores[0]), "classifier")


def with_article(phrase: str) -> str:
    """Put "a" or "an" before a phrase: "an" before a vowel, except where the word sounds otherwise."""
    sounds_as_vowel = phrase[0].lower() in "aeiou" and not _SOUNDS_AS_CONSONANT.match(phrase)
    return ("an " if sounds_as_vowel or _SILENT_H.match(phrase) else "a ") + phrase


def class_prompt(prompt: str) -> str:
    """Turn a prompt for the subject into one for any member of its class, by leaving out "[V]".

    >>> class_prompt("a [V] dog in the snow")
    'a dog in the snow'
    """
    identified = rf"\ban? {re.escape(PLACEHOLDER)} (?=(\w+))"
    with_fitting_articles = re.sub(identified, lambda match: with_article(match[1]).removesuffix(match[1]), prompt)
    return with_fitting_articles.replace(f"{PLACEHOLDER} ", "")


def _pool(nouns: list[str], probabilities_NK: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Pool the probabilities over images; nouns and their probabilities, the likeliest first."""
    log_p_K = np.log(np.maximum(probabilities_NK, 1e-12)).mean(axis=0)
    p_K = np.exp(log_p_K - log_p_K.max())
    p_K /= p_K.sum()
    order_K = np.argsort(-p_K, kind="stable")
    return [nouns[k] for k in order_K], p_K[order_K]


def _checked(given: str, known_nouns: Sequence[str] | None) -> str:
    noun = _ARTICLE.sub("", " ".join(given.lower().split()))  # labels and prompts put an article before it
    # Brackets are kept for the identifier's placeholder, "[V]".
    if not noun or len(noun) > MAX_CHARACTERS or not noun.isprintable() or any(bracket in noun for bracket in "[]"):
        raise UserError(
            f"The class noun {given[: 2 * MAX_CHARACTERS]!r} cannot be used; give a plain noun of 1 to "
            f"{MAX_CHARACTERS} characters without brackets, such as 'dog'."
        )
    if known_nouns is not None and noun not in known_nouns:
        closest = difflib.get_close_matches(noun, known_nouns, n=len(known_nouns), cutoff=0.0)
        raise UserError(
            f"The class noun {noun!r} is unknown to this pretrained cascade; choose one of: {', '.join(closest)}."
        )
    return noun
