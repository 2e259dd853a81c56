"""The identifier of a subject: rare tokens, a text that encodes to them, and the registry that keeps subjects apart."""

import fcntl
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from absl import logging

from personalize_jax.errors import UserError

PLACEHOLDER = "[V]"
MAX_TOKENS = 3
SHORT = 3  # characters; the paper's limit on the tokens it draws from


class Vocabulary(Protocol):
    """What choosing an identifier asks of a tokenizer."""

    size: int
    special_ids: Collection[int]
    counts: np.ndarray  # [size], how often the text network processed each token in pretraining

    def encode(self, text: str) -> list[int]:
        """Token ids of a text cleaned as prompts are, without special tokens."""

    def decode(self, token_ids: list[int]) -> str:
        """The text of token ids."""


class Identifier(NamedTuple):
    """A subject's name in prompts: its text, the tokens that the text encodes to, and their recorded frequencies."""

    text: str
    token_ids: tuple[int, ...]
    counts: tuple[int, ...]


def choose_identifier(
    tokenizer: Vocabulary,
    class_noun: str,
    num_tokens: int = 1,
    in_use: frozenset[int] = frozenset(),
    seed: int | None = None,
) -> Identifier:
    """Looks up the rarest tokens and de-tokenises them into an identifier (specification [0057]-[0059], claims 3-6).

    Candidates are tokens of letters only, ranked by: at most three characters before longer ones (the paper's
    rule for T5), then the lowest recorded frequency, then the token id. The first token is the first candidate in this
    order, the second the next, and so on, of those whose text survives re-encoding: "a [V] [class noun]" must give
    exactly the tokens of "a", the chosen ones, and those of the noun. The text is one word without spaces.

    A token that carries a visual meaning cannot be chosen while rarer ones are left: what the network could learn to
    depict it processed often, whereas a word that it never processed means nothing to it, English or not.

    Args:
      tokenizer: The pretrained cascade's vocabulary with its recorded frequencies.
      class_noun: The noun that follows the identifier.
      num_tokens: 1 to 3.
      in_use: Tokens of other subjects' identifiers, never chosen again.
      seed: If given, tokens of equal frequency are ordered at random by it, not by id.

    Raises:
      UserError: `num_tokens` is out of range, the class noun is written with another subject's tokens, or no tokens
        are left.
      ValueError: `tokenizer.counts` does not have one entry a token.
    """
    if not 1 <= num_tokens <= MAX_TOKENS:
        raise UserError(f"an identifier of {num_tokens} tokens was asked for; choose 1 to {MAX_TOKENS}")
    if len(tokenizer.counts) != tokenizer.size:
        raise ValueError(
            f"{len(tokenizer.counts)} token counts for a vocabulary of {tokenizer.size}; one each expected"
        )
    article, noun = tokenizer.encode("a"), tokenizer.encode(class_noun)
    if taken := in_use.intersection(noun):
        raise UserError(
            f"the class noun {class_noun!r} is written with {tokenizer.decode(sorted(taken))!r}, which identifies "
            "another subject of this registry; use another class noun or another registry"
        )
    ranked = _rank(tokenizer, in_use.union(tokenizer.special_ids, article, noun), seed)

    def survives(text: str, token_ids: tuple[int, ...]) -> bool:
        return text.isalpha() and tokenizer.encode(f"a {text} {class_noun}") == [*article, *token_ids, *noun]

    def extend(prefix: tuple[int, ...], start: int) -> Identifier | None:
        # Only prefixes that survive are extended: it prunes the search from size**k to about size*k encodings.
        for rank in range(start, len(ranked)):
            token_ids = (*prefix, ranked[rank])
            text = tokenizer.decode(list(token_ids)).strip()
            if not survives(text, token_ids):
                continue
            if len(token_ids) == num_tokens:
                return Identifier(text, token_ids, tuple(int(tokenizer.counts[i]) for i in token_ids))
            if longer := extend(token_ids, rank + 1):
                return longer
        return None

    identifier = extend((), 0)
    if identifier is None:
        raise UserError(
            f"no {num_tokens} token(s) of the {len(ranked)} left in the vocabulary make an identifier for "
            f"{class_noun!r}; ask for another number of tokens, or use a fresh registry ({len(in_use)} are in use)"
        )
    return identifier


def _rank(tokenizer: Vocabulary, excluded: Collection[int], seed: int | None) -> list[int]:
    """Tokens of letters only, the most suitable first."""
    tie_break = np.arange(tokenizer.size) if seed is None else np.random.default_rng(seed).permutation(tokenizer.size)
    keys = []
    for token_id in set(range(tokenizer.size)).difference(excluded):
        text = tokenizer.decode([token_id]).strip()
        if text.isalpha():
            keys.append((len(text) > SHORT, int(tokenizer.counts[token_id]), int(tie_break[token_id]), token_id))
    return [token_id for *_, token_id in sorted(keys)]


