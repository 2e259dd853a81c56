"""Identifiers are the rarest tokens that survive re-encoding, and no two subjects of a registry share one."""

import io
import json
import logging
import multiprocessing
import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from personalize_jax.errors import UserError
from personalize_jax.subject.identifier import (
    Identifier,
    Registry,
    choose_identifier,
    substitute,
    warn_without_placeholder,
)


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
    with pytest.raises(UserError, match="fresh registry"):
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
    assert substitute("a [V] dog beside a [V] dog", "xyz") == "a xyz dog beside a xyz dog"
    with caplog.at_level(logging.WARNING, "absl"):
        warn_without_placeholder(["a [V] dog", "a cat"])
    [record] = caplog.records
    assert '"a cat" has no [V]' in record.getMessage()


# --- the registry ---


def reserve(path: Path, n: int, num_tokens: int = 1) -> Identifier:
    registry = Registry(path)
    return registry.reserve(
        f"subject {n}",
        "dog",
        path.parent / f"run{n}",
        lambda in_use: choose_identifier(WORDS, "dog", num_tokens, in_use),
    )


def test_runs_get_different_tokens_and_keep_them(tmp_path):
    path = tmp_path / "new folder" / "subjects.json"
    assert Registry(path).in_use() == frozenset()
    first, second = reserve(path, 0), reserve(path, 1)
    assert (first.text, second.text) == ("xyz", "ok")
    before = path.read_bytes()
    assert reserve(path, 0, num_tokens=3) == first
    assert path.read_bytes() == before
    assert Registry(path).in_use() == {*first.token_ids, *second.token_ids}
    [subject, _] = Registry(path).subjects()
    assert subject == ("subject 0", first, "dog", str((path.parent / "run0").resolve()))


def slow_reserve(path: Path, n: int, barrier) -> None:
    barrier.wait()
    for m in range(20):
        numbers = Registry(path)
        numbers.reserve(f"{n} {m}", "dog", path.parent / f"{n}-{m}", lambda in_use: lowest_free(in_use))


def lowest_free(in_use: frozenset[int]) -> Identifier:
    token_id = next(i for i in range(1000) if i not in in_use)
    return Identifier("x", (token_id,), (0,))


def test_processes_that_reserve_at_once_get_different_tokens(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    path = tmp_path / "subjects.json"
    processes = [context.Process(target=slow_reserve, args=(path, n, barrier)) for n in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    subjects = Registry(path).subjects()
    assert len({subject.name for subject in subjects}) == 40
    assert Registry(path).in_use() == set(range(40))


def test_registry_guards(tmp_path):
    path = tmp_path / "subjects.json"
    taken = reserve(path, 0)
    with pytest.raises(UserError, match="holds a 'dog', not a 'cat'"):
        Registry(path).reserve("rex", "cat", tmp_path / "run0", lambda _: taken)
    with pytest.raises(ValueError, match="another subject has them"):
        Registry(path).reserve("rex", "dog", tmp_path / "run1", lambda _: taken)
    assert len(Registry(path).subjects()) == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"subjects": [{}]}', '{"subjects": 1}', "null"])
def test_damaged_registry_is_named_and_kept(tmp_path, content):
    path = tmp_path / "subjects.json"
    path.write_text(content)
    with pytest.raises(UserError, match="subjects.json is not a registry"):
        reserve(path, 0)
    assert path.read_text() == content


def test_failed_write_leaves_the_registry_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "subjects.json"
    reserve(path, 0)
    before = path.read_text()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), "write_text", full)
    with pytest.raises(UserError, match="No space left"):
        reserve(path, 1)
    assert path.read_text() == before
    assert json.loads(before)["subjects"][0]["identifier"] == "xyz"


def test_registry_in_a_place_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be (read|written)"):
        reserve(tmp_path / "file" / "subjects.json", 0)
