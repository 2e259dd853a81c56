"""Trains the embedded cascade's vocabulary, a SentencePiece unigram model of captions and ordinary English words.

    python -m personalize_jax.world.vocabulary --output=personalize_jax/assets/world/tokenizer.json

Ordinary words give the vocabulary pieces that captions hardly use, which are candidates for identifiers.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece
from absl import flags
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from personalize_jax.runtime import command
from personalize_jax.world.captions import caption_variants, ordinary_words
from personalize_jax.world.scene import Scene, sample_subjects, sample_views

VOCABULARY_SIZE = 4096
NUM_CAPTIONS = 40_000
WORD_REPEATS = 2_000  # of the most frequent word; the r-th occurs 1/r as often, every word at least twice
SEED = 0


def train_vocabulary() -> Tokenizer:
    """Train the unigram model; deterministic. Ids 0, 1, 2 are padding, end of sequence and unknown, as in T5."""
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=_sentences(),
        model_writer=buffer,
        vocab_size=VOCABULARY_SIZE,
        model_type="unigram",
        normalization_rule_name="identity",
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    trained = sentencepiece.SentencePieceProcessor(model_proto=buffer.getvalue())
    vocabulary = [(trained.id_to_piece(i), trained.get_score(i)) for i in range(trained.get_piece_size())]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    return tokenizer


def _sentences() -> Iterator[str]:
    rng = np.random.default_rng(SEED)
    subjects = sample_subjects(rng, NUM_CAPTIONS, split="train")
    for (caption,) in caption_variants(Scene(subjects, sample_views(rng, subjects)), rng, k=1):
        yield caption.lower()
    for rank, word in enumerate(ordinary_words(), start=1):
        yield from [word] * max(2, WORD_REPEATS // rank)


def define_flags() -> None:
    """The command line."""
    flags.DEFINE_string("output", None, "The tokenizer.json to write.")


def main(_: list[str]) -> None:
    """Write the vocabulary."""
    output = Path(flags.FLAGS.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(json.loads(train_vocabulary().to_str()), ensure_ascii=False, indent=None))


if __name__ == "__main__":
    command.run(main, define_flags, required=("output",))
