"""Sheets and pages hold what they are given, and no more."""

import base64
import io
import json
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from PIL import Image

from personalize_jax.evaluation.report import (
    Panel,
    gallery,
    read_metrics,
    report_html,
    smooth,
)
from tests.logged import MEASURED

NASTY = "<script>alert(\"x\")</script> & 'y' $\\alpha$"


@pytest.fixture
def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (32, 24, 3), dtype=np.uint8)


def blocks(count: int, side: int, colour=(200, 30, 30)) -> np.ndarray:
    return np.broadcast_to(np.uint8(colour), (count, side, side, 3))


def area(sheet: Image.Image, colour=(200, 30, 30)) -> int:
    """Pixels of exactly this colour, which type and background never have."""
    return int((np.asarray(sheet) == colour).all(axis=-1).sum())


@pytest.mark.parametrize(("count", "side"), [(1, 128), (4, 32), (8, 64), (9, 96), (32, 128), (3, 256)])
def test_every_picture_fills_a_cell(count, side):
    sheet = gallery([Panel("Title", "a dog", blocks(count, side))])
    assert area(sheet) == count * 128**2
    assert sheet.width <= 8 * (128 + 16) + 64


def test_small_pictures_stay_squares_and_larger_ones_are_smoothed():
    colours = {}
    for side in (32, 64):
        checks = np.indices((side, side)).sum(axis=0) % 2 * np.uint8(255)
        with_red = np.stack([checks, 0 * checks, 0 * checks], axis=-1)[None].astype(np.uint8)
        pixels = np.asarray(gallery([Panel("", "", with_red)])).reshape(-1, 3)
        colours[side] = {tuple(c) for c in pixels if c[0] > c[1]}
    assert colours[32] == {(255, 0, 0)}
    assert len(colours[64]) > 1


def test_oblong_pictures_keep_their_proportions():
    images = np.broadcast_to(np.uint8([200, 30, 30]), (1, 32, 16, 3))
    assert area(gallery([Panel("", "", images)])) == 64 * 128


def test_panels_of_one_title_flow_in_lines():
    def height(count: int, titles: str) -> int:
        return gallery([Panel(titles[i % len(titles)], "a dog", blocks(2, 128)) for i in range(count)]).height

    assert height(4, "A") == height(1, "A")
    assert height(5, "A") > height(4, "A")
    assert height(2, "AB") > height(5, "A")


def test_captions_never_leave_the_sheet_and_are_cut_when_endless():
    def height(prompt: str) -> int:
        return gallery([Panel("T" * 3000, prompt, blocks(1, 128))]).height

    assert height("a dog " * 2) < height("a dog " * 12) <= height("a dog " * 10_000) == height("x" * 60_000)


@pytest.mark.parametrize(
    "images", [np.zeros((0, 4, 4, 3), np.uint8), np.zeros((4, 4, 3), np.uint8), np.zeros((1, 4, 4, 3))]
)
def test_panel_refuses_other_images(images):
    with pytest.raises(ValueError, match=r"uint8 \[N, H, W, 3\] was expected"):
        Panel("", "", images)


def test_gallery_needs_panels():
    with pytest.raises(ValueError, match="at least one"):
        gallery([])


class Page(HTMLParser):
    """Elements, their attributes and all text; unbalanced elements are noticed."""

    VOID = {"img", "meta", "!doctype"}

    def __init__(self, html: str):
        super().__init__()
        self.elements, self.text, self.open = [], "", []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def metric_rows(count: int, **halves: float) -> list[dict[str, float]]:
    rest = {"loss": 1.0, "gradient_norm": 2.0, **dict.fromkeys(MEASURED, 0.1)}
    return [{"step": 5 * i, **halves, **rest} for i in range(count)]


def report(**given) -> str:
    nothing = {"title": "T", "panels": [], "curves": {}, "scores": {}, "times": {}, "facts": {}}
    return report_html(**{**nothing, **given})


