"""Captions of scenes: true, varied in what they mention, and worded like the prompts of the DreamBooth dataset."""

import functools
import re

import numpy as np
import wordfreq

from personalize_jax.world.scene import ACCESSORIES, CLASSES, COLOURS, CONTEXTS, FINISHES, PATTERNS, Scene

BODY_COLOUR_PROBABILITY = 0.70
PATTERN_PROBABILITY = 0.50
ACCENT_PROBABILITY = 0.30
SHINY_PROBABILITY = 0.70
ACCESSORY_PROBABILITY = 0.90
CONTEXT_PROBABILITY = 0.85
PHOTO_PREFIX_PROBABILITY = 0.15
DISTRACTOR_PROBABILITY = 0.15

_COLOUR_NAMES = tuple(COLOURS)
_VISUAL_WORDS = """
grey golden silver gold beige violet cyan teal crimson scarlet dark light bright pale coloured colored colour
color colours colors rainbow stripe stripes spot spots dot dots dotted patterned plain glossy wet stuffed animal
animals toys dogs cats puppy kitten bear bears teddy ducks robots cars vehicle pot vases candles boots shoe shoes
bag bags cans hat hats scarf sea ocean lake river sand desert forest jungle garden field fields meadow lawn city
town street road house home building tower mountain mountains hill hills sky sun sunny cloud clouds snowy winter
autumn summer spring tree trees leaf leaves flower flowers rug carpet wood wooden floor wall room night photo
picture image painting paris eiffel"""


def caption(
    class_id: int,
    body_colour: int,
    accent_colour: int,
    pattern: int,
    finish: int,
    accessory: int,
    context: int,
    rng: np.random.Generator,
) -> str:
    """Describes one scene by its ids, naming each property with its own probability.

    About one caption in seven has an ordinary English word without visual meaning before the class noun ("a marlow
    dog"): such words thus come to be processed about as often as English uses them, and come to mean nothing.

    Returns:
        "a [finish] [colour] [pattern] [word] class [with colour accents] [accessory] [context]".
    """

    def mentioned(probability: float, text: str, applies: bool = True) -> list[str]:
        named = rng.random() < probability  # drawn even where it does not apply: one draw a property
        return [text] if named and applies else []

    words = mentioned(SHINY_PROBABILITY, FINISHES[finish], FINISHES[finish] != "matte")
    words += mentioned(BODY_COLOUR_PROBABILITY, _COLOUR_NAMES[body_colour])
    words += mentioned(PATTERN_PROBABILITY, PATTERNS[pattern], PATTERNS[pattern] != "plain")
    if rng.random() < DISTRACTOR_PROBABILITY:
        words.append(_draw_distractor(rng))
    words.append(CLASSES[class_id])
    words += mentioned(ACCENT_PROBABILITY, f"with {_COLOUR_NAMES[accent_colour]} accents")
    words += mentioned(ACCESSORY_PROBABILITY, ACCESSORIES[accessory], ACCESSORIES[accessory] != "none")
    words += mentioned(CONTEXT_PROBABILITY, CONTEXTS[context])
    prefix = "a photo of " if rng.random() < PHOTO_PREFIX_PROBABILITY else ""
    return prefix + _with_article(" ".join(words))


def caption_variants(scenes: Scene, rng: np.random.Generator, k: int) -> list[list[str]]:
    """Describes each of N scenes in k ways -> N lists of k captions."""
    subject, view = scenes
    ids = (
        subject.class_id,
        subject.body_colour,
        subject.accent_colour,
        subject.pattern,
        subject.finish,
        view.accessory,
        view.context,
    )
    rows = np.stack(ids, axis=1).tolist()
    return [[caption(*row, rng=rng) for _ in range(k)] for row in rows]


def prompt(
    class_noun: str,
    context: str | None = None,
    colour: str | None = None,
    identifier: str | None = None,
    accessory: str | None = None,
) -> str:
    """Builds a prompt: "a [colour] [identifier] class [accessory] [context]"; the identifier usually is "[V]".

    >>> prompt("dog", context="in the snow", identifier="[V]")
    'a [V] dog in the snow'
    """
    return _with_article(" ".join(filter(None, (colour, identifier, class_noun, accessory, context))))


@functools.cache
def distractor_words() -> tuple[str, ...]:
    """English words of 3 to 10 letters, most frequent first, none of which says anything about a scene."""
    world = " ".join((*CLASSES, *COLOURS, *PATTERNS, *FINISHES, *ACCESSORIES, *CONTEXTS, _VISUAL_WORDS))
    meaningful = set(re.findall("[a-z]+", world.lower()))
    return tuple(w for w in wordfreq.top_n_list("en", 30_000) if re.fullmatch("[a-z]{3,10}", w) and w not in meaningful)


@functools.cache
def _zipf_cumulative() -> np.ndarray:
    """Cumulative probabilities of the distractor words, proportional to 1 / rank."""
    weights = 1.0 / np.arange(1, len(distractor_words()) + 1)
    return np.cumsum(weights) / np.sum(weights)


def _draw_distractor(rng: np.random.Generator) -> str:
    """Draws a word by Zipf's law."""
    return distractor_words()[int(np.searchsorted(_zipf_cumulative(), rng.random(), side="right"))]


def _with_article(phrase: str) -> str:
    """Puts "a" or "an" before a phrase, by the letter that it begins with."""
    return ("an " if phrase[0].lower() in "aeiou" else "a ") + phrase
