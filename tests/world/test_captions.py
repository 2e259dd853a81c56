import hashlib
import itertools
import re

import numpy as np
import pytest

from personalize_jax.families.base import UNCONDITIONAL
from personalize_jax.formats.tokenizer import Tokenizer
from personalize_jax.runtime.files import ASSETS
from personalize_jax.world.captions import (
    caption_variants,
    in_tokens,
    in_words,
    ordinary_words,
    prompt,
    requested_properties,
    sample_phrases,
    words_for,
)
from personalize_jax.world.dataset_builder import block_rng, block_scenes
from personalize_jax.world.scene import (
    ACCESSORIES,
    CLASSES,
    COLOURS,
    CONTEXTS,
    FINISHES,
    PATTERNS,
    Scene,
    sample_subjects,
    sample_views,
    select,
)

NAMES = list(COLOURS)
FORM = re.compile(
    r"(?:a photo of )?(?P<article>an?) "
    rf"(?:(?P<finish>shiny) )?(?:(?P<body>{'|'.join(NAMES)}) )?(?:(?P<pattern>{'|'.join(PATTERNS[1:])}) )?"
    rf"(?:(?P<word>[a-z]+) )?(?P<noun>{'|'.join(CLASSES)})"
    rf"(?: with (?P<accent>{'|'.join(NAMES)}) accents)?(?: (?P<accessory>{'|'.join(ACCESSORIES[1:])}))?"
    rf"(?: (?P<context>{'|'.join(CONTEXTS)}))?"
)


@pytest.fixture(scope="module")
def described():
    """Scenes, and the parsed captions of each."""
    rng = np.random.default_rng(0)
    subjects = sample_subjects(rng, 2_000)
    scenes = Scene(subjects, sample_views(rng, subjects))
    captions = caption_variants(scenes, rng, 3)
    return scenes, [[FORM.fullmatch(text) for text in row] for row in captions]


def test_captions_have_the_form_and_name_only_true_things(described):
    (subject, view), rows = described
    for i, row in enumerate(rows):
        truth = {
            "finish": FINISHES[subject.finish[i]],
            "body": NAMES[subject.body_colour[i]],
            "pattern": PATTERNS[subject.pattern[i]],
            "noun": CLASSES[subject.class_id[i]],
            "accent": NAMES[subject.accent_colour[i]],
            "accessory": ACCESSORIES[view.accessory[i]],
            "context": CONTEXTS[view.context[i]],
        }
        for match in row:
            assert match is not None
            assert all(match[part] in (None, value) for part, value in truth.items())


def test_properties_are_named_as_often_as_intended(described):
    (subject, view), rows = described
    applies = {"body": None, "accent": None, "context": None, "word": None}
    applies |= {"finish": subject.finish > 0, "pattern": subject.pattern > 0, "accessory": view.accessory > 0}
    expected = {
        "body": 0.7,
        "accent": 0.3,
        "context": 0.85,
        "word": 0.2,
        "finish": 0.7,
        "pattern": 0.5,
        "accessory": 0.9,
    }
    for part, where in applies.items():
        chosen = [row for i, row in enumerate(rows) if where is None or where[i]]
        named = np.mean([match[part] is not None for row in chosen for match in row])
        assert named == pytest.approx(expected[part], abs=0.05), part


def test_articles_fit(described):
    for row in described[1]:
        for match in row:
            following = match.string[match.end("article") + 1]
            assert (match["article"] == "an") == (following in "aeiou")


def test_the_generator_decides_the_captions():
    subjects = sample_subjects(np.random.default_rng(0), 5)
    scenes = Scene(subjects, sample_views(np.random.default_rng(1), subjects))
    first, second, other = (caption_variants(scenes, np.random.default_rng(seed), 4) for seed in (2, 2, 3))
    assert first == second != other


def test_the_datasets_captions_are_those_of_its_version():
    """A digest of the second block's captions when version 1.1.0 of the dataset came out."""
    rng = block_rng("train", 1, "captions")
    captions = caption_variants(block_scenes("train", 1), rng, 4)
    assert captions[0][3] == "a yellow had cat with brown accents on top of pink fabric"
    digest = hashlib.sha256("\n".join(itertools.chain.from_iterable(captions)).encode()).hexdigest()
    assert digest == "0c4b653e88856856799d1e87ac84c3edb288d9c2218a9453229f7abc95951275"


def test_captions_made_in_one_go_are_those_made_one_after_the_other():
    """The generator is left as if each caption had taken its numbers by itself."""
    subjects = sample_subjects(np.random.default_rng(0), 200)
    scenes = Scene(subjects, sample_views(np.random.default_rng(1), subjects))
    together, alone = np.random.default_rng(2), np.random.default_rng(2)
    captions = caption_variants(scenes, together, 3)
    ones = [caption_variants(select(scenes, slice(i, i + 1)), alone, 1)[0][0] for i in np.repeat(np.arange(200), 3)]
    assert [text for row in captions for text in row] == ones
    assert together.random() == alone.random()


