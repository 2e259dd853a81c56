"""Captions of scenes, true and varied, in the words of the DreamBooth dataset's prompts.

In this world every ordinary English word names a colouring: "a marlow dog" and "a marlow car" have the same body and
accent colours, as "tabby" or "calico" tell a cat's coat. So a model meets what the paper meets when it looks for rare
tokens: frequent words with a strong meaning of their own, rare ones with hardly any. The cascade that ships has been
trained too little for that: `experiments.pretrained_cascade` finds even the most frequent words at chance.
"""

import functools
import itertools
import re
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np

from personalize_jax.families.base import UNCONDITIONAL
from personalize_jax.formats.tokenizer import Tokenizer
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

COLOURINGS = len(COLOURS) * (len(COLOURS) - 1)
Ids = TypeVar("Ids", int, np.ndarray)

_COLOUR_NAMES = tuple(COLOURS)
_AFTER_ARTICLE = ("finish", "body_colour", "pattern", "word", "class_id")
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


def sample_phrases(scenes: Scene, rng: np.random.Generator, k: int) -> np.ndarray:
    """Describe each of N scenes in k ways, naming each property with its own probability.

    "a [finish] [colour] [pattern] [word] class [with colour accents] [accessory] [context]", some after "a photo of".
    One caption in five has a word for the colouring before the class noun, an ordinary English word: the more frequent
    it is in English, the more often a model reads it.

    Args:
        scenes: the scenes.
        rng: one caption after the other takes eight numbers from it, and a ninth for a word.
        k: number of captions of each.

    Returns:
        int32 [N, k, S], the phrases of each caption in their order: indices into `phrases`, 0 for what it leaves out.
    """
    truth = {name: np.repeat(column, k) for name, column in (scenes.subject._asdict() | scenes.view._asdict()).items()}
    chance, word_chance = _chances(rng, len(truth["class_id"]))
    said = {
        "opening": chance[7] < PHOTO_PREFIX_PROBABILITY,
        "finish": (chance[0] < SHINY_PROBABILITY) & (truth["finish"] != FINISHES.index("matte")),
        "body_colour": chance[1] < BODY_COLOUR_PROBABILITY,
        "pattern": (chance[2] < PATTERN_PROBABILITY) & (truth["pattern"] != PATTERNS.index("plain")),
        "word": chance[3] < WORD_PROBABILITY,
        "accent_colour": chance[4] < ACCENT_PROBABILITY,
        "accessory": (chance[5] < ACCESSORY_PROBABILITY) & (truth["accessory"] != ACCESSORIES.index("none")),
        "context": chance[6] < CONTEXT_PROBABILITY,
    }
    truth["word"] = _words(truth["body_colour"], truth["accent_colour"], word_chance)
    truth["opening"] = truth["article"] = np.zeros_like(truth["class_id"])
    columns = {name: np.where(said.get(name, True), i + truth[name], 0) for name, i in _first_of_part().items()}
    following = np.select([columns[name] > 0 for name in _AFTER_ARTICLE], [columns[name] for name in _AFTER_ARTICLE])
    columns["article"] += _begin_with_vowel()[following]
    return np.stack(list(columns.values()), axis=-1).astype(np.int32).reshape(-1, k, len(columns))


def caption_variants(scenes: Scene, rng: np.random.Generator, k: int) -> list[list[str]]:
    """Describe each of N scenes in k ways -> N lists of k captions; see `sample_phrases`."""
    return in_words(sample_phrases(scenes, rng, k))


def in_words(phrases_NKS: np.ndarray) -> list[list[str]]:
    """The captions that `sample_phrases` gives as rows of phrases -> N lists of K strings."""
    texts = phrases()
    return [[" ".join([texts[i] for i in caption if i]) for caption in captions] for captions in phrases_NKS.tolist()]


