"""The registry that keeps the subjects of one pretrained cascade apart."""

import fcntl
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from personalize_jax.errors import UserError
from personalize_jax.pipeline.tokenizer import Tokenizer
from personalize_jax.subject.frequency import token_frequencies
from personalize_jax.subject.identifier import Identifier, choose_identifier


class Subject(NamedTuple):
    """One entry of a registry."""

    name: str
    identifier: Identifier
    class_noun: str
    run_directory: str


class Registry:
    """The subjects of one pretrained cascade, in a JSON file that its runs share, so that no two share a token.

    But for random characters, whose tokens are anybody's: see `Identifier.own_tokens`.

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
            if clash := _tokens(subjects).intersection(identifier.own_tokens):
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


def reserve_identifier(
    tokenizer: Tokenizer, config: ConfigDict, workdir: Path, class_noun: str, nouns: Sequence[str]
) -> Identifier:
    """A run's identifier, chosen and reserved as its configuration says; the same at every call.

    Args:
        tokenizer: of the pretrained cascade.
        config: its keys `seed` and `subject`.
        workdir: run directory, whose name is the subject's.
        class_noun: what the subject is.
        nouns: class nouns that the cascade knows, none of whose words identifies a subject.

    Raises:
        UserError: see `Registry.reserve`; or there is no such token left.
    """
    settings, frequencies = config.subject, None
    if settings.rule in ("rarest", "frequent"):
        frequencies = token_frequencies(tokenizer, settings.frequency)
    seed = None if settings.rule == "rarest" else config.seed
    if settings.rule == "random_characters":  # which no registry keeps apart
        seed = zlib.crc32(f"{config.seed} {workdir.name}".encode())

    def choose(in_use: frozenset[int]) -> Identifier:
        return choose_identifier(
            tokenizer, class_noun, settings.num_tokens, in_use, seed, settings.rule, frequencies, nouns
        )

    return Registry(Path(settings.registry)).reserve(workdir.name, class_noun, workdir, choose)


def _tokens(subjects: Sequence[Subject]) -> frozenset[int]:
    return frozenset(token_id for subject in subjects for token_id in subject.identifier.own_tokens)


def _same_class(subject: Subject, class_noun: str) -> Identifier:
    if subject.class_noun != class_noun:
        raise UserError(
            f"{subject.run_directory} holds a {subject.class_noun!r}, not a {class_noun!r}; "
            "use another run directory, or the same class noun"
        )
    return subject.identifier
