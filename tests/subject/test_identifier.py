"""Identifiers are the rarest tokens that survive re-encoding."""

import io
import logging
import random
import unicodedata

import numpy as np
import pytest
import sentencepiece
import wordfreq

from personalize_jax.formats.caption_cleaning import clean_caption
from personalize_jax.formats.tokenizer import Tokenizer
from personalize_jax.pipeline import load_pipeline
from personalize_jax.runtime.errors import UserError
from personalize_jax.subject.frequency import token_frequencies
from personalize_jax.subject.identifier import (
    Identifier,
    check_labels,
    choose_identifier,
    substitute,
    warn_without_placeholder,
)
from tests import public_tokenizers, tiny, tiny_public


class WordVocabulary:
    """Whole words, or words split into a head "xy" and tails "##z", longest match first; lower case only."""

    special_ids = frozenset({0})

    def __init__(self, counts: dict[str, int]):
        self.pieces = ["<unk>", *counts]
        self.counts = np.array([0, *counts.values()])
        self.size = len(self.pieces)

    def encode(self, text):
        return [token_id for word in text.lower().split() for token_id in self._split(word)]

    def _split(self, word, mark=""):
        for end in range(len(word), 0, -1):
            if mark + word[:end] in self.pieces:
                rest = self._split(word[end:], "##") if word[end:] else []
                return [self.pieces.index(mark + word[:end]), *rest]
        return [0]

    def decode(self, token_ids):
        return " ".join(self.pieces[i] for i in token_ids).replace(" ##", "").replace("##", "")


COUNTS = {
    "a": 900,
    "dog": 800,
    "sks": 3,
    "xyz": 2,
    "Abc": 0,  # never comes out of encoding, which lower-cases
    "q7": 0,  # not only letters
    "zebra": 0,  # rare, but longer than three characters
    "red": 700,
    "ok": 2,
    "##vv": 1,
    "##w": 4,
    "##ed": 5,
}
WORDS = WordVocabulary(COUNTS)


