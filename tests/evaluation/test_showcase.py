import dataclasses
import json
import shlex
from html import escape
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from personalize_jax import sample
from personalize_jax.evaluation import showcase
from personalize_jax.method.personalization import class_knowledge
from personalize_jax.method.personalized import Personalized
from personalize_jax.metrics.metric import Picture
from personalize_jax.runtime.errors import UserError
from personalize_jax.subject.class_noun import ClassNoun
from personalize_jax.subject.dataset import SubjectDataset
from personalize_jax.subject.identifier import Identifier
from personalize_jax.world.reading import Reading
from personalize_jax.world.scene import CLASSES, CONTEXTS, LABELS
from tests import tiny, tiny_world

SUBJECT = {"class_id": 2, "body_colour": 3, "accent_colour": 5, "pattern": 1, "finish": 0}
OWN = ("class", "body colour", "accent colour", "pattern", "finish")


def pictures_of(count, shape=0, **properties):
    """Pictures whose first bytes say what a probe is to read in them: values by name, then four proportions."""
    images = np.zeros((count, 32, 32, 3), np.uint8)
    values = {**SUBJECT, "context": 0, "accessory": 0, **properties}
    images.reshape(count, -1)[:, : len(LABELS) + 4] = [*(values[name] for name in LABELS), *[shape] * 4]
    return images


def in_context(**images_of):
    """The subject's pictures by context, whose words have _ for spaces."""
    return [
        Picture("subject", f"a [V] {NOUN} {place.replace('_', ' ')}", None, "", pixels)
        for place, images in images_of.items()
        for pixels in images
    ]


def of_class(images):
    return [Picture("class", f"a {NOUN}", None, "", pixels) for pixels in images]


class PixelProbe:
    """Reads what `pictures_of` wrote."""

    @classmethod
    def load(cls):
        return cls()

    def read(self, images):
        columns = images.reshape(len(images), -1).T
        values = {
            name: np.eye(len(LABELS[name]), dtype=np.float32)[column]
            for name, column in zip(LABELS, columns, strict=False)
        }
        return Reading(**values, shape=columns[len(LABELS) : len(LABELS) + 4].T / np.float32(255))


NOUN = CLASSES[SUBJECT["class_id"]]
LOOK_LIKE_ANOTHER_CLASS = pictures_of(3, class_id=7)  # what the subject is was said, not read


@pytest.fixture
def score(monkeypatch):
    """Scores of pictures by what they are called."""
    monkeypatch.setattr(showcase, "Probe", PixelProbe)

    def score(drawn, photos=LOOK_LIKE_ANOTHER_CLASS):
        subject = SimpleNamespace(images_NHWC=photos, class_noun=SimpleNamespace(noun=NOUN), labels=("a tar",))
        return {name: value for name, (value, _) in showcase.exact_scores(subject, drawn).items()}

    return score


def test_what_shows_the_subject_where_the_prompt_says_scores_one(score):
    on_beach, in_snow = (pictures_of(2, context=CONTEXTS.index(place)) for place in ("on the beach", "in the snow"))
    scores = score({"subject": in_context(on_the_beach=on_beach, in_the_snow=in_snow)})
    assert scores == dict.fromkeys((f"subject: {name}" for name in (*OWN, "context")), 1.0)


def test_the_subjects_own_properties_and_the_places_are_counted(score):
    other_colour = pictures_of(2, context=CONTEXTS.index("on the beach"), body_colour=4)
    other_place = pictures_of(2, context=CONTEXTS.index("in the jungle"))
    scores = score({"subject": in_context(on_the_beach=other_colour, in_the_snow=other_place)})
    assert scores["subject: body colour"] == scores["subject: context"] == 0.5
    assert scores["subject: class"] == 1.0


def test_proportions_are_held_against_those_of_the_photos(score):
    drawn = {"subject": in_context(in_the_snow=pictures_of(2, shape=153))}
    scores = score(drawn, photos=pictures_of(3, shape=102))
    assert scores["subject: proportions"] == pytest.approx(1 - 51 / 255)


def test_places_that_the_probe_does_not_know_are_left_out(score):
    snow = pictures_of(2, context=CONTEXTS.index("in the snow"))
    assert score({"subject": in_context(on_the_moon=pictures_of(2), in_the_snow=snow)})["subject: context"] == 1.0
    scores = score({"subject": in_context(on_the_moon=pictures_of(2))})
    assert "subject: context" not in scores and scores["subject: pattern"] == 1.0