def substitute(prompt: str, identifier_text: str) -> str:
    """The prompt with the identifier in place of every "[V]"."""
    return prompt.replace(PLACEHOLDER, identifier_text)


def warn_without_placeholder(prompts: Sequence[str]) -> None:
    """Logs one warning for each prompt that is to show the subject but lacks "[V]"."""
    for prompt in prompts:
        if PLACEHOLDER not in prompt:
            logging.warning(
                'The prompt "%s" has no %s, so it asks for any member of the class; write %s before the class noun '
                "to see the subject.",
                prompt,
                PLACEHOLDER,
                PLACEHOLDER,
            )


class Subject(NamedTuple):
    """One entry of a registry."""

    name: str
    identifier: Identifier
    class_noun: str
    run_directory: str


class Registry:
    """The subjects of one pretrained cascade, in a JSON file that its runs share, so that no two share a token.

    The file is replaced as a whole, under a lock on a file beside it (`<name>.lock`): several runs may reserve at once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def subjects(self) -> list[Subject]:
        """All subjects, in the order of their reservation; none if there is no file yet.

        Raises:
          UserError: The file cannot be read or is no registry.
        """
        try:
            entries = json.loads(self.path.read_text(encoding="utf-8"))["subjects"]
            return [
                Subject(
                    entry["name"],
                    Identifier(
                        entry["identifier"],
                        tuple(int(i) for i in entry["token_ids"]),
                        tuple(int(n) for n in entry["token_counts"]),
                    ),
                    entry["class_noun"],
                    entry["run_directory"],
                )
                for entry in entries
            ]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(
                f"the registry {self.path} cannot be read ({error.strerror}); check its permissions"
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path} is not a registry of subjects ({error!r}); restore it, or name another file"
            ) from error

    def in_use(self) -> frozenset[int]:
        """Every token id of every subject's identifier."""
        return _tokens(self.subjects())

    def reserve(
        self, name: str, class_noun: str, run_directory: Path, choose: Callable[[frozenset[int]], Identifier]
    ) -> Identifier:
        """Gives the run its identifier: the one it has already, or a new one that shares no token with the others.

        Args:
          name: What people call the subject.
          class_noun: What the subject is.
          run_directory: The run that asks; the same run always gets the same identifier.
          choose: From the tokens in use to a new identifier; called while the registry is locked.

        Raises:
          UserError: The run directory has a subject of another class, or the file cannot be written.
          ValueError: `choose` returned a token in use.
        """
        run = str(run_directory.resolve())
        with self._lock():
            subjects = self.subjects()
            for subject in subjects:
                if subject.run_directory == run:
                    return _same_class(subject, class_noun)
            identifier = choose(_tokens(subjects))
            if clash := _tokens(subjects).intersection(identifier.token_ids):
                raise ValueError(f"tokens {sorted(clash)} were chosen though another subject has them; choose others")
            self._write([*subjects, Subject(name, identifier, class_noun, run)])
            return identifier

    @contextmanager
    def _lock(self) -> Iterator[None]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = self.path.with_name(f"{self.path.name}.lock").open("a")
        except OSError as error:
            raise self._unwritable(error) from error
        with lock:  # closing the file releases the lock
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _write(self, subjects: Sequence[Subject]) -> None:
        entries = [
            {
                "name": subject.name,
                "identifier": subject.identifier.text,
                "token_ids": subject.identifier.token_ids,
                "token_counts": subject.identifier.counts,
                "class_noun": subject.class_noun,
                "run_directory": subject.run_directory,
            }
            for subject in subjects
        ]
        temporary = self.path.with_name(f"{self.path.name}.tmp")
        try:
            temporary.write_text(json.dumps({"subjects": entries}, indent=2, ensure_ascii=False) + "\n", "utf-8")
            os.replace(temporary, self.path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"the registry {self.path} cannot be written ({error.strerror}); check permissions and free space"
        )


def _tokens(subjects: Sequence[Subject]) -> frozenset[int]:
    return frozenset(token_id for subject in subjects for token_id in subject.identifier.token_ids)


def _same_class(subject: Subject, class_noun: str) -> Identifier:
    if subject.class_noun != class_noun:
        raise UserError(
            f"{subject.run_directory} holds a {subject.class_noun!r}, not a {class_noun!r}; "
            "use another run directory, or the same class noun"
        )
    return subject.identifier