class SentencePieceVocabulary:
    def __init__(self, model: bytes, text: str):
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.size = self.processor.vocab_size()
        self.special_ids = frozenset(
            i for i in range(self.size) if self.processor.is_control(i) or self.processor.is_unknown(i)
        )
        self.counts = np.bincount(self.encode(text), minlength=self.size)

    def encode(self, text):
        return self.processor.encode(text)

    def decode(self, token_ids):
        return self.processor.decode(token_ids)


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def trained(request):
    """A real SentencePiece vocabulary over frequent prompt words and a long tail of rare ones."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 7))) for _ in range(2000)]
    prompts = [f"a {colour} {noun}" for colour in ("red", "green", "blue") for noun in ("dog", "cat", "teapot")] * 50
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(prompts + words),
        model_writer=model,
        vocab_size=600,
        model_type=request.param,
        num_threads=1,
        minloglevel=2,
    )
    return SentencePieceVocabulary(model.getvalue(), " ".join(prompts))


def test_the_rarest_short_token_that_survives_is_chosen():
    assert choose_identifier(WORDS, "dog") == Identifier("xyz", (WORDS.encode("xyz")[0],), (2,))


def test_longer_tokens_serve_when_no_short_one_is_left():
    short = frozenset(i for i, piece in enumerate(WORDS.pieces) if len(piece) <= 3) - {1, 2}
    assert choose_identifier(WORDS, "dog", in_use=short).text == "zebra"


def test_several_tokens_come_in_order_of_frequency():
    identifier = choose_identifier(WORDS, "dog", num_tokens=2)
    assert identifier == Identifier("xyzw", tuple(WORDS.encode("xyzw")), (2, 4))
    assert choose_identifier(WORDS, "dog", num_tokens=3).text == "xyzwed"


def test_tokens_in_use_and_of_the_noun_are_left_alone():
    xyz, ok, sks = (WORDS.encode(word)[0] for word in ("xyz", "ok", "sks"))
    assert choose_identifier(WORDS, "dog", in_use=frozenset({xyz})).text == "ok"
    assert choose_identifier(WORDS, "xyz").text == "ok"
    assert choose_identifier(WORDS, "dog", nouns=("red xyz", "zebra")).text == "ok"  # other classes that are known
    assert choose_identifier(WORDS, "dog", in_use=frozenset({xyz, ok})).text == "sks"
    with pytest.raises(UserError, match="'sks' is written with 'sks'.*another class noun"):
        choose_identifier(WORDS, "sks", in_use=frozenset({sks}))


def test_seed_orders_ties_only():
    texts = {choose_identifier(WORDS, "dog", seed=seed).text for seed in range(20)}
    assert texts == {"xyz", "ok"}
    assert choose_identifier(WORDS, "dog", seed=3) == choose_identifier(WORDS, "dog", seed=3)


@pytest.mark.parametrize("num_tokens", [0, 4])
def test_number_of_tokens(num_tokens):
    with pytest.raises(UserError, match="choose 1 to 3"):
        choose_identifier(WORDS, "dog", num_tokens)


def test_exhausted_vocabulary():
    everything = frozenset(range(WORDS.size)) - set(WORDS.encode("a dog"))
    with pytest.raises(UserError, match="another registry"):
        choose_identifier(WORDS, "dog", in_use=everything)


def test_counts_must_match_the_vocabulary():
    broken = WordVocabulary(COUNTS)
    broken.counts = broken.counts[:-1]
    with pytest.raises(ValueError, match="one each"):
        choose_identifier(broken, "dog")


@pytest.mark.parametrize("num_tokens", [1, 2, 3])
def test_real_vocabulary(trained, num_tokens):
    in_use = frozenset()
    for _ in range(10):
        text, token_ids, counts = choose_identifier(trained, "teapot", num_tokens, in_use)
        prompt_ids = trained.encode(f"a {text} teapot")
        assert prompt_ids == [*trained.encode("a"), *token_ids, *trained.encode("teapot")]
        assert len(token_ids) == num_tokens and text.isalpha()
        assert all(len(trained.decode([i])) <= 3 for i in token_ids)
        assert list(counts) == sorted(counts) and not in_use.intersection(prompt_ids)
        in_use |= set(token_ids)


def test_real_vocabulary_has_no_rarer_choice(trained):
    [count] = choose_identifier(trained, "dog").counts
    for token_id in range(trained.size):
        text = trained.decode([token_id]).strip()
        if trained.counts[token_id] < count and text.isalpha() and len(text) <= 3:
            assert trained.encode(f"a {text} dog") != [*trained.encode("a"), token_id, *trained.encode("dog")]


def test_placeholder(caplog):
    assert substitute("a [V] dog or a [V] dog", "tar", load_pipeline("world").tokenizer) == "a tar dog or a tar dog"
    with caplog.at_level(logging.WARNING, "absl"):
        warn_without_placeholder(["a [V] dog", "a cat"])
    [record] = caplog.records
    assert '"a cat" has no [V]' in record.getMessage()


def test_an_identifier_that_the_text_encoder_does_not_read_is_refused():
    """The tiny text encoder reads seven tokens."""
    tokenizer = tiny.tokenizer()
    text, (token,) = choose_identifier(tokenizer, "dog")[:2]
    seventh = "a dog dog dog dog dog [V]"
    assert tokenizer([substitute(seventh, text, tokenizer)])[0, 6] == token
    assert substitute(f"{seventh} in the snow", text, tokenizer) == f"a dog dog dog dog dog {text} in the snow"
    for prompt in ("a dog dog dog dog dog dog [V]", f"a [V] {seventh}"):
        with pytest.raises(UserError, match=r"\[V\]. the subject is named within the first . tokens.* 7 only"):
            substitute(prompt, text, tokenizer)
    labels = [f"a {text} dog", seventh.replace("[V]", text)]
    check_labels(labels, text, tokenizer)
    with pytest.raises(UserError, match=f'In "a a dog .* {text}" .*further to the front'):
        check_labels([*labels, f"a {labels[1]}"], text, tokenizer)
    with pytest.raises(UserError, match="the first 8 tokens"):
        substitute(seventh, choose_identifier(tokenizer, "dog", num_tokens=2).text, tokenizer)


@pytest.mark.parametrize("rule", ["rarest", "random_characters"])
@pytest.mark.parametrize(
    ("noun", "read"), [("собака", "<unk>"), ("dog собака", "dog"), ("犬", "''"), ("dog 犬", "'dog'"), ("#", "''")]
)
def test_a_noun_that_the_text_encoder_cannot_read_is_refused(noun, read, rule):
    tokenizer = Tokenizer(tiny_public.t5_tokenizer(), 77, None, clean_caption)
    how = {"frequencies": token_frequencies(tokenizer, "sentencepiece"), "rule": rule, "seed": 0}
    assert choose_identifier(tokenizer, "Dog", **how)
    with pytest.raises(UserError, match=f"Of the class noun '{noun}' the text encoder reads .*{read}.* only; name"):
        choose_identifier(tokenizer, noun, **how)


def test_nouns_that_come_through_in_other_letters_are_read():
    """Compatible forms of letters and capitals are the vocabulary's to normalise."""
    tokenizer = load_pipeline("world").tokenizer
    assert choose_identifier(tokenizer, "ﬁsh Dog").text == "xii"


