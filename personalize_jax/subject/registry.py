"""The registry that gives each subject of a pretrained cascade tokens of its own."""

import fcntl
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from personalize_jax.formats.tokenizer import Tokenizer
from personalize_jax.runtime.errors import UserError
from personalize_jax.runtime.files import replacing
from personalize_jax.subject.dataset import MANIFEST, read_dataset
from personalize_jax.subject.frequency import token_frequencies
from personalize_jax.subject.identifier import Identifier, check_labels, choose_identifier

logger = logging.getLogger(__name__)


class Subject(NamedTuple):
    """One entry of a registry.

    Attributes:
        name: the subject's name among people.
        identifier: the subject's name in prompts.
        class_noun: the subject's class noun.
        run_directory: the run directory, relative to the registry's folder, so that both can be moved together.
        vocabulary: the fingerprint of the tokens' vocabulary; None in older files.
    """

    name: str
    identifier: Identifier
    class_noun: str
    run_directory: str
    vocabulary: str | None = None


class Registry:
    """A JSON file of subjects, shared by runs, which sees that no two subjects of one vocabulary share a token.

    Random characters are exempt, whose tokens are common letters: see `Identifier.own_tokens`.

    An entry reserves its tokens for a run directory, even when that directory is gone. The file is replaced as a whole,
    under a lock on a file beside it (`<name>.lock`), so that several runs may reserve at once.
    """

    def __init__(self, path: Path, vocabulary: str | None = None) -> None:
        """Name the file.

        Args:
            path: the file, which need not exist yet.
            vocabulary: the fingerprint of the vocabulary of new identifiers; None for any, which shares no token with
                subjects of any vocabulary.
        """
        self.path = path
        self.vocabulary = vocabulary

    def subjects(self) -> list[Subject]:
        """Read all subjects, in the order of their reservation; none if there is no file yet.

        Raises:
            UserError: the file cannot be read or is no registry.
        """
        try:
            entries = json.loads(self.path.read_text(encoding="utf-8"))["subjects"]
            return [
                Subject(
                    entry["name"],
                    Identifier.from_json(entry),
                    entry["class_noun"],
                    entry["run_directory"],
                    entry.get("vocabulary"),
                )
                for entry in entries
            ]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(
                f"The registry {self.path} cannot be read ({error.strerror}); check its permissions."
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self.path} is not a registry of subjects ({error!r}); restore it, or name another file."
            ) from error

    def reserve(
        self, name: str, class_noun: str, run_directory: Path, choose: Callable[[frozenset[int]], Identifier]
    ) -> Identifier:
        """Reserve an identifier for a run that has no subject yet; an earlier reservation for its directory is dropped.

        Args:
            name: the subject's name among people.
            class_noun: the subject's class noun.
            run_directory: the run directory.
            choose: chooses an identifier, given the tokens of all other runs, while the registry is locked. If it
                prefers tokens in a fixed order, the same run gets the same identifier again.

        Raises:
            UserError: the file cannot be read or written.
            ValueError: `choose` returned a token of another run.
        """
        with self._lock():
            subjects = self.subjects()
            taken = self._tokens(subject for subject in subjects if not self._is_of(subject, run_directory))
            identifier = choose(taken)
            if clash := taken & identifier.own_tokens:
                raise ValueError(f"tokens {sorted(clash)} were chosen though another subject has them; choose others")
            self._enter(Subject(name, identifier, class_noun, self._relative(run_directory), self.vocabulary), subjects)
            return identifier

    def keep(self, name: str, identifier: Identifier, class_noun: str, run_directory: Path) -> None:
        """Enter a run whose subject has an identifier already, since the run may have been moved, or the registry lost.

        The run keeps its identifier, which its networks were trained with, even if another run has it too; a warning
        then says so.

        Args:
            name: the subject's name among people.
            identifier: the subject's identifier.
            class_noun: the subject's class noun.
            run_directory: the run directory.

        Raises:
            UserError: the file cannot be read or written.
        """
        entry = Subject(name, identifier, class_noun, self._relative(run_directory), self.vocabulary)
        if entry in self.subjects():  # so that a registry that cannot be written is no obstacle
            return
        with self._lock():
            subjects = self.subjects()
            moved = [s for s in subjects if s.identifier == identifier and s.class_noun == class_noun]
            moved = [s for s in moved if self._may_share(s) and not _holds_subject(self._absolute(s))]
            if not any(self._is_of(subject, run_directory) for subject in subjects):
                subjects = [entry if subject in moved[:1] else subject for subject in subjects]
            for other in subjects:
                if self._tokens([other]) & identifier.own_tokens and not self._is_of(other, run_directory):
                    logger.warning(
                        "%s and %s share tokens of the identifier %r, by the registry %s; both keep it, as each was "
                        "trained with it: tell their pictures apart by the run.",
                        run_directory,
                        self._absolute(other),
                        identifier.text,
                        self.path,
                    )
            self._enter(entry, subjects)

    def _tokens(self, subjects: Iterable[Subject]) -> frozenset[int]:
        """The tokens of this vocabulary that are reserved for subjects."""
        return frozenset(t for subject in subjects if self._may_share(subject) for t in subject.identifier.own_tokens)

    def _may_share(self, subject: Subject) -> bool:
        """Whether the subject's tokens may belong to this vocabulary."""
        return self.vocabulary == subject.vocabulary or None in (self.vocabulary, subject.vocabulary)

    def _is_of(self, subject: Subject, run_directory: Path) -> bool:
        return self._absolute(subject) == run_directory.resolve()

    def _absolute(self, subject: Subject) -> Path:
        return (self.path.parent / subject.run_directory).resolve()  # older files have absolute paths, which stay

    def _relative(self, run_directory: Path) -> str:
        return Path(os.path.relpath(run_directory.resolve(), self.path.parent.resolve())).as_posix()

    def _enter(self, entry: Subject, subjects: Sequence[Subject]) -> None:
        """Write an entry in place of that of the same run directory, or after all others."""
        run_directory = self._absolute(entry)
        entered = [entry if self._is_of(subject, run_directory) else subject for subject in subjects]
        entered += [] if entry in entered else [entry]
        if entered != self.subjects():
            self._write(entered)

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
                **subject.identifier.to_json(),
                "class_noun": subject.class_noun,
                "run_directory": subject.run_directory,
                "vocabulary": subject.vocabulary,
            }
            for subject in subjects
        ]
        try:
            with replacing(self.path) as temporary:
                temporary.write_text(json.dumps({"subjects": entries}, indent=2, ensure_ascii=False) + "\n", "utf-8")
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"The registry {self.path} cannot be written ({error.strerror}); check permissions and free space."
        )


