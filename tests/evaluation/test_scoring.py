import numpy as np
import pytest

from configs import world
from personalize_jax.evaluation.scoring import find_encoders, read_rows, score, summary, write_rows
from personalize_jax.metrics.metric import Picture
from personalize_jax.metrics.table import Row
from personalize_jax.runtime.errors import UserError
from personalize_jax.world.exact_metrics import truth_of
from personalize_jax.world.photos import heldout_subject
from personalize_jax.world.probe import Probe
from personalize_jax.world.scene import COLOURS
from tests.metric_encoders import metric_encoders, plain

PHOTOS = [Picture("photo", "", None, f"{i}.png", plain("red")) for i in range(2)]


def drawn(*colours, role="subject", prompt="a [V] red dog"):
    return [Picture(role, prompt, i, f"{role}{i}.png", plain(colour)) for i, colour in enumerate(colours)]


def scores_of(pictures, encoders=None):
    return [row.scores for row in score(encoders or metric_encoders(), "rex", [*PHOTOS, *pictures])[2:]]


def test_pictures_of_the_subject_are_compared_with_photos_prompts_and_each_other():
    same, other = scores_of(drawn("red", "blue"))
    assert same == pytest.approx(
        {"DINO": 1, "CLIP-I": 1, "CLIP-T": 1, "CLIP-I (second)": 1, "CLIP-T (second)": 1, "DIV": 2 / 3}, abs=1e-5
    )
    assert (other["DINO"], other["CLIP-T"]) == pytest.approx((0, 0), abs=1e-5)
    assert other["DIV"] == same["DIV"]


def test_diversity_is_within_a_prompt():
    pictures = drawn("red", "red", prompt="a [V] dog") + drawn("blue", prompt="a blue [V] dog")
    *copies, alone = scores_of(pictures)
    assert [copy["DIV"] for copy in copies] == [0, 0]
    assert "DIV" not in alone


def test_pictures_of_the_class_are_compared_with_photos():
    rows = drawn("red", "green", role="class", prompt="a dog") + drawn("blue", role="class before", prompt="a dog")
    leaked, clean, before = scores_of(rows)
    assert leaked == pytest.approx({"PRES": 1}, abs=1e-5)
    assert clean == pytest.approx({"PRES": 0}, abs=1e-5)
    assert before == pytest.approx({"PRES before": 0}, abs=1e-5)


def test_the_class_is_compared_with_photos_by_dino():
    blind = metric_encoders()
    for name in ("clip", "clip (second)"):
        blind[name].images = lambda images: np.ones((len(images), 1))
    same, other = scores_of(drawn("red", "green", role="class", prompt="a dog"), blind)
    assert (same["PRES"], other["PRES"]) == pytest.approx((1, 0), abs=1e-5)


def test_photos_are_compared_with_each_other():
    rows = score(metric_encoders(), "rex", [*PHOTOS, Picture("photo", "", None, "2.png", plain("blue"))])
    assert [row.scores["DINO (real)"] for row in rows] == pytest.approx([0.5, 0.5, 0], abs=1e-5)
    assert score(metric_encoders(), "rex", PHOTOS[:1])[0].scores == {}


def test_order_does_not_matter():
    pictures = drawn("red", "green", "blue", "red")
    expected = {row.file: row.scores for row in score(metric_encoders(), "rex", [*PHOTOS, *pictures])}
    shuffled = {row.file: row.scores for row in score(metric_encoders(), "rex", [*pictures[::-1], *PHOTOS])}
    for file, scores in expected.items():
        assert shuffled[file] == pytest.approx(scores)


def test_prompts_are_read_without_the_identifier():
    several = metric_encoders()
    scores_of(drawn("red", prompt="a [V] dog in the snow"), several)
    assert several["clip"].texts_seen == ["a dog in the snow"]


def test_clips_are_told_apart_by_their_names():
    settings = world.get_config().evaluation.copy_and_resolve_references()
    settings.clips = ("some/clip", "other/clip@refs/pr/1")
    with pytest.raises(UserError, match="has two CLIPs of one name among clip, clip"):
        find_encoders(settings)


