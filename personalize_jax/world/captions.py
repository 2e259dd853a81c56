"""Captions of scenes, true and varied, in the words of the DreamBooth dataset's prompts.

In this world every ordinary English word names a colouring: "a marlow dog" and "a marlow car" have the same body and
accent colours, as "tabby" or "calico" tell a cat's coat. So a model meets what the paper meets when it looks for rare
tokens: frequent words with a strong meaning of their own, rare ones with hardly any. The cascade that ships has been
trained too little for that: `experiments.pretrained_cascade` finds even the most frequent words at chance.
"""

import functools
import re
from collections.abc import Iterable, Sequence

import numpy as np
import wordfreq

from personalize_jax.subject.class_noun import with_article
from personalize_jax.world.scene import ACCESSORIES, CLASSES, COLOURS, CONTEXTS, FINISHES, PATTERNS, Scene

BODY_COLOUR_PROBABILITY = 0.70
PATTERN_PROBABILITY = 0.50
ACCENT_PROBABILITY = 0.30
SHINY_PROBABILITY = 0.70
ACCESSORY_PROBABILITY = 0.90
CONTEXT_PROBABILITY = 0.85
PHOTO_PREFIX_PROBABILITY = 0.15
WORD_PROBABILITY = 0.20

_COLOUR_NAMES = tuple(COLOURS)
_VISUAL_WORDS = """
grey golden silver gold beige violet cyan teal crimson scarlet dark light bright pale coloured colored colour
color colours colors rainbow stripe stripes spot spots dot dots dotted patterned plain glossy wet stuffed animal
animals toys dogs cats puppy kitten bear bears teddy ducks robots cars vehicle pot vases candles boots shoe shoes
bag bags cans hat hats scarf sea ocean lake river sand desert forest jungle garden field fields meadow lawn city
town street road house home building tower mountain mountains hill hills sky sun sunny cloud clouds snowy winter
autumn summer spring tree trees leaf leaves flower flowers rug carpet wood wooden floor wall room night photo
picture image painting paris eiffel"""


def _meanings(name: str, texts: Sequence[str]) -> dict[str, tuple[str, int]]:
    """The meaning of each of a property's texts: the property's name and the index of its value."""
    return {text.lower(): (name, index) for index, text in enumerate(texts)}


_NOUNS = _meanings("class_id", CLASSES)
_ADJECTIVES = _meanings("body_colour", _COLOUR_NAMES) | _meanings("pattern", PATTERNS) | _meanings("finish", FINISHES)
_PHRASES = (
    _meanings("context", CONTEXTS)
    | _meanings("accessory", ACCESSORIES)
    | _meanings("accent_colour", [f"with {colour} accents" for colour in COLOURS])
)
del _PHRASES["none"]  # no caption says it


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
    """Describe one scene by its ids, naming each property with its own probability.

    One caption in five has a word for the colouring before the class noun, an ordinary English word: the more frequent
    it is in English, the more often a model reads it.

    Returns:
        "a [finish] [colour] [pattern] [word] class [with colour accents] [accessory] [context]".
    """

    def mentioned(probability: float, text: str, applies: bool = True) -> list[str]:
        named = rng.random() < probability  # one random number a property, even where it does not apply
        return [text] if named and applies else []

    words = mentioned(SHINY_PROBABILITY, FINISHES[finish], FINISHES[finish] != "matte")
    words += mentioned(BODY_COLOUR_PROBABILITY, _COLOUR_NAMES[body_colour])
    words += mentioned(PATTERN_PROBABILITY, PATTERNS[pattern], PATTERNS[pattern] != "plain")
    if rng.random() < WORD_PROBABILITY:
        words.append(_sample_word(body_colour, accent_colour, rng))
    words.append(CLASSES[class_id])
    words += mentioned(ACCENT_PROBABILITY, f"with {_COLOUR_NAMES[accent_colour]} accents")
    words += mentioned(ACCESSORY_PROBABILITY, ACCESSORIES[accessory], ACCESSORIES[accessory] != "none")
    words += mentioned(CONTEXT_PROBABILITY, CONTEXTS[context])
    prefix = "a photo of " if rng.random() < PHOTO_PREFIX_PROBABILITY else ""
    # By the letter alone, even before "unit" and "hour": the cascade that ships was pretrained with such captions.
    article = "an" if words[0][0] in "aeiou" else "a"
    return f"{prefix}{article} {' '.join(words)}"