@pytest.mark.parametrize("max_length", [32, 12])
def test_tokens_of_phrases_are_those_of_the_captions_in_words(max_length):
    """Of all, or cut where they are too long."""
    rng = np.random.default_rng(4)
    subjects = sample_subjects(rng, 2_000)
    captions = sample_phrases(Scene(subjects, sample_views(rng, subjects)), rng, 2)
    tokenizer = Tokenizer.read(ASSETS / "world" / "tokenizer.json", max_length)
    tokens_ML, rows_NK = in_tokens(captions, tokenizer)
    texts = in_words(captions)
    assert (max(len(tokenizer.encode(text)) for text in texts[0]) > 11) or max_length > 12
    np.testing.assert_array_equal(tokens_ML[:1], tokenizer([UNCONDITIONAL]))
    assert rows_NK.shape == (2_000, 2) and tokens_ML.dtype == np.int32
    for k in range(2):
        np.testing.assert_array_equal(tokens_ML[rows_NK[:, k]], tokenizer([row[k] for row in texts]))


def test_ordinary_words_do_not_describe_scenes_in_english(described):
    words = ordinary_words()
    assert len(words) == len(set(words)) > 10_000
    assert all(re.fullmatch("[a-z]{3,10}", word) for word in words)
    said = set(" ".join((*CLASSES, *NAMES, *PATTERNS, *FINISHES, *ACCESSORIES, *CONTEXTS)).lower().split())
    assert not said & set(words)


def test_words_are_drawn_by_zipfs_law(described):
    """The first word of its colouring is drawn with probability 1 / (1 + 1/2 + ... + 1/n)."""
    drawn = [match["word"] for row in described[1] for match in row if match["word"]]
    assert len(set(drawn)) > 300  # a long tail
    n = len(words_for(0, 1))
    first = {words_for(b, a)[0] for b in range(len(NAMES)) for a in range(len(NAMES)) if a != b}
    assert np.mean([word in first for word in drawn]) == pytest.approx(1 / np.sum(1 / np.arange(1, n + 1)), abs=0.04)


def test_every_ordinary_word_names_one_colouring(described):
    (subject, _), rows = described
    pairs = [(b, a) for b in range(len(NAMES)) for a in range(len(NAMES)) if a != b]
    assert sorted(word for pair in pairs for word in words_for(*pair)) == sorted(ordinary_words())
    for i, row in enumerate(rows):
        names = words_for(int(subject.body_colour[i]), int(subject.accent_colour[i]))
        assert all(match["word"] in names for match in row if match["word"])


def test_prompts_are_worded_as_in_the_paper():
    assert prompt("dog", "in the snow", identifier="[V]") == "a [V] dog in the snow"
    assert prompt("can") == "a can"
    assert prompt("cat", colour="orange") == "an orange cat"
    assert (
        prompt("dog", "on the beach", "red", "[V]", "wearing a red hat")
        == "a red [V] dog wearing a red hat on the beach"
    )


PARTS = {
    "finish": ("finish", FINISHES),
    "body": ("body_colour", NAMES),
    "pattern": ("pattern", PATTERNS),
    "noun": ("class_id", CLASSES),
    "accent": ("accent_colour", NAMES),
    "accessory": ("accessory", ACCESSORIES),
    "context": ("context", CONTEXTS),
}


def test_what_captions_mention_is_what_they_ask_for(described):
    for row in described[1]:
        for match in row:
            mentioned = {name: values.index(match[p]) for p, (name, values) in PARTS.items() if match[p] is not None}
            assert requested_properties(match.string) == mentioned


def test_prompts_ask_for_what_they_are_built_from():
    rng = np.random.default_rng(3)
    for _ in range(200):
        drawn = {"class_id": rng.integers(len(CLASSES)), "body_colour": rng.integers(len(NAMES))}
        drawn |= {"context": rng.integers(len(CONTEXTS)), "accessory": rng.integers(1, 4), "finish": 1}
        ids = {name: int(value) for name, value in drawn.items() if name == "class_id" or rng.random() < 0.5}
        names = {"body_colour": NAMES, "context": CONTEXTS, "accessory": ACCESSORIES, "finish": FINISHES}
        words = {name.removeprefix("body_"): names[name][i] for name, i in ids.items() if name != "class_id"}
        for identifier in (None, "[V]", "tlw"):
            assert requested_properties(prompt(CLASSES[ids["class_id"]], identifier=identifier, **words)) == ids


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a red dog with blue accents", {"class_id": 0, "body_colour": 0, "accent_colour": 4}),
        ("a [V] dog wearing a red hat", {"class_id": 0, "accessory": 1}),
        ("a [V] dog wearing a black top hat and a monocle", {"class_id": 0, "accessory": 3}),
        ("a [V] dog in a purple wizard outfit", {"class_id": 0}),
        ("a pink [V] can on top of a white rug", {"class_id": 11, "body_colour": 6, "context": 17}),
        ("A Red [V] Dog  with the eiffel tower in the background", {"class_id": 0, "body_colour": 0, "context": 12}),
        ("a red [V] in the snow", {"body_colour": 0, "context": 1}),
        ("a [V] striped dog", {"class_id": 0, "pattern": 1}),
        ("a dog beside a red car", {"class_id": 0}),
        ("a [V] cartoon", {}),
        ("none", {}),
        ("", {}),
    ],
)
def test_only_what_is_named_of_the_subject_is_asked_for(text, expected):
    assert requested_properties(text) == expected