def test_report_holds_all_it_is_given(picture):
    html = report_html(
        "A zcx dog",
        [
            Panel("The photos", "a zcx dog", picture[None]),
            Panel("Eight contexts", "a zcx dog in the snow", picture[None]),
        ],
        {
            "base": metric_rows(40, instance_loss=0.1, prior_loss=0.2),
            "super resolution": metric_rows(40, instance_loss=0.1),
        },
        {"leakage": (np.float32(0.0312), "share of class pictures"), "pictures": (12345, "drawn")},
        {"tuning base": 75.4, "sampling": 3.25, "class images": 3661.0},
        {"identifier": "zcx", "ids": [1, 2], "config": {"training": {"num_steps": 200, "x": "y" * 60}}},
        {"name": "a zcx dog", "to sample it": "python -m personalize_jax.sample"},
    )
    page = Page(html)
    assert page.open == []
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert [image["alt"] for image in images] == ["a zcx dog", "a zcx dog in the snow"]
    for image in images:
        data = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"))
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), picture)
    assert [tag for tag, _ in page.elements].count("svg") == 2
    for text in (
        "0.0312",
        "12345",
        "1 min 15 s",
        "3.2 s",
        "1 h 01 min",
        "1 h 02 min",  # of all
        "Total",
        "[1, 2]",
        '"num_steps": 200',
        "prior",
    ):
        assert text in page.text
    order = ("The subject", "personalize_jax.sample", "The photos", "Scores", "Loss curves", "Times", "Facts")
    assert [page.text.index(heading) for heading in order] == sorted(page.text.index(heading) for heading in order)


def test_report_stands_alone(picture):
    html = report(panels=[Panel("T", "a dog", picture[None])], curves={"base": metric_rows(5, instance_loss=0.1)})
    elements = Page(html).elements
    assert not {"script", "link", "iframe", "object", "form", "a"} & {tag for tag, _ in elements}
    for tag, attributes in elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in {"src", "href", "xlink:href", "data", "srcset"} & attributes.keys():
            assert attributes[name].startswith(("data:image/png;base64,", "#")), (tag, name)
    policy = [a["content"] for tag, a in elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy and policy[0].startswith("default-src 'none'")
    assert not re.search(r"url\((?!#)|@import", html)


def test_report_escapes_whatever_it_is_given(picture):
    curves = {NASTY: metric_rows(3, instance_loss=0.1)}
    panels = [Panel(NASTY, f'" onload="x {NASTY}', picture[None], NASTY)]
    facts = {NASTY: NASTY, "config": {NASTY: NASTY}, "short": [NASTY[:8]]}
    page = Page(report_html(NASTY, panels, curves, {NASTY: (NASTY, NASTY)}, {NASTY: 1.0}, facts))
    tags = {tag for tag, _ in page.elements}
    assert "script" not in tags
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.text.count(NASTY) >= 10


def test_report_leaves_out_what_is_empty():
    page = Page(report(curves={"base": [], "other": [{"step": 1, "loss": 1.0}]}))
    assert not {"section", "svg", "table"} & {tag for tag, _ in page.elements}


def test_ids_are_unique_and_known():
    curves = {
        name: metric_rows(30, instance_loss=0.1, prior_loss=0.3) for name in ("base", "super resolution", "third")
    }
    html = report(curves=curves)
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html)) and all(
        (a or b) in ids for a, b in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', html)
    )


def test_report_is_reproducible_and_leaves_matplotlib_alone(picture):
    before = dict(matplotlib.rcParams)
    curves = {"base": metric_rows(10, instance_loss=0.1)}
    assert report(curves=curves) == report(curves=curves)
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("count", [1, 2, 3, 7, 40, 1000])
def test_smooth_keeps_constants_and_length(count):
    np.testing.assert_allclose(smooth(np.full(count, 0.3)), np.full(count, 0.3))


def test_smooth_keeps_slopes_inside_and_removes_noise():
    line = np.linspace(0, 1, 200)
    np.testing.assert_allclose(smooth(line)[40:-40], line[40:-40], atol=1e-9)
    noise = np.random.default_rng(0).normal(size=2000)
    # A Gaussian of deviation s divides the variance of white noise by 2 sqrt(pi) s.
    assert smooth(noise)[300:-300].std() < 2 / np.sqrt(2 * np.sqrt(np.pi) * 100)


def test_metrics_cut_short_are_read_up_to_the_cut(tmp_path):
    rows = metric_rows(3, instance_loss=0.1)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text + text[:20])
    assert read_metrics(tmp_path / "metrics.jsonl") == rows
    assert read_metrics(tmp_path / "missing.jsonl") == []
