"""Token frequencies: how often a text encoder met each token (specification [0057]), or an estimate of it.

Only the pretraining of the cascade that ships recorded frequencies. Those of public text encoders are estimated from
their vocabulary, or from captions that the user has.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from personalize_jax.formats.tokenizer import Tokenizer
from personalize_jax.runtime.errors import UserError

_CAPTIONS_AT_ONCE = 10_000


def token_frequencies(tokenizer: Tokenizer, source: str) -> np.ndarray:
    """Read or estimate the frequency of each token.

    Args:
        tokenizer: the tokenizer of the pretrained cascade.
        source: where frequencies come from. "recorded": how often pretraining processed each token. "sentencepiece":
            expected occurrences among a billion tokens by the scores of a SentencePiece unigram vocabulary (T5), which
            are log-probabilities. "bpe_rank": the size of the vocabulary less the rank of a token's merge (CLIP), since
            later merges are rarer; this is an order, not a count. Otherwise a text file of captions, one a line, in
            which tokens are counted as the text encoder would process them; the vocabulary's own frequencies are
            added, scaled to less than one occurrence, to order the many tokens that no caption has.

    Returns:
        [V], higher for more frequent tokens: int64, or float64 for captions. Entries of special tokens mean nothing.

    Raises:
        UserError: the tokenizer has no such frequencies, or the file cannot be read.
    """
    if source in _SOURCES:
        return _SOURCES[source](tokenizer)
    counts, own = _in_captions(tokenizer, Path(source)), _of_vocabulary(tokenizer)
    return counts + own / (own.max() + 1)


def _recorded(tokenizer: Tokenizer) -> np.ndarray:
    if tokenizer.counts is None:
        raise UserError(
            'Frequencies "recorded" in pretraining were asked for, and this public tokenizer comes with none; '
            'take "sentencepiece" for T5, "bpe_rank" for CLIP, or a file of captions.'
        )
    return tokenizer.counts


def _sentencepiece(tokenizer: Tokenizer) -> np.ndarray:
    model = _model_of("Unigram", tokenizer, "sentencepiece")
    frequencies = np.zeros(tokenizer.size, np.int64)
    frequencies[: len(model["vocab"])] = np.rint(np.exp([score for _, score in model["vocab"]]) * 1e9)
    return frequencies


def _bpe_rank(tokenizer: Tokenizer) -> np.ndarray:
    model = _model_of("BPE", tokenizer, "bpe_rank")
    frequencies = np.full(tokenizer.size, tokenizer.size, np.int64)  # single bytes come before all merges
    for rank, merge in enumerate(model["merges"], start=1):
        frequencies[model["vocab"]["".join(merge)]] = tokenizer.size - rank
    return frequencies


def _in_captions(tokenizer: Tokenizer, file: Path) -> np.ndarray:
    counts = np.zeros(tokenizer.size, np.int64)
    try:
        with file.open(encoding="utf-8") as captions:
            while batch := list(itertools.islice(captions, _CAPTIONS_AT_ONCE)):
                rows = tokenizer.encode_batch([line.strip() for line in batch])
                read = [token_id for ids in rows for token_id in ids[: tokenizer.text_length]]
                counts += np.bincount(np.array(read, np.int64), minlength=len(counts))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"Token frequencies from {str(file)!r} were asked for, which cannot be read as a text file ({error}); give "
            f"a file with one caption a line, or one of {', '.join(_SOURCES)}."
        ) from error
    counts[sorted(tokenizer.special_ids)] = 0  # no identifier may have the unknown token
    if not counts.any():
        raise UserError(f"{file} holds no captions to count tokens in; give a file with one caption a line.")
    return counts


def _of_vocabulary(tokenizer: Tokenizer) -> np.ndarray:
    """The frequencies that come with a vocabulary: recorded, or implied by its model, or zeros."""
    if tokenizer.counts is not None:
        return tokenizer.counts
    estimate = {"Unigram": _sentencepiece, "BPE": _bpe_rank}.get(_model(tokenizer)["type"])
    return np.zeros(tokenizer.size, np.int64) if estimate is None else estimate(tokenizer)


def _model(tokenizer: Tokenizer) -> dict[str, Any]:
    return json.loads(tokenizer.backend.backend_tokenizer.to_str())["model"]


def _model_of(kind: str, tokenizer: Tokenizer, source: str) -> dict[str, Any]:
    """The vocabulary's model, which must be of the given kind."""
    model = _model(tokenizer)
    if model["type"] != kind:
        raise UserError(
            f"Frequencies by {source!r} were asked of a {model['type']} vocabulary, and need a {kind} one; take "
            '"sentencepiece" for T5, "bpe_rank" for CLIP, or a file of captions.'
        )
    return model


_SOURCES: dict[str, Callable[[Tokenizer], np.ndarray]] = {
    "recorded": _recorded,
    "sentencepiece": _sentencepiece,
    "bpe_rank": _bpe_rank,
}
