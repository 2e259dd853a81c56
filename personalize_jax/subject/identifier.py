"""The identifier of a subject: rare tokens, and the text that encodes to them."""

import functools
import logging
import string
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, Self

import numpy as np

from personalize_jax.runtime.errors import UserError

logger = logging.getLogger(__name__)

PLACEHOLDER = "[V]"
MAX_TOKENS = 3
SHORT = 3  # characters; the paper's limit on the tokens that it samples from
PAPER_IDS = range(5000, 10001)  # T5's tokens that the paper samples from
# On the Zipf scale, 2 is once in ten million words. Three-letter words that mean something to many people are more
# frequent, names, abbreviations and swear words included (in CLIP's vocabulary "lun" has 2.7, "fck" 2.3, "jap" 3.0, and
# "sks", a rifle and the usual identifier elsewhere, 2.3); typing errors and pieces of words ("waj", "wiv") are rarer.
WORD_ZIPF = 2.0
_END_OF_LATIN = "\u0250"
RULES = ("rarest", "paper", "frequent", "random_characters")
NUM_FREQUENT = 100  # tokens that "frequent" samples from
NUM_CHARACTERS = 9  # as in the paper's example of random characters, "xxy5syt00"
_TRIES = 1000
_LATER_LETTERS = "qxzjv"  # few tokens join one of these to what comes before


class Vocabulary(Protocol):
    """A tokenizer, as far as identifiers need it."""

    @property
    def size(self) -> int:
        """The number of tokens."""

    @property
    def special_ids(self) -> Collection[int]:
        """Tokens that stand for no text."""

    @property
    def counts(self) -> np.ndarray | None:
        """[size], how often the text encoder processed each token in pretraining, if recorded."""

    @property
    def is_t5(self) -> bool:
        """Whether these are T5's tokens, which the paper's rule needs."""

    @property
    def text_length(self) -> int:
        """The number of tokens that the text encoder reads of a text."""

    def __hash__(self) -> int:
        """A hash, by which the texts of all tokens are cached."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, cleaned as prompts are, without special tokens."""

    def decode(self, token_ids: list[int]) -> str:
        """The text of token ids."""


class Identifier(NamedTuple):
    """A subject's name in prompts.

    Attributes:
        text: the name.
        token_ids: the tokens that the text encodes to.
        counts: the frequency of each token; empty where frequencies are not known.
    """

    text: str
    token_ids: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def own_tokens(self) -> frozenset[int]:
        """The tokens that no other subject may have; none for random characters, whose tokens are common letters."""
        return frozenset(self.token_ids if len(self.token_ids) <= MAX_TOKENS else ())

    def to_json(self) -> dict[str, Any]:
        """The identifier's keys in a JSON file."""
        return {"identifier": self.text, "token_ids": self.token_ids, "token_counts": self.counts}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Self:
        """Read the keys that `to_json` gives.

        Raises:
            KeyError, TypeError, ValueError: a key is missing or has another kind of value.
        """
        ids, counts = (tuple(map(int, entry[key])) for key in ("token_ids", "token_counts"))
        return cls(str(entry["identifier"]), ids, counts)