def in_tokens(phrases_NKS: np.ndarray, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """The captions that `sample_phrases` gives as rows of phrases, as `training.examples.Examples` has them.

    Args:
        phrases_NKS: the captions.
        tokenizer: a vocabulary that encodes each word by itself, see `Tokenizer.encode_phrases`.

    Returns:
        tokens int32 [1 + N * K, L], of which row 0 is the unconditional caption, and the rows of each picture's
        captions, int32 [N, K].
    """
    N, K, S = phrases_NKS.shape
    tokens_ML = tokenizer.encode_phrases(phrases(), phrases_NKS.reshape(-1, S))
    rows_NK = 1 + np.arange(N * K, dtype=np.int32).reshape(N, K)
    return np.concatenate([tokenizer([UNCONDITIONAL]), tokens_ML]), rows_NK


@functools.cache
def phrases() -> tuple[str, ...]:
    """All phrases that captions are made of, after an empty one for what a caption leaves out."""
    return ("", *itertools.chain.from_iterable(_parts().values()))


def prompt(
    class_noun: str,
    context: str | None = None,
    colour: str | None = None,
    identifier: str | None = None,
    accessory: str | None = None,
    finish: str | None = None,
    pattern: str | None = None,
) -> str:
    """Build a prompt, in the order of captions; the identifier usually is "[V]".

    "a [finish] [colour] [pattern] [identifier] class [accessory] [context]".

    >>> prompt("dog", context="in the snow", identifier="[V]")
    'a [V] dog in the snow'
    """
    return with_article(" ".join(filter(None, (finish, colour, pattern, identifier, class_noun, accessory, context))))


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
    import wordfreq  # slow to import, and needed only where captions are written

    world = " ".join((*CLASSES, *COLOURS, *PATTERNS, *FINISHES, *ACCESSORIES, *CONTEXTS, _VISUAL_WORDS))
    meaningful = set(re.findall("[a-z]+", world.lower()))
    return tuple(w for w in wordfreq.top_n_list("en", 30_000) if re.fullmatch("[a-z]{3,10}", w) and w not in meaningful)


@functools.cache
def words_for(body_colour: int, accent_colour: int) -> tuple[str, ...]:
    """The ordinary words that name a colouring, most frequent first; every word names one pair of colours.

    Words go to the pairs in turn, so that each pair has frequent and rare ones.
    """
    return ordinary_words()[_colouring(body_colour, accent_colour) :: COLOURINGS]


def _colouring(body_colour: Ids, accent_colour: Ids) -> Ids:
    """The number of a pair of colours, below COLOURINGS; the accent never has the body's colour."""
    return body_colour * (len(COLOURS) - 1) + accent_colour - (accent_colour > body_colour)


def _parts() -> dict[str, tuple[str, ...]]:
    """The phrases of each part of a caption, in the caption's order."""
    return {
        "opening": ("a photo of",),
        "article": ("a", "an"),
        "finish": FINISHES,
        "body_colour": _COLOUR_NAMES,
        "pattern": PATTERNS,
        "word": ordinary_words(),
        "class_id": CLASSES,
        "accent_colour": tuple(f"with {colour} accents" for colour in COLOURS),
        "accessory": ACCESSORIES,
        "context": CONTEXTS,
    }


@functools.cache
def _first_of_part() -> dict[str, int]:
    """The index of each part's first phrase in `phrases`."""
    parts = _parts()
    return dict(zip(parts, itertools.accumulate(map(len, parts.values()), initial=1), strict=False))


@functools.cache
def _begin_with_vowel() -> np.ndarray:
    """Whether each phrase begins with a vowel.

    By the letter alone, even before "unit" and "hour": the cascade that ships was pretrained with such captions.
    """
    return np.array([phrase.startswith(tuple("aeiou")) for phrase in phrases()])


def _chances(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The random numbers of some captions in [0, 1): one a property [8, count], and the word's [count].

    A caption takes the word's number, after the fourth, only if it has a word. So where a caption's numbers begin
    depends on all captions before it.
    """
    state = rng.bit_generator.state
    stream = rng.random(9 * count)  # as many as they may take
    has_word = (stream < WORD_PROBABILITY).tolist()
    starts = [0]
    for _ in range(count):
        starts.append(starts[-1] + 8 + has_word[starts[-1] + 3])
    rng.bit_generator.state = state
    rng.random(starts[-1])  # as many as they do take
    start = np.array(starts[:-1], np.int64)
    after_word = start + (stream[start + 3] < WORD_PROBABILITY)
    return stream[np.stack([*(start + i for i in range(4)), *(after_word + i for i in range(4, 8))])], stream[start + 4]


def _words(body_colour: np.ndarray, accent_colour: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """Sample one of each colouring's words by Zipf's law, from a number in [0, 1) -> indices into `ordinary_words`."""
    pair = _colouring(body_colour, accent_colour)
    available = (len(ordinary_words()) - 1 - pair) // COLOURINGS + 1
    rank = np.zeros(len(pair), np.int64)
    for n in np.unique(available):
        rows = available == n
        rank[rows] = np.searchsorted(_zipf_cumulative(int(n)), chance[rows], side="right")
    return pair + COLOURINGS * rank


@functools.cache
def _zipf_cumulative(n: int) -> np.ndarray:
    """Cumulative probabilities of n words, proportional to 1 / rank."""
    weights = 1.0 / np.arange(1, n + 1)
    return np.cumsum(weights) / np.sum(weights)


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of the texts as whole words, the longest where several match."""
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, sorted(texts, key=len, reverse=True)))})\b")