def test_words_come_after_all_other_tokens_of_a_public_vocabulary():
    """Of which nobody knows what they mean to it; where that was recorded, words that were never read mean nothing."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -4.0), ("▁dog", -5.0), ("▁xqk", -6.0)]
    pieces += [("▁fck", -7.0), ("▁sky", -8.0), ("▁бог", -9.0), ("▁wqxz", -10.0)]
    backend = tiny_public.T5Tokenizer(vocab=pieces, extra_ids=0)
    chosen, in_use = [], frozenset()
    public = Tokenizer(backend, 77, None)
    for _ in range(5):
        identifier = choose_identifier(public, "dog", 1, in_use, frequencies=token_frequencies(public, "sentencepiece"))
        chosen, in_use = [*chosen, identifier.text], in_use | identifier.own_tokens
    assert chosen == ["xqk", "wqxz", "бог", "sky", "fck"]
    recorded = Tokenizer(backend, 77, np.array([0, 0, 0, 9, 9, 3, 2, 1, 8, 8]))
    assert choose_identifier(recorded, "dog").text == "sky"


def test_tokens_that_are_joined_to_a_word_are_passed_over():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -9.0), ("▁a", -4.0), ("▁cat", -5.0)]
    pieces += [("▁dgw", -7.0), ("v", -8.0), ("▁fc", -20.0), ("k", -19.0)]
    tokenizer = Tokenizer(tiny_public.T5Tokenizer(vocab=pieces, extra_ids=0), 77, None)
    rare = token_frequencies(tokenizer, "sentencepiece")
    assert wordfreq.zipf_frequency("fck", "en") >= 2
    assert choose_identifier(tokenizer, "cat", 2, frequencies=rare).text not in ("fck", "kfc")


# --- public vocabularies ---

NOUNS = ["dog", "bear plushie", "robot toy"]


def is_word(text):
    """Whether it is as frequent in English as one word in ten million, or of letters that English has not."""
    return wordfreq.zipf_frequency(text, "en") >= 2 or not unicodedata.name(text[0]).startswith("LATIN")


def is_short_and_no_word(tokenizer, token_id):
    text = tokenizer.decode([token_id]).strip()
    return len(text) <= 3 and text.isalpha() and not is_word(text)


@pytest.fixture(scope="module")
def made_t5():
    return Tokenizer(public_tokenizers.made_t5(), 77, None, clean_caption)


@pytest.fixture(scope="module")
def published_t5(tmp_path_factory):
    return Tokenizer.from_folder(public_tokenizers.t5_folder(tmp_path_factory.mktemp("t5")), clean=clean_caption)


@pytest.fixture(scope="module", params=["T5", "CLIP", "CLIP of SD 2"])
def public(request, tmp_path_factory):
    """A vocabulary, its frequencies, and those of its tokens of one to three letters that are no words."""
    if request.param == "T5":
        tokenizer, source = request.getfixturevalue("published_t5"), "sentencepiece"
    else:
        pad = "!" if request.param.endswith("2") else public_tokenizers.EOS
        tokenizer = Tokenizer.from_folder(public_tokenizers.clip_folder(tmp_path_factory.mktemp("clip"), pad))
        source = "bpe_rank"
    frequencies = token_frequencies(tokenizer, source)
    return tokenizer, frequencies, frequencies[[is_short_and_no_word(tokenizer, i) for i in range(tokenizer.size)]]


def chosen_for_ten(tokenizer, noun, num_tokens, **how):
    in_use = frozenset()
    for _ in range(10):
        identifier = choose_identifier(tokenizer, noun, num_tokens, in_use, **how)
        assert len(identifier.token_ids) == num_tokens and not in_use.intersection(identifier.token_ids)
        in_use |= set(identifier.token_ids)
        for context in ("", " in the jungle", " on top of a wooden floor"):
            prompt = f"a {identifier.text} {noun}{context}"
            expected = [*tokenizer.encode("a"), *identifier.token_ids, *tokenizer.encode(noun + context)]
            assert tokenizer.encode(prompt) == expected, prompt
        yield identifier
    assert len(in_use) == 10 * num_tokens


@pytest.mark.parametrize("num_tokens", [1, 2, 3])
@pytest.mark.parametrize("noun", NOUNS)
def test_ten_subjects_get_rare_tokens_of_public_vocabularies(public, noun, num_tokens):
    tokenizer, frequencies, of_short = public
    for identifier in chosen_for_ten(tokenizer, noun, num_tokens, frequencies=frequencies):
        assert identifier.counts == tuple(frequencies[list(identifier.token_ids)])
        assert list(identifier.counts) == sorted(identifier.counts)
        assert np.mean(of_short < max(identifier.counts)) < 0.25  # T5 has but four hundred such
        assert all(len(tokenizer.decode([i])) <= 3 for i in identifier.token_ids)
        assert not is_word(identifier.text)
        assert num_tokens > 1 or int(np.median(of_short)) > max(identifier.counts)


def test_ten_subjects_get_the_rarest_short_tokens_that_are_no_words(made_t5):
    frequencies = token_frequencies(made_t5, "sentencepiece")
    chosen = [identifier.counts[0] for identifier in chosen_for_ten(made_t5, "dog", 1, frequencies=frequencies)]
    of_short = np.sort(frequencies[[is_short_and_no_word(made_t5, i) for i in range(made_t5.size)]])
    # Single letters within words are rarer, but no words can be made of them alone.
    assert chosen == of_short[of_short >= chosen[0]][:10].tolist() and np.mean(of_short < chosen[0]) < 0.01


@pytest.mark.parametrize(
    ("name", "num_tokens"), [("made_t5", 1), ("published_t5", 1), ("published_t5", 2), ("published_t5", 3)]
)
def test_the_papers_rule_draws_short_tokens_of_the_middle(name, num_tokens, request):
    t5 = request.getfixturevalue(name)
    for identifier in chosen_for_ten(t5, "dog", num_tokens, seed=0, rule="paper"):
        assert all(5000 <= i <= 10000 and len(t5.decode([i])) <= 3 for i in identifier.token_ids)
        assert identifier.counts == ()


def test_the_papers_rule_draws_uniformly_by_a_seed(made_t5):
    ids = [choose_identifier(made_t5, "dog", seed=seed, rule="paper").token_ids[0] for seed in range(200)]
    assert ids[7] == choose_identifier(made_t5, "dog", seed=7, rule="paper").token_ids[0]
    allowed = [i for i in range(5000, 10001) if is_short_and_no_word(made_t5, i)]
    assert set(ids) <= set(allowed)
    places = np.sort(np.searchsorted(allowed, ids)) / len(allowed)
    assert np.abs(places - np.linspace(0, 1, 200)).max() < 0.12  # Kolmogorov-Smirnov at 0.5 %


def test_the_papers_rule_goes_on_with_words_where_others_are_used_up(published_t5):
    """It allows few tokens of T5 that are no words; a benchmark has thirty subjects."""
    in_use, chosen = frozenset(), []
    for _ in range(30):
        chosen.append(choose_identifier(published_t5, "dog", 1, in_use, seed=0, rule="paper"))
        in_use |= chosen[-1].own_tokens
    words = [is_word(identifier.text) for identifier in chosen]
    assert words == sorted(words) and 5 < sum(words) < 25


def test_rules_that_do_not_fit_are_refused(made_t5):
    tokenizer = tiny.tokenizer()
    with pytest.raises(UserError, match="draws from the tokens of T5"):
        choose_identifier(tokenizer, "dog", seed=0, rule="paper")
    with pytest.raises(UserError, match="'shortest' were asked for; choose one of rarest, paper, frequent, random"):
        choose_identifier(tokenizer, "dog", rule="shortest")
    with pytest.raises(UserError, match="none are recorded"):
        choose_identifier(made_t5, "dog")


def test_frequent_words_are_existing_ones_that_the_network_knows_well():
    tokenizer = load_pipeline("world").tokenizer
    chosen = {choose_identifier(tokenizer, "dog", seed=seed, rule="frequent").text for seed in range(20)}
    assert len(chosen) > 10
    least = sorted(tokenizer.counts)[-400]
    for text in chosen:
        (token,) = tokenizer.encode(text)
        assert tokenizer.counts[token] >= least > 0
        assert text.isalpha() and len(text) > 3 and text != "dog"


def test_two_subjects_do_not_share_a_frequent_word():
    tokenizer = load_pipeline("world").tokenizer
    first = choose_identifier(tokenizer, "dog", seed=0, rule="frequent")
    assert choose_identifier(tokenizer, "dog", seed=0, rule="frequent", in_use=first.own_tokens).text != first.text
    assert choose_identifier(tokenizer, "dog", seed=0, rule="frequent") == first


@pytest.mark.parametrize("name", ["world", "made", "t5", "clip"])
def test_random_characters_come_through_encoding_as_many_tokens(name, tmp_path):
    if name == "world":
        tokenizer = tiny.tokenizer()
    elif name == "made":
        tokenizer = Tokenizer(tiny_public.clip_tokenizer(), 77, None)
    else:
        tokenizer = Tokenizer.from_folder(getattr(public_tokenizers, f"{name}_folder")(tmp_path), 77)
    chosen = [choose_identifier(tokenizer, "dog", seed=seed, rule="random_characters") for seed in range(3)]
    assert len({identifier.text for identifier in chosen}) == 3
    for identifier in chosen:
        assert len(identifier.text) == 9 and identifier.text.isalnum()
        assert len(identifier.token_ids) > 3
        whole = [*tokenizer.encode("a"), *identifier.token_ids, *tokenizer.encode("dog")]
        assert tokenizer.encode(f"a {identifier.text} dog") == whole
        assert identifier.own_tokens == frozenset()  # its letters are anybody's