def choose_identifier(
    tokenizer: Vocabulary,
    class_noun: str,
    num_tokens: int = 1,
    in_use: frozenset[int] = frozenset(),
    seed: int | None = None,
    rule: str = "rarest",
    frequencies: np.ndarray | None = None,
    nouns: Sequence[str] = (),
    registry: str = "the registry",
) -> Identifier:
    """Look up rare tokens and de-tokenise them into an identifier.

    The rule says which tokens are candidates, and in which order:
    - "rarest" (specification [0057]-[0059], claims 3-6): tokens of letters only; those of at most three characters (the
      paper's rule for T5) before longer ones, then by the lowest frequency, then by token id.
    - "paper" (Ruiz et al. 2023, section 3.2): T5's tokens 5000 to 10000 of at most three characters, in random order.
    - "frequent", which the paper advises against: the 100 most frequent words of four letters or more, in random order.
    - "random_characters", against which it advises too, has no candidates: the identifier is nine letters and digits,
      encoded as many tokens.

    The identifier has the first candidates whose text is a word of letters that survives re-encoding: "a [V] [class
    noun]", cleaned as prompts are, must give exactly the tokens of "a", the chosen ones, and those of the noun.

    The first two rules choose no token that carries a meaning while others are left. Where frequencies were recorded in
    pretraining, they rank such tokens last: the network can only depict what it processed often. Where they were not,
    tokens that are English words come after all others; see `WORD_ZIPF`.

    Args:
        tokenizer: the pretrained cascade's tokenizer.
        class_noun: the noun that follows the identifier.
        num_tokens: number of tokens, 1 to 3.
        in_use: tokens of other subjects' identifiers, which are not chosen.
        seed: the seed of the random order; None gives another order at each call. For "rarest": the seed of the order
            of tokens of equal frequency; None orders them by id.
        rule: "rarest", "paper", "frequent" or "random_characters".
        frequencies: [V], higher for more frequent tokens; None for those recorded in pretraining.
        nouns: class nouns that the cascade knows; none of their tokens is chosen.
        registry: the name, in error messages, of the place that lists the tokens in use.

    Raises:
        UserError: `num_tokens` is out of range, the vocabulary does not suit the rule, the text encoder cannot read the
            class noun, the noun has another subject's tokens, or no tokens are left.
        ValueError: `frequencies` does not have one entry for each token.
    """
    if not 1 <= num_tokens <= MAX_TOKENS:
        raise UserError(f"An identifier of {num_tokens} tokens was asked for; choose 1 to {MAX_TOKENS}.")
    article, noun = tokenizer.encode("a"), _encode_noun(tokenizer, class_noun)
    if rule == "random_characters":
        return _random_characters(tokenizer, class_noun, np.random.default_rng(seed))
    frequencies = tokenizer.counts if frequencies is None else frequencies
    if frequencies is not None and len(frequencies) != tokenizer.size:
        raise ValueError(f"{len(frequencies)} token counts for a vocabulary of {tokenizer.size}; one each expected")
    if taken := in_use.intersection(noun):
        raise UserError(
            f"The class noun {class_noun!r} is written with {tokenizer.decode(sorted(taken))!r}, which identifies "
            f"another subject of {registry}; use another class noun or another registry."
        )
    excluded = in_use.union(tokenizer.special_ids, article, noun, *map(tokenizer.encode, nouns))
    ranked = [token_id for token_id in _rank(tokenizer, rule, frequencies, seed) if token_id not in excluded]

    def survives(text: str, token_ids: tuple[int, ...]) -> bool:
        return tokenizer.encode(f"a {text} {class_noun}") == [*article, *token_ids, *noun]

    def begins_words(text: str, token_ids: tuple[int, ...]) -> bool:
        # As a whole word it need not survive: CLIP has other tokens at the end of a word than within.
        wanted = [*article, *token_ids]
        return any(tokenizer.encode(f"a {text}{letter}")[: len(wanted)] == wanted for letter in _LATER_LETTERS)

    def extend(prefix: tuple[int, ...], start: int) -> Identifier | None:
        # Only beginnings of words are extended: this prunes the search from size**k to about size*k encodings.
        for rank in range(start, len(ranked)):
            token_ids = (*prefix, ranked[rank])
            text = tokenizer.decode(list(token_ids)).strip()
            if not text.isalpha():
                continue
            if len(token_ids) == num_tokens:
                joined_to_a_word = num_tokens > 1 and tokenizer.counts is None and _is_word(text)
                if not joined_to_a_word and survives(text, token_ids):
                    known = () if frequencies is None else tuple(int(frequencies[i]) for i in token_ids)
                    return Identifier(text, token_ids, known)
            elif begins_words(text, token_ids) and (longer := extend(token_ids, rank + 1)):
                return longer
        return None

    identifier = extend((), 0)
    if identifier is None:
        raise UserError(
            f"No {num_tokens} token(s) of the {len(ranked)} left in the vocabulary make an identifier for "
            f"{class_noun!r}; ask for another number of tokens, or another registry ({len(in_use)} are in use in "
            f"{registry})."
        )
    return identifier


def _encode_noun(tokenizer: Vocabulary, class_noun: str) -> list[int]:
    """Encode the class noun, all of whose letters must survive cleaning and encoding."""
    token_ids = tokenizer.encode(class_noun)
    read = tokenizer.decode(token_ids).strip()
    if not token_ids or _letters(read) != _letters(class_noun):
        raise UserError(
            f"Of the class noun {class_noun!r} the text encoder reads {read!r} only; name the class in words that "
            "captions have, in English for most text encoders."
        )
    return token_ids


def _letters(text: str) -> str:
    return "".join(filter(str.isalnum, unicodedata.normalize("NFKC", text).casefold()))


