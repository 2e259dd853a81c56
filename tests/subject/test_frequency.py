from collections import Counter

import numpy as np
import pytest
import sentencepiece

from personalize_jax.formats.caption_cleaning import clean_caption
from personalize_jax.formats.tokenizer import Tokenizer
from personalize_jax.pipeline import load_pipeline
from personalize_jax.runtime.errors import UserError
from personalize_jax.subject.frequency import token_frequencies
from personalize_jax.subject.identifier import choose_identifier
from tests import public_tokenizers, tiny, tiny_public


@pytest.fixture(scope="module")
def published_t5(tmp_path_factory):
    return Tokenizer.from_folder(public_tokenizers.t5_folder(tmp_path_factory.mktemp("t5")))


@pytest.fixture(scope="module")
def t5():
    return Tokenizer(tiny_public.t5_tokenizer(), 77, None)


@pytest.fixture(scope="module", params=["tiny", "published"])
def clip(request, tmp_path_factory):
    if request.param == "tiny":
        return Tokenizer(tiny_public.clip_tokenizer(), 77, None)
    return Tokenizer.from_folder(public_tokenizers.clip_folder(tmp_path_factory.mktemp("clip")))


def test_recorded_are_the_counts(t5):
    tokenizer = tiny.tokenizer()
    np.testing.assert_array_equal(token_frequencies(tokenizer, "recorded"), tokenizer.counts)
    with pytest.raises(UserError, match='comes with none; take "sentencepiece" for T5'):
        token_frequencies(t5, "recorded")


def test_sentencepiece_scores_are_logarithms_of_probabilities(t5):
    frequencies = token_frequencies(t5, "sentencepiece")
    assert frequencies.shape == (t5.size,) and frequencies.dtype == np.int64
    (a,), (dog,) = t5.encode("a"), t5.encode("dog")
    assert frequencies[a] == round(1e9 * np.exp(-4.0)) and frequencies[dog] == round(1e9 * np.exp(-4.1))


def test_published_scores_are_those_of_sentencepiece(published_t5):
    t5 = published_t5
    frequencies = token_frequencies(t5, "sentencepiece")
    assert frequencies.shape == (t5.size,) and frequencies.dtype == np.int64
    ordinary = [i for i in range(t5.size) if i not in t5.special_ids]
    assert 0.99e9 < frequencies[ordinary].sum() < 1.01e9
    reference = sentencepiece.SentencePieceProcessor(t5.backend.vocab_file)
    scores = np.array([reference.get_score(i) for i in ordinary])
    np.testing.assert_allclose(np.log(frequencies[ordinary] / 1e9), scores, atol=1e-3)


def test_later_merges_are_rarer(clip):
    frequencies = token_frequencies(clip, "bpe_rank")
    assert frequencies.shape == (clip.size,) and frequencies.dtype == np.int64
    single_bytes, merged = frequencies[:512], frequencies[512:-2]  # CLIP's ids are in the order of its merges
    assert np.all(np.diff(merged) < 0)
    assert single_bytes.min() > merged.max() and merged.min() > 0


def test_captions_are_counted_as_the_text_encoder_reads_them(clip, tmp_path):
    file = tmp_path / "captions.txt"
    file.write_text("a dog\n\na <b>red</b> dog and a teapot\n" + "snow " * 100)
    tokenizer = Tokenizer(clip.backend, 20, None, clean_caption)
    frequencies = token_frequencies(tokenizer, str(file))
    assert int(frequencies[tokenizer.encode("a")[0]]) == 3 and int(frequencies[tokenizer.encode("dog")[0]]) == 2
    counts = np.floor(frequencies)  # what is below one is the vocabulary's own
    pieces = Counter(piece for ids in ("a dog", "a red dog and a teapot") for piece in tokenizer.encode(ids))
    pieces += Counter(tokenizer.encode("snow " * 100)[:18])  # two of twenty begin and end the row
    assert {i: int(counts[i]) for i in np.flatnonzero(counts)} == pieces


def test_of_tokens_that_no_caption_has_the_vocabularys_rarest_is_chosen(t5, clip, tmp_path):
    """As if the captions said nothing, where they say nothing; and what is in a caption is not rare."""
    captions = tmp_path / "captions.txt"
    for tokenizer, source in ((t5, "sentencepiece"), (clip, "bpe_rank")):
        rarest = choose_identifier(tokenizer, "dog", frequencies=token_frequencies(tokenizer, source))
        captions.write_text("a dog in the snow\n")
        frequencies = token_frequencies(tokenizer, str(captions))
        assert choose_identifier(tokenizer, "dog", frequencies=frequencies) == rarest._replace(counts=(0,))
        captions.write_text(f"a {rarest.text} dog in the snow\n" * 3)
        frequencies = token_frequencies(tokenizer, str(captions))
        assert choose_identifier(tokenizer, "dog", frequencies=frequencies).text != rarest.text
        assert int(frequencies[rarest.token_ids[0]]) == 3


def test_of_recorded_tokens_that_no_caption_has_the_rarest_is_chosen(tmp_path):
    tokenizer = load_pipeline("world").tokenizer
    (tmp_path / "captions.txt").write_text("a dog in the snow\n")
    frequencies = token_frequencies(tokenizer, str(tmp_path / "captions.txt"))
    assert choose_identifier(tokenizer, "dog", frequencies=frequencies) == choose_identifier(tokenizer, "dog")


def test_unsuitable_sources_are_refused(t5, clip, tmp_path):
    with pytest.raises(UserError, match="'bpe_rank' were asked of a Unigram vocabulary"):
        token_frequencies(t5, "bpe_rank")
    with pytest.raises(UserError, match="'sentencepiece' were asked of a BPE vocabulary"):
        token_frequencies(clip, "sentencepiece")
    with pytest.raises(UserError, match="or one of recorded, sentencepiece, bpe_rank"):
        token_frequencies(clip, "nothing.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read as a text file"):
        token_frequencies(clip, str(tmp_path / "binary"))
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(UserError, match="holds no captions"):
        token_frequencies(clip, str(tmp_path / "empty"))