def caption_variants(scenes: Scene, rng: np.random.Generator, k: int) -> list[list[str]]:
    """Describe each of N scenes in k ways -> N lists of k captions."""
    names = ("class_id", "body_colour", "accent_colour", "pattern", "finish", "accessory", "context")
    columns = scenes.subject._asdict() | scenes.view._asdict()
    rows = zip(*(columns[name].tolist() for name in names), strict=True)
    return [[caption(**dict(zip(names, row, strict=True)), rng=rng) for _ in range(k)] for row in rows]


def prompt(
    class_noun: str,
    context: str | None = None,
    colour: str | None = None,
    identifier: str | None = None,
    accessory: str | None = None,
    finish: str | None = None,
) -> str:
    """Build a prompt: "a [finish] [colour] [identifier] class [accessory] [context]"; the identifier usually is "[V]".

    >>> prompt("dog", context="in the snow", identifier="[V]")
    'a [V] dog in the snow'
    """
    return with_article(" ".join(filter(None, (finish, colour, identifier, class_noun, accessory, context))))


def requested_properties(prompt: str) -> dict[str, int]:
    """Read the properties that a prompt names.

    Adjectives count before the class noun only (before "[V]" where there is no noun): "a dog in a red coat" asks for no
    colour. Of phrases that share words the longest counts: nor does "a dog wearing a red hat". Of several values of one
    property the first counts. Everything else is ignored, identifiers included.

    >>> requested_properties("a red [V] dog in the snow")
    {'class_id': 0, 'body_colour': 0, 'context': 1}

    Returns:
        For each of "class_id", "body_colour", "finish", "pattern", "accessory", "accent_colour" and "context" that the
        prompt names, an index into CLASSES, COLOURS, FINISHES, PATTERNS, ACCESSORIES, COLOURS or CONTEXTS.
    """
    prompt = " ".join(prompt.lower().split())
    found = [_PHRASES[text] for text in _any_of(_PHRASES).findall(prompt)]
    rest = _any_of(_PHRASES).sub(" ", prompt)
    head = _any_of(_NOUNS).search(rest) or re.search(re.escape("[v]"), rest)
    if head:
        found += [_ADJECTIVES[text] for text in _any_of(_ADJECTIVES).findall(rest[: head.start()])]
        found += [_NOUNS[head[0]]] if head[0] in _NOUNS else []
    return dict(reversed(found))  # the first of a property is the last to be written


@functools.cache
def ordinary_words() -> tuple[str, ...]:
    """English words of 3 to 10 letters, most frequent first, none of which describes scenes in English."""
    world = " ".join((*CLASSES, *COLOURS, *PATTERNS, *FINISHES, *ACCESSORIES, *CONTEXTS, _VISUAL_WORDS))
    meaningful = set(re.findall("[a-z]+", world.lower()))
    return tuple(w for w in wordfreq.top_n_list("en", 30_000) if re.fullmatch("[a-z]{3,10}", w) and w not in meaningful)


@functools.cache
def words_for(body_colour: int, accent_colour: int) -> tuple[str, ...]:
    """The ordinary words that name a colouring, most frequent first; every word names one pair of colours.

    Words go to the pairs in turn, so that each pair has frequent and rare ones.
    """
    others = len(COLOURS) - 1  # the accent never has the body's colour
    pair = body_colour * others + accent_colour - (accent_colour > body_colour)
    return ordinary_words()[pair :: len(COLOURS) * others]


def _sample_word(body_colour: int, accent_colour: int, rng: np.random.Generator) -> str:
    """Sample one of a colouring's words by Zipf's law."""
    words = words_for(body_colour, accent_colour)
    return words[int(np.searchsorted(_zipf_cumulative(len(words)), rng.random(), side="right"))]


@functools.cache
def _zipf_cumulative(n: int) -> np.ndarray:
    """Cumulative probabilities of n words, proportional to 1 / rank."""
    weights = 1.0 / np.arange(1, n + 1)
    return np.cumsum(weights) / np.sum(weights)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of the texts as whole words, the longest where several match."""
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(texts, key=len, reverse=True)))})\b")
