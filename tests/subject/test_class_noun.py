"""A given class noun wins; a sure classifier is believed; everything else asks the user."""

from pathlib import Path

import numpy as np
import pytest

from personalize_jax.runtime.errors import UserError
from personalize_jax.subject.class_noun import class_prompt, determine, with_article
from personalize_jax.subject.images import SubjectImage

NOUNS = ["cat", "dog", "teapot", "bear plushie"]
IMAGES = [SubjectImage(Path(f"{n}.png"), "", np.full((8, 8, 3), n, np.uint8)) for n in range(3)]


def classifier_of(probabilities):
    def classifier(images_NHWC):
        assert images_NHWC.shape == (3, 8, 8, 3) and images_NHWC.dtype == np.uint8
        return NOUNS, np.asarray(probabilities)

    return classifier


def test_given_noun_wins_and_is_normalised():
    certain_cat = classifier_of([[1, 0, 0, 0]] * 3)
    assert determine(IMAGES, "  Bear\t Plushie ", certain_cat, NOUNS) == ("bear plushie", 1.0, "given")
    assert determine(IMAGES, "axolotl").noun == "axolotl"


@pytest.mark.parametrize(
    ("given", "noun"),
    [
        ("a dog", "dog"),
        ("An  Umbrella", "umbrella"),
        ("the dog", "dog"),
        ("anteater", "anteater"),
        ("a-frame", "a-frame"),
    ],
)
def test_articles_which_prompts_add_are_left_out(given, noun):
    assert determine(IMAGES, given).noun == noun


def test_articles_go_by_the_sound():
    an = "umbrella axolotl owl eagle iguana urn usher undershirt hour hourglass heirloom Axolotl uninvited"
    a = "dog can bear plushie hat house horse unicorn uniform unit ukulele utensil user ewe eucalyptus one-piece"
    assert all(with_article(noun) == f"an {noun}" for noun in an.split())
    assert all(with_article(noun) == f"a {noun}" for noun in a.split())
    assert with_article("orange cat") == "an orange cat"


@pytest.mark.parametrize("given", ["", "   ", "d" * 41, "[V] dog", "dog]", "do\x00g"])
def test_unusable_nouns(given):
    with pytest.raises(UserError, match=r"cannot be used; give a plain noun"):
        determine(IMAGES, given)


def test_unknown_noun_names_all_known_ones_closest_first():
    with pytest.raises(UserError, match="'doge' is unknown .* choose one of: dog, ") as error:
        determine(IMAGES, "doge", None, NOUNS)
    assert all(noun in str(error.value) for noun in NOUNS)


def test_evidence_is_pooled_over_the_images():
    noun = determine(IMAGES, None, classifier_of([[0.2, 0.7, 0.1, 0]] * 3))
    assert (noun.noun, noun.source) == ("dog", "classifier") and noun.score == pytest.approx(0.7)
    # Geometric means in closed form: 0.9^(2/3) 0.1^(1/3) against 0.1^(2/3) 0.9^(1/3).
    noun = determine(IMAGES, None, classifier_of([[0.1, 0.9], [0.1, 0.9], [0.9, 0.1]]))
    odds = 9 ** (1 / 3)
    assert noun.noun == "dog" and noun.score == pytest.approx(odds / (1 + odds))


def test_impossible_in_one_image_is_unlikely_but_finite():
    noun = determine(IMAGES, None, classifier_of([[0, 1, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]]), threshold=0.5)
    assert noun.noun == "dog" and np.isfinite(noun.score)


def test_unsure_classifier_asks_and_names_its_three_best_guesses():
    with pytest.raises(
        UserError, match=r"dog \(0.40\), cat \(0.30\), teapot \(0.20\); 0.60 .* by --class_noun"
    ) as error:
        determine(IMAGES, None, classifier_of([[0.3, 0.4, 0.2, 0.1]] * 3))
    assert "plushie" not in str(error.value)
    assert determine(IMAGES, None, classifier_of([[0.3, 0.4, 0.2, 0.1]] * 3), threshold=0.39).noun == "dog"


def test_no_noun_and_no_classifier_asks():
    with pytest.raises(UserError, match="--class_noun"):
        determine(IMAGES, None)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a [V] dog in the snow", "a dog in the snow"),
        ("a red [V] dog", "a red dog"),
        ("a photo of a [V] orange cat", "a photo of an orange cat"),
        ("an [V] dog", "a dog"),
        ("an orange [V] cat", "an orange cat"),
        ("a [V] umbrella beside a [V] unicorn", "an umbrella beside a unicorn"),
        ("a dog", "a dog"),
    ],
)
def test_the_class_prompt_lacks_the_identifier_and_its_articles_fit(prompt, expected):
    assert class_prompt(prompt) == expected
