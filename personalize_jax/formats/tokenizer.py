"""Captions to token ids, and the frequencies of tokens in pretraining."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from tokenizers.models import BPE
from transformers import CLIPTokenizer, PreTrainedTokenizerFast, T5Tokenizer

from personalize_jax.runtime.errors import UserError

logger = logging.getLogger(__name__)

PUBLIC_MAX_LENGTH = 77  # of CLIP's position embeddings, and of IF's training captions
_TEXTS_AT_ONCE = 2**16  # of phrases: a part's arrays take some 100 MB

# The files of each vocabulary, in any one of several forms. transformers takes a missing file for an empty vocabulary,
# so that their presence is checked first.
_CLASSES: Mapping[str, tuple[type[PreTrainedTokenizerFast], tuple[tuple[str, ...], ...]]] = {
    "T5Tokenizer": (T5Tokenizer, (("tokenizer.json",), ("spiece.model",))),
    "CLIPTokenizer": (CLIPTokenizer, (("tokenizer.json",), ("vocab.json", "merges.txt"))),
    "PreTrainedTokenizer": (PreTrainedTokenizerFast, (("tokenizer.json",),)),  # such as the world's
}


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A vocabulary with recorded frequencies.

    Attributes:
        backend: the `transformers` tokenizer.
        max_length: longest sequence, with the special tokens that are added.
        counts: int64 [V], the number of times that the text encoder processed each token in pretraining: the
            predetermined frequencies of the specification ([0057]). None for public vocabularies, for which nobody
            recorded them; see `subject.frequency`.
        clean: cleans texts before they are encoded, if need be.
    """

    backend: PreTrainedTokenizerFast
    max_length: int
    counts: np.ndarray | None
    clean: Callable[[str], str] | None = None

    @classmethod
    def read(cls, file: Path, max_length: int, counts: np.ndarray | None = None) -> "Tokenizer":
        """Read a `tokenizer.json`; without counts every token counts as never processed."""
        backend = PreTrainedTokenizerFast(
            tokenizer_file=str(file), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        )
        if counts is None:
            counts = np.zeros(len(backend), np.int64)
        return cls(backend, max_length, counts)

    @classmethod
    def from_folder(
        cls, folder: Path, max_length: int = PUBLIC_MAX_LENGTH, clean: Callable[[str], str] | None = None
    ) -> "Tokenizer":
        """Read a tokenizer in the files that `transformers` writes: T5's, CLIP's, or any that is a `tokenizer.json`.

        Args:
            folder: a folder with `tokenizer_config.json`, and `tokenizer.json`, `spiece.model` (T5), or `vocab.json`
                and `merges.txt` (CLIP).
            max_length: longest sequence.
            clean: cleans texts before they are encoded, such as `caption_cleaning.clean_caption`.

        Raises:
            UserError: the folder holds no such tokenizer.
        """
        name = _class_name(folder / "tokenizer_config.json")
        if name not in _CLASSES:
            raise UserError(f"{folder} holds a {name}; give the folder of a {' or a '.join(_CLASSES)}.")
        backend_class, vocabularies = _CLASSES[name]
        if not any(all((folder / file).is_file() for file in files) for files in vocabularies):
            wanted = ", or ".join(" and ".join(files) for files in vocabularies)
            raise UserError(f"{folder} lacks its {name}'s vocabulary; add {wanted}.")
        try:
            backend = backend_class.from_pretrained(str(folder))
        except Exception as error:  # transformers, tokenizers and sentencepiece each raise their own kinds
            raise UserError(f"The {name} in {folder} cannot be read ({error}); restore its files.") from error
        backend.backend_tokenizer.no_padding()  # a tokenizer.json may ask for either, and `__call__` sees to both
        backend.backend_tokenizer.no_truncation()
        return cls(backend, max_length, None, clean)

    @property
    def size(self) -> int:
        """Number of tokens V."""
        return len(self.backend)

    @property
    def text_length(self) -> int:
        """Number of tokens of a text that are read: `max_length` less the special tokens that are added."""
        return self.max_length - 1 - len(self._opening)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of all tokens with their ids, equal for vocabularies in which the same ids mean the same."""
        by_id = sorted((i, token) for token, i in self.backend.get_vocab().items())
        return hashlib.sha256(json.dumps(by_id).encode()).hexdigest()[:16]

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of padding, end of sequence, unknown and the like."""
        return frozenset(self.backend.all_special_ids)

    @property
    def is_t5(self) -> bool:
        """Whether the vocabulary is T5's, whose ids the paper names."""
        return isinstance(self.backend, T5Tokenizer)

    def check_rows(self, rows: int) -> None:
        """Refuse a text encoder whose table has no row for some of the tokens; it may well have more.

        Args:
            rows: rows of the text encoder's table of embeddings.

        Raises:
            UserError: there are ids beyond the table.
        """
        token, highest = max(self.backend.get_vocab().items(), key=lambda item: item[1])
        if highest >= rows:
            raise UserError(
                f"The tokenizer has the token {token!r} with id {highest}, and the text encoder's table has {rows} "
                "rows; give the tokenizer that the text encoder was trained with, or a table with a row for each token."
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, cleaned, without special tokens."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of several texts."""
        cleaned = list(texts) if self.clean is None else [self.clean(text) for text in texts]
        encodings = self.backend.backend_tokenizer.encode_batch(cleaned, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids."""
        text = self.backend.decode(list(token_ids), clean_up_tokenization_spaces=False)
        assert isinstance(text, str)  # of one list of ids
        return text

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Encode for the text encoder.

        Args:
            texts: captions; of longer ones only the first `text_length` tokens are read, and a warning, once for each
                text, gives the rest.

        Returns:
            int32 [B, max_length], each row opened by the beginning-of-sequence token if the vocabulary has one, closed
            by the end-of-sequence token, and padded.
        """
        tokens_BL = np.full((len(texts), self.max_length), self.backend.pad_token_id, np.int32)
        for row, text, ids in zip(tokens_BL, texts, self.encode_batch(texts), strict=True):
            if left_out := ids[self.text_length :]:
                _warn_of_cut(text, self.decode(left_out).strip(), self.text_length)
            ids = [*self._opening, *ids[: self.text_length], self.backend.eos_token_id]
            row[: len(ids)] = ids
        return tokens_BL

    def encode_phrases(self, phrases: Sequence[str], rows_MS: np.ndarray) -> np.ndarray:
        """Encode many texts of few phrases, without making the texts.

        Only for vocabularies in which a word's tokens do not depend on the words around it, such as the world's, T5's
        and CLIP's. For them the result is that of calling the tokenizer with the texts.

        Args:
            phrases: the phrases, in whole words; empty ones are left out of texts.
            rows_MS: the S phrases of each text in their order, indices into `phrases`; spaces stand between them.

        Returns:
            int32 [M, max_length], see `__call__`.
        """
        ids = [*self.encode_batch(phrases), self._opening, [self.backend.eos_token_id]]
        lengths = np.array([len(tokens) for tokens in ids])
        inside = np.arange(lengths.max()) < lengths[:, None]
        padded_ids = np.zeros(inside.shape, np.int32)
        padded_ids[inside] = [token for tokens in ids for token in tokens]
        tokens_ML = np.full((len(rows_MS), self.max_length), self.backend.pad_token_id, np.int32)
        for start in range(0, len(rows_MS), _TEXTS_AT_ONCE):
            part = slice(start, start + _TEXTS_AT_ONCE)
            # The tokens that open and close a text are its first and its last phrase.
            rows = np.pad(rows_MS[part], ((0, 0), (1, 1)), constant_values=((0, 0), (len(phrases), len(phrases) + 1)))
            length = lengths[rows].sum(axis=1)
            fits = length <= self.max_length
            # Both masks choose as many tokens of each text, and in the same order.
            filled = np.arange(self.max_length) < np.where(fits, length, 0)[:, None]
            tokens_ML[part][filled] = padded_ids[rows[fits]][inside[rows[fits]]]
            longer = [" ".join(filter(None, (phrases[i] for i in row))) for row in rows_MS[part][~fits].tolist()]
            tokens_ML[part][~fits] = self(longer)
        return tokens_ML

    def save(self, folder: Path) -> None:
        """Write the files from which `from_folder`, diffusers and transformers, old and new, read the tokenizer.

        Args:
            folder: made if missing; files of the same names are replaced. `counts` and `clean` are not written.

        Raises:
            UserError: the folder cannot be written.
        """
        model = self.backend.backend_tokenizer.model
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.backend.save_pretrained(str(folder))
            # Transformers before version 5 reads these; T5's can only be copied, if the tokenizer was read from it.
            if isinstance(model, BPE):
                model.save(str(folder))
            elif self.is_t5 and self.backend.can_save_slow_tokenizer:
                with contextlib.suppress(shutil.SameFileError):
                    shutil.copyfile(self.backend.vocab_file, folder / "spiece.model")
        except Exception as error:  # tokenizers raises plain exceptions
            raise UserError(
                f"The tokenizer cannot be written to {folder} ({error}); check free space and permissions."
            ) from error

    @property
    def _opening(self) -> list[int]:
        return [] if self.backend.bos_token_id is None else [self.backend.bos_token_id]


@functools.lru_cache(maxsize=1024)  # once a text, however many pictures and stages ask for it
def _warn_of_cut(text: str, left_out: str, length: int) -> None:
    logger.warning(
        'The text encoder reads %d tokens of a text, and of "%s" it leaves out "%s"; write less if that matters.',
        length,
        text,
        left_out,
    )


def _class_name(config_file: Path) -> str:
    """The class that a tokenizer's configuration names; transformers before version 5 added "Fast" to some."""
    try:
        return str(json.loads(config_file.read_text(encoding="utf-8"))["tokenizer_class"]).removesuffix("Fast")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{config_file} cannot be read as a tokenizer's configuration ({error!r}); give the folder of a tokenizer."
        ) from error
