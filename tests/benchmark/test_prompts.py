import re
from pathlib import Path

import pytest

from personalize_jax.benchmark.dreambooth import SUBJECTS
from personalize_jax.benchmark.prompts import (
    LIVE_PROMPTS,
    OBJECT_PROMPTS,
    dreambooth_prompts,
    read_prompts,
    world_prompts,
)
from personalize_jax.runtime.errors import UserError
from personalize_jax.world.captions import requested_properties
from personalize_jax.world.scene import ACCESSORIES, CLASSES, CLASSES_WITH_HEAD, COLOURS, CONTEXTS, FINISHES

PUBLISHED = Path(__file__).parents[2] / ".." / "shared" / "dreambooth" / "dataset" / "prompts_and_classes.txt"


@pytest.fixture(scope="module")
def published():
    """The dataset's own list of subjects and prompts."""
    if not PUBLISHED.is_file():
        pytest.skip(f"the DreamBooth dataset's list is not at {PUBLISHED}")
    return PUBLISHED.read_text()


def test_class_nouns_are_those_of_the_dataset(published):
    rows = re.findall(r"^(\w+),([\w ]+)$", published, re.MULTILINE)
    assert rows[0] == ("subject_name", "class")
    assert list(SUBJECTS.items()) == rows[1:]


def test_prompts_are_those_of_the_dataset(published):
    objects, live = published.split("Live Subject Prompts")
    for part, templates in ((objects, OBJECT_PROMPTS), (live, LIVE_PROMPTS)):
        expected = [text.format("[V]", "vase") for text in re.findall(r"'(.*)'\.format", part)]
        assert [template.format("vase") for template in templates] == expected


def test_animals_have_prompts_of_their_own():
    assert "a [V] dog in a chef outfit" in dreambooth_prompts("dog")
    assert "a [V] cat in a chef outfit" in dreambooth_prompts("cat")
    assert "a [V] stuffed animal on top of a mirror" in dreambooth_prompts("stuffed animal")
    assert len(set(SUBJECTS.values())) == 15 and len(SUBJECTS) == 30


@pytest.mark.parametrize("noun", sorted({*SUBJECTS.values(), *CLASSES}))
def test_a_subject_has_25_prompts_that_name_it_once(noun):
    for prompts in (dreambooth_prompts(noun), world_prompts(noun)) if noun in CLASSES else (dreambooth_prompts(noun),):
        assert len(set(prompts)) == 25
        assert all(prompt.count(f"[V] {noun}") == 1 for prompt in prompts)


@pytest.mark.parametrize("noun", CLASSES)
def test_the_worlds_prompts_ask_for_every_context_and_for_changes_that_can_be_drawn(noun):
    class_id = {"class_id": CLASSES.index(noun)}
    expected = [class_id | {"context": context} for context in range(len(CONTEXTS))]
    if noun in CLASSES_WITH_HEAD:
        expected += [class_id | {"accessory": worn} for worn in range(1, len(ACCESSORIES))]
        colours = ("red", "purple", "yellow")
    else:
        colours = ("red", "purple", "yellow", "green", "blue", "pink")
    expected += [class_id | {"body_colour": list(COLOURS).index(colour)} for colour in colours]
    expected += [class_id | {"finish": FINISHES.index("shiny")}]
    assert [requested_properties(prompt) for prompt in world_prompts(noun)] == expected


def test_prompts_are_read_from_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a [V] {} on the moon\n\n  a [V] {} in space \n")
    assert read_prompts(str(file), "dog") == ("a [V] dog on the moon", "a [V] dog in space")
    assert read_prompts(str(file), "duck toy")[0] == "a [V] duck toy on the moon"
    assert read_prompts("world", "dog") == world_prompts("dog")
    assert read_prompts("dreambooth", "dog") == dreambooth_prompts("dog")
    file.write_text(" \n")
    with pytest.raises(UserError, match="is empty"):
        read_prompts(str(file), "dog")
    with pytest.raises(UserError, match="is no list of prompts"):
        read_prompts("moon", "dog")