def test_diversity_kept_is_the_share_of_the_class_as_it_was_before():
    after, before = ["red", "blue"] * 2, ["red", "blue", "green", "gray"]
    rows = [Row("rex", "class", "a dog", 0, "0.png", {"colours": colour}) for colour in after]
    rows += [Row("rex", "class before", "a dog", 0, "1.png", {"colours before": colour}) for colour in before]
    assert summary(rows)["rex"] == pytest.approx({"colours": 1, "colours before": 2, "diversity kept": 0.5})
    uniform = [row._replace(scores={name: "red" for name in row.scores}) for row in rows]
    assert "diversity kept" not in summary(uniform)["rex"]  # there was none


def test_leakage_added_is_what_the_class_did_not_have_before():
    rows = [
        Row("rex", "class", "a dog", i, f"{i}.png", {"leakage": leaked})
        for i, leaked in enumerate((1.0, 1.0, 0.0, 1.0))
    ]
    before = [row._replace(role="class before", scores={"leakage before": float(row.seed == 0)}) for row in rows]
    assert summary([*rows, *before])["rex"] == pytest.approx(
        {"leakage": 0.75, "leakage before": 0.25, "leakage added": 0.5}
    )
    assert "leakage added" not in summary(rows)["rex"]


def test_photos_are_needed():
    with pytest.raises(UserError, match="No photos of rex"):
        score(metric_encoders(), "rex", drawn("red"))


def test_rendered_pictures_of_a_subject_are_found_to_be_that_subject():
    held = heldout_subject("car", 0)
    truth = truth_of(held.subject)
    photos = [Picture("photo", "", None, str(i), photo) for i, photo in enumerate(held.photos)]
    roles = {"subject": "a [V] car", "class": "a car", "class before": "a car"}
    pictures = [p._replace(role=role, prompt=prompt) for role, prompt in roles.items() for p in photos]
    (metrics,) = summary(score(metric_encoders(Probe.load()), "car", [*photos, *pictures], truth=truth)).values()
    assert metrics["class"] == 1
    assert metrics["body colour"] >= 0.8
    assert metrics["leakage"] == metrics["leakage before"] == metrics["body colour"]
    assert metrics["leakage added"] == 0
    assert metrics["is subject"] <= metrics["leakage"]
    assert metrics["colours"] == metrics["colours before"]
    assert metrics.get("diversity kept", 1) == 1  # there is none where the class had no diversity to lose


def test_truth_that_is_given_goes_before_what_the_photos_show():
    held = heldout_subject("car", 0)
    told = truth_of(held.subject)
    other = told | {"body_colour": (told["body_colour"] + 1) % len(COLOURS)}
    photos = [Picture("photo", "", None, str(i), photo) for i, photo in enumerate(held.photos)]
    drawn = [p._replace(role=role, prompt="a [V] car") for role in ("subject", "class") for p in photos]
    scores = summary(score(metric_encoders(Probe.load()), "car", [*photos, *drawn], truth=other))["car"]
    assert scores["class"] == 1 and scores["body colour"] <= 0.2 and scores["leakage"] <= 0.2


def test_without_truth_the_photos_tell_it():
    held = heldout_subject("car", 0)
    photos = [Picture("photo", "", None, str(i), photo) for i, photo in enumerate(held.photos)]
    pictures = [*photos, *(p._replace(role="subject", prompt="a [V] car") for p in photos)]
    told, found = (
        summary(score(metric_encoders(Probe.load()), "car", pictures, truth=truth))["car"]
        for truth in (truth_of(held.subject), None)
    )
    assert found["class"] == told["class"] == 1
    assert found["body colour"] >= told["body colour"]  # photos agree with what most of them show


def test_rows_come_back(tmp_path):
    rows = score(metric_encoders(), "rex", [*PHOTOS, *drawn("red", "blue")])
    write_rows(rows, tmp_path / "rows.jsonl")
    assert read_rows(tmp_path / "rows.jsonl") == rows
    (tmp_path / "rows.jsonl").write_text('{"subject": "rex"}\n')
    with pytest.raises(UserError, match="no file of scores"):
        read_rows(tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match="no file of scores"):
        read_rows(tmp_path / "nothing.jsonl")


def test_numbers_are_plain():
    values = [value for row in score(metric_encoders(), "rex", PHOTOS) for value in row.scores.values()]
    assert values and all(type(value) is float for value in values) and np.isfinite(values).all()
