"""Captions to token ids, and how often each token was processed in pretraining."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """A vocabulary with recorded frequencies.

    Attributes:
        backend: the `transformers` tokenizer.
        max_length: longest sequence, the end-of-sequence token included.
        counts: int64 [V], how often the text encoder processed each token in pretraining: the predetermined
            frequencies of the specification ([0057]).
    """

    backend: PreTrainedTokenizerFast
    max_length: int
    counts: np.ndarray

    @classmethod
    def read(cls, file: Path, max_length: int, counts: np.ndarray | None = None) -> "Tokenizer":
        """Read a `tokenizer.json`; without counts every token counts as never processed."""
        backend = PreTrainedTokenizerFast(
            tokenizer_file=str(file), pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        )
        if counts is None:
            counts = np.zeros(len(backend), np.int64)
        return cls(backend, max_length, counts)

    @property
    def size(self) -> int:
        """Number of tokens V."""
        return len(self.backend)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of padding, end of sequence and unknown."""
        return frozenset(self.backend.all_special_ids)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return self.backend.encode(text, add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids."""
        return self.backend.decode(list(token_ids), clean_up_tokenization_spaces=False)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Encode for the text encoder.

        Args:
            texts: captions; longer ones are cut.

        Returns:
            int32 [B, max_length], each row closed by the end-of-sequence token and padded.
        """
        tokens_BL = np.full((len(texts), self.max_length), self.backend.pad_token_id, np.int32)
        encodings = self.backend.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False)
        for row, encoding in zip(tokens_BL, encodings, strict=True):
            ids = encoding.ids[: self.max_length - 1] + [self.backend.eos_token_id]
            row[: len(ids)] = ids
        return tokens_BL