def test_a_class_that_became_the_subject_leaks_and_has_no_variety(score):
    varied = np.concatenate([pictures_of(1, body_colour=colour) for colour in range(8)])
    drawn = {"class before": varied, "class after": pictures_of(8), "class other": varied[[0, 1]]}
    scores = score({name: of_class(images) for name, images in drawn.items()})
    assert scores["class before: colours"] == pytest.approx(3.0)
    assert scores["class before: leakage"] == scores["class before: is subject"] == pytest.approx(1 / 8)
    assert scores["class after: colours"] == scores["class after: diversity kept"] == 0.0
    assert scores["class after: leakage"] == scores["class after: is subject"] == 1.0
    assert scores["class other: leakage"] == 0.0 and scores["class other: diversity kept"] == pytest.approx(1 / 3)
    assert "class before: diversity kept" not in scores


# What a run shows of its subject.


def subject_of(noun="dog", label="a tar dog"):
    photos = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    return SubjectDataset(photos, (label,) * 2, ClassNoun(noun, 1.0, "given"), Identifier("tar", (7,), (0,)))


@pytest.fixture(scope="module")
def cascade():
    smallest = {"channels": (16,), "down_blocks": (0,), "up_blocks": (0,), "attention": (False,)}
    return tiny.pipeline(resolution=32, **smallest)


def shown(cascade, workdir, **changes):
    """What a run of a cascade from a folder leaves: its scores, its page, and the titles of its gallery."""
    config = tiny_world.get_config("runs/world_sr/pipeline", report__class_samples=2, **changes)
    titles = []
    workdir.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        draw = showcase.gallery
        patch.setattr(showcase, "gallery", lambda panels: titles.extend(p.title for p in panels) or draw(panels))
        showcase.make_report(cascade, Personalized(cascade, subject_of()), None, config, workdir)
    return json.loads((workdir / "metrics.json").read_text()), (workdir / "report.html").read_text(), titles


def test_a_run_says_how_its_subject_is_called_and_drawn(cascade, tmp_path):
    workdir = tmp_path / "rex the dog"
    _, page, titles = shown(cascade, workdir)
    assert titles[0] == 'The photos of "a tar dog"' and titles[1] == '"a tar dog" in 2 contexts: [V] is tar'
    assert "<h1>&quot;a tar dog&quot;, personalised</h1>" in page
    told = showcase.usage(subject_of(), workdir, "in the snow")
    assert told["name"] == "a tar dog" and told["identifier"].startswith("tar: write [V] ")
    module, *given = shlex.split(told["to sample it"])[2:]
    assert module == sample.__name__
    assert given == [f"--workdir={workdir}", "--prompt=a [V] dog in the snow", "--out=out/"]
    for text in told.values():
        assert escape(text) in page


def test_a_subject_without_a_class_in_its_label_is_drawn_by_the_identifier_alone():
    assert "'--prompt=a [V] in the snow'" not in showcase.usage(subject_of(), Path("r"), "in the snow")["to sample it"]
    told = showcase.usage(subject_of(label="a tar"), Path("r"), "in the snow")
    assert told["name"] == "a tar" and "--prompt='a [V] in the snow'" in told["to sample it"]


def test_pictures_of_the_rendered_world_are_read_wherever_the_cascade_lies(cascade, tmp_path):
    scores, _, _ = shown(cascade, tmp_path / "with", evaluation__probe=True)
    assert {"subject: pattern", "subject: context", "class after: leakage"} <= scores.keys()
    assert shown(cascade, tmp_path / "without")[0] == {}
    of_world, of_others = (tiny_world.get_config("models/pipeline", evaluation__probe=probe) for probe in (True, False))
    classifier, nouns = class_knowledge(of_world)
    assert classifier(np.zeros((1, 32, 32, 3), np.uint8))[0] == list(nouns) == list(CLASSES)
    assert class_knowledge(of_others) == (None, None)


def test_pictures_that_the_probe_cannot_read_are_refused_before_any_is_drawn(cascade):
    with_probe, without = (tiny_world.get_config("p", evaluation__probe=probe) for probe in (True, False))
    showcase.check(cascade, with_probe)
    showcase.check(tiny.pipeline(), without)
    with pytest.raises(UserError, match="multiple of 32 pixels, not the 8 of base; give --config.evaluation.probe=f"):
        showcase.check(tiny.pipeline(), with_probe)
    larger = dataclasses.replace(cascade.stages[0], resolution=48)
    with pytest.raises(UserError, match="not the 48 of base"):
        showcase.check(dataclasses.replace(cascade, family=cascade.family.with_stages((larger,))), with_probe)


def test_the_report_says_where_class_images_come_from_if_they_were_not_drawn(photos):
    assert showcase.own_class_images(tiny_world.get_config("p")) == {}
    told = showcase.own_class_images(tiny_world.get_config("p", class_images__folder=str(photos)))
    assert told == {"class images": f"3 pictures of {photos}, in place of sampled ones"}