def reserve_identifier(
    tokenizer: Tokenizer, config: ConfigDict, workdir: Path, class_noun: str, nouns: Sequence[str]
) -> Identifier:
    """Enter a run's identifier in the registry: that of its subject, or else one chosen by its configuration.

    Args:
        tokenizer: the pretrained cascade's tokenizer.
        config: the run's configuration, of which the keys `seed` and `subject` are read.
        workdir: the run directory, named after the subject.
        class_noun: the subject's class noun.
        nouns: class nouns that the cascade knows; none of their tokens is chosen.

    Raises:
        UserError: the run holds a subject of another class; or see `choose_identifier` and `Registry.reserve`.
    """
    settings = config.subject
    registry = Registry(Path(settings.registry), tokenizer.fingerprint)
    if _holds_subject(workdir):
        subject = read_dataset(workdir / "subject")
        if subject.class_noun.noun != class_noun:
            raise UserError(
                f"{workdir} holds a {subject.class_noun.noun!r}, not a {class_noun!r}; give the same class noun, or "
                "another run directory, or delete this one."
            )
        keep_identifier(tokenizer, config, workdir)
        return subject.identifier
    frequencies = None
    if settings.rule in ("rarest", "frequent"):
        frequencies = token_frequencies(tokenizer, settings.frequency)
    seed = None if settings.rule == "rarest" else config.seed
    if settings.rule == "random_characters":  # exempt from the registry, so that the seed must tell runs apart
        seed = zlib.crc32(f"{config.seed} {workdir.name}".encode())

    def choose(in_use: frozenset[int]) -> Identifier:
        where = f"the registry {registry.path}"
        return choose_identifier(
            tokenizer, class_noun, settings.num_tokens, in_use, seed, settings.rule, frequencies, nouns, where
        )

    return registry.reserve(workdir.name, class_noun, workdir, choose)


def keep_identifier(tokenizer: Tokenizer, config: ConfigDict, workdir: Path) -> None:
    """Enter a run's subject in the registry, if it is not there, and check its labels, which may have been edited.

    Args:
        tokenizer: the pretrained cascade's tokenizer.
        config: the run's configuration, of which the key `subject.registry` is read.
        workdir: the run directory.

    Raises:
        UserError: see `read_dataset`, `check_labels` and `Registry.keep`.
    """
    subject = read_dataset(workdir / "subject")
    check_labels(subject.labels, subject.identifier.text, tokenizer)
    registry = Registry(Path(config.subject.registry), tokenizer.fingerprint)
    registry.keep(workdir.name, subject.identifier, subject.class_noun.noun, workdir)


def _holds_subject(run_directory: Path) -> bool:
    return (run_directory / "subject" / MANIFEST).exists()