def _rank(tokenizer: Vocabulary, rule: str, frequencies: np.ndarray | None, seed: int | None) -> list[int]:
    """The candidates of a rule, in its order."""
    texts = _texts(tokenizer)
    if rule == "paper":
        if not tokenizer.is_t5:
            raise UserError(
                'The rule "paper" draws from the tokens of T5, and this is another vocabulary; use "rarest".'
            )
        allowed = [i for i in PAPER_IDS if i < len(texts) and texts[i].isalpha() and len(texts[i]) <= SHORT]
        return _words_last(tokenizer, np.random.default_rng(seed).permutation(allowed).tolist())
    if rule not in ("rarest", "frequent"):
        raise UserError(f"Identifiers by the rule {rule!r} were asked for; choose one of {', '.join(RULES)}.")
    if frequencies is None:
        raise UserError(f"The rule {rule!r} goes by token frequencies, and none are recorded; give them.")
    if rule == "frequent":
        words = [i for i in np.argsort(-np.asarray(frequencies), kind="stable") if texts[i].isalpha()]
        words = [i for i in words if len(texts[i]) > SHORT][:NUM_FREQUENT]
        return np.random.default_rng(seed).permutation(words).tolist()
    tie_break = np.arange(tokenizer.size) if seed is None else np.random.default_rng(seed).permutation(tokenizer.size)
    order = np.lexsort((tie_break, frequencies, np.array([len(text) > SHORT for text in texts])))
    return _words_last(tokenizer, [i for i in order.tolist() if texts[i].isalpha()])


def _words_last(tokenizer: Vocabulary, ranked: list[int]) -> list[int]:
    """Tokens in the same order, but words after all others where no frequencies were recorded in pretraining."""
    if tokenizer.counts is not None:
        return ranked
    words = _words(tokenizer)
    return sorted(ranked, key=lambda token_id: token_id in words)


def _is_word(text: str) -> bool:
    """Whether a text may carry a meaning: an English word, or any text of another script."""
    import wordfreq  # slow to import, and needed only where an identifier is chosen

    return max(text) >= _END_OF_LATIN or wordfreq.zipf_frequency(text, "en") >= WORD_ZIPF


def _random_characters(tokenizer: Vocabulary, class_noun: str, rng: np.random.Generator) -> Identifier:
    """An identifier of nine random letters and digits that survive cleaning and encoding, as whatever tokens."""
    article, noun = tokenizer.encode("a"), tokenizer.encode(class_noun)
    for _ in range(_TRIES):
        text = "".join(rng.choice(list(string.ascii_lowercase + string.digits), NUM_CHARACTERS))
        token_ids = tokenizer.encode(f"a {text} {class_noun}")
        begins, ends = token_ids[: len(article)] == article, token_ids[-len(noun) :] == noun
        own = token_ids[len(article) : len(token_ids) - len(noun)]
        whole = tokenizer.decode(own).strip() == text and not set(own).intersection(tokenizer.special_ids)
        if begins and ends and whole and len(own) > MAX_TOKENS:
            return Identifier(text, tuple(own), ())
    raise UserError(f"None of {_TRIES} random strings comes through this vocabulary's encoding; choose another rule.")


@functools.lru_cache(maxsize=2)  # decoding a public vocabulary takes a third of a second, for each of many subjects
def _texts(tokenizer: Vocabulary) -> list[str]:
    return [tokenizer.decode([token_id]).strip() for token_id in range(tokenizer.size)]


@functools.lru_cache(maxsize=2)
def _words(tokenizer: Vocabulary) -> frozenset[int]:
    return frozenset(i for i, text in enumerate(_texts(tokenizer)) if text.isalpha() and _is_word(text))


def substitute(prompt: str, identifier_text: str, tokenizer: Vocabulary) -> str:
    """Write the identifier in place of every "[V]" of a prompt.

    Raises:
        UserError: a "[V]" lies behind the part of the prompt that the text encoder reads.
    """
    before, placeholder, _ = prompt.rpartition(PLACEHOLDER)
    if placeholder:
        _check_is_read(f"{before}{PLACEHOLDER}".replace(PLACEHOLDER, identifier_text), prompt, tokenizer)
    return prompt.replace(PLACEHOLDER, identifier_text)


def check_labels(labels: Sequence[str], identifier_text: str, tokenizer: Vocabulary) -> None:
    """Check that the text encoder reads the identifier in every label of a subject's pictures.

    Raises:
        UserError: in a label it lies behind the part that the text encoder reads.
    """
    for label in labels:
        words = label.split()
        _check_is_read(" ".join(words[: words.index(identifier_text) + 1]), label, tokenizer)


def _check_is_read(beginning: str, text: str, tokenizer: Vocabulary) -> None:
    """Check that the text encoder reads a text, of which it takes the first tokens only, up to the identifier's end."""
    if (length := len(tokenizer.encode(beginning))) > tokenizer.text_length:
        raise UserError(
            f'In "{text}" the subject is named within the first {length} tokens, and the text encoder reads '
            f"{tokenizer.text_length} only; write it further to the front."
        )


def warn_without_placeholder(prompts: Sequence[str]) -> None:
    """Log a warning for each prompt without "[V]", which will not show the subject."""
    for prompt in prompts:
        if PLACEHOLDER not in prompt:
            logger.warning(
                'The prompt "%s" has no %s, so it asks for any member of the class; write %s before the class noun '
                "to see the subject.",
                prompt,
                PLACEHOLDER,
                PLACEHOLDER,
            )
