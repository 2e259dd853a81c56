"""The gallery and the report of a run: a contact sheet of pictures, and an HTML page."""

import base64
import functools
import io
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from personalize_jax.pipeline.pictures import encode_png
from personalize_jax.runtime.files import ASSETS

CELL = 128  # pixels; side of the square into which the gallery scales each picture
COLUMNS = 8
SMOOTH_FROM = 64  # pixels; smaller pictures are enlarged without smoothing, so that each pixel can be seen


_BLACK, _GREY = "#1c1c1c", "#6a6a6a"
_CURVES = {"instance": "#3b82c4", "prior": "#d9822b"}  # visible on white and on black
_INK = "#010203"  # Matplotlib's colour where the page is to have its text colour


@dataclass(frozen=True, eq=False)
class Panel:
    """Pictures of one prompt. Consecutive panels of the same title share a heading.

    Attributes:
        title: the heading, such as "A [V] dog in eight contexts".
        prompt: the prompt, which stands below the pictures.
        images: uint8 [N, H, W, 3], N >= 1.
        note: an additional remark.
    """

    title: str
    prompt: str
    images: np.ndarray
    note: str = ""

    def __post_init__(self) -> None:
        shape = self.images.shape
        if self.images.dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3 or 0 in shape:
            raise ValueError(f"images are {self.images.dtype} {list(shape)}; uint8 [N, H, W, 3] was expected, N > 0")


def gallery(panels: Sequence[Panel]) -> Image.Image:
    """A contact sheet on white: headings, and below each its panels from left to right, as many a line as fit.

    Pictures keep their proportions. From 64 pixels on they are scaled bicubically; smaller ones are enlarged without
    smoothing. The heading tells the scaling. A panel of more than 8 pictures is wrapped.
    """
    if not panels:
        raise ValueError("no panels were given; a gallery needs at least one")
    groups = [_group_sheet(title, group) for title, group in _groups(panels)]
    return ImageOps.expand(_join(groups, CELL // 3, down=True), border=CELL // 4, fill="white")


def report_html(
    title: str,
    panels: Sequence[Panel],
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    scores: Mapping[str, tuple[float | str, str]],
    times: Mapping[str, float],
    facts: Mapping[str, object],
    subject: Mapping[str, object] | None = None,
) -> str:
    """A self-contained HTML page: it includes pictures, loss curves and styles, and loads nothing else.

    Args:
        title: the page's title.
        panels: as for `gallery`.
        curves: rows of metrics (see `read_metrics`) by name of the training, such as "base".
        scores: (value, definition) by name of the metric.
        times: seconds by phase, in order.
        facts: values by name; mappings and sequences are shown as JSON, which is folded if it is long.
        subject: facts about the subject, shown first.
    """
    total = {"Total": sum(times.values())} if len(times) > 1 else {}
    sections = [
        ("The subject", _table((name, _fact(value)) for name, value in (subject or {}).items())),
        *((heading, "".join(map(_figure, group))) for heading, group in _groups(panels)),
        ("Scores", _table((name, _number(value), escape(meaning)) for name, (value, meaning) in scores.items())),
        ("Loss curves", "".join(_curve_figure(name, rows) for name, rows in curves.items())),
        ("Times", _table((phase, _duration(seconds)) for phase, seconds in {**times, **total}.items())),
        ("Facts", _table((name, _fact(value)) for name, value in facts.items())),
    ]
    html = "".join(
        f"<section><h2>{escape(h)}</h2><div>{content}</div></section>\n" for h, content in sections if content
    )
    return Template((ASSETS / "report.html").read_text()).substitute(title=escape(title), sections=html)


def read_metrics(file: Path) -> list[dict[str, float]]:
    """The rows of a `metrics.jsonl`; an incomplete last line is left out, a missing file has no rows."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _groups(panels: Sequence[Panel]) -> Iterator[tuple[str, list[Panel]]]:
    return ((title, list(group)) for title, group in itertools.groupby(panels, lambda panel: panel.title))


def _group_sheet(title: str, panels: Sequence[Panel]) -> Image.Image:
    """A heading and the lines of panels below it."""
    gap = CELL // 8
    limit = COLUMNS * CELL + (COLUMNS - 1) * gap
    lines: list[list[Image.Image]] = [[]]
    for sheet in map(_panel_sheet, panels):
        if lines[-1] and sum(s.width + gap for s in lines[-1]) + sheet.width > limit:
            lines.append([])
        lines[-1].append(sheet)
    scalings = ", ".join(dict.fromkeys(note for panel in panels if (note := _scaling(panel.images))))
    width = max(sum(s.width + gap for s in line) - gap for line in lines)
    heading = [_text(title, width, pixels=19, bold=True)]
    if scalings:
        heading.append(_text(scalings, width, colour=_GREY))
    return _join([_join(heading, 0, down=True), *(_join(line, gap, down=False) for line in lines)], gap, down=True)


def _panel_sheet(panel: Panel) -> Image.Image:
    """Pictures in a grid of nearly equal rows, with the prompt and the note below."""
    gap = CELL // 32
    rows = math.ceil(len(panel.images) / COLUMNS)
    columns = math.ceil(len(panel.images) / rows)
    cells = [_scaled(pixels) for pixels in panel.images]
    lines = [_join(cells[i : i + columns], gap, down=False) for i in range(0, len(cells), columns)]
    pictures = _join(lines, gap, down=True)
    texts = ((panel.prompt, _BLACK), (panel.note, _GREY))
    captions = [_text(text, pictures.width, colour=colour) for text, colour in texts if text.strip()]
    return _join([pictures, *captions], gap, down=True)


def _scaled(pixels: np.ndarray) -> Image.Image:
    image = Image.fromarray(pixels)
    method = Image.Resampling.BICUBIC if max(image.size) >= SMOOTH_FROM else Image.Resampling.NEAREST
    return ImageOps.pad(image, (CELL, CELL), method, color="white")


def _scaling(images: np.ndarray) -> str:
    """How pictures are scaled to fill their cells, in words; empty if they are not."""
    height, width = images.shape[1:3]
    side = max(height, width)
    if side == CELL:
        return ""
    scaling = "reduced" if side > CELL else "enlarged" if side >= SMOOTH_FROM else "enlarged without smoothing"
    return f"{width} × {height} pixels, {scaling}"


def _join(images: Sequence[Image.Image], gap: int, down: bool) -> Image.Image:
    """Images in a column, or in a row, on white; aligned left, or at the top."""
    lengths = [image.height if down else image.width for image in images]
    length = sum(lengths) + gap * (len(images) - 1)
    breadth = max(image.width if down else image.height for image in images)
    sheet = Image.new("RGB", (breadth, length) if down else (length, breadth), "white")
    for i, image in enumerate(images):
        start = sum(lengths[:i]) + gap * i
        sheet.paste(image, (0, start) if down else (start, 0))
    return sheet


def _text(text: str, width: int, pixels: int = 13, bold: bool = False, colour: str = _BLACK) -> Image.Image:
    """Lines of text on white, `width` pixels wide, in a font of `pixels`."""
    font = _font(pixels, bold)
    lines = _wrap(" ".join(text.split()), font, width)
    leading = round(1.4 * pixels)
    sheet = Image.new("RGB", (width, leading * len(lines)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        draw.text((0, i * leading + leading // 2), line, colour, font, anchor="lm")
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int = 4) -> list[str]:
    """Lines no wider than `width`, broken at spaces where possible; text that is cut ends in an ellipsis."""
    lines = [""]
    for word in re.findall(r"\S+\s*", text):
        if lines[-1] and font.getlength((lines[-1] + word).rstrip()) > width:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength((lines[-1] + letter).rstrip()) > width:
                lines.append("")
            lines[-1] += letter
        if len(lines) > max_lines:
            return [*lines[: max_lines - 1], lines[max_lines - 1].rstrip()[:-1] + "…"]
    return lines


@functools.cache
def _font(size: int, bold: bool) -> ImageFont.FreeTypeFont:
    import matplotlib  # slow to import, and needed only once a run is finished

    # The font that Matplotlib ships, so that sheets look alike on every machine.
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", name), size)


def _figure(panel: Panel) -> str:
    count, height, width = panel.images.shape[:3]
    style = "pixelated" if max(height, width) < SMOOTH_FROM else "auto"
    pictures = "".join(
        f'<img width="{width}" height="{height}" alt="{escape(panel.prompt or panel.title)}" loading="lazy" '
        f'src="data:image/png;base64,{base64.b64encode(encode_png(pixels, {})).decode()}">'
        for pixels in panel.images
    )
    note = f"<small>{escape(panel.note)}</small>" if panel.note else ""
    return (
        f'<figure style="--n:{min(count, COLUMNS)};image-rendering:{style}"><div class="pictures">{pictures}</div>'
        f"<figcaption>{escape(panel.prompt)} {note}</figcaption></figure>"
    )


def _curve_figure(name: str, rows: Sequence[Mapping[str, float]]) -> str:
    """The losses of one training, logged and smoothed, as inline SVG in the colour of the page's text."""
    import matplotlib  # see `_font`
    from matplotlib.figure import Figure

    with matplotlib.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": name,
            "font.size": 11,
            "text.color": _INK,
            "axes.edgecolor": _INK,
            "axes.labelcolor": _INK,
            "xtick.color": _INK,
            "ytick.color": _INK,
        }
    ):
        figure = Figure(figsize=(4.8, 2.7), layout="constrained")
        axes = figure.add_subplot()
        for group, colour in _CURVES.items():
            curve = np.array([(row["step"], row[key]) for row in rows if (key := f"{group}_loss") in row])
            if len(curve):
                steps, losses = curve.T
                axes.plot(steps, losses, color=colour, linewidth=1, alpha=0.3)
                axes.plot(steps, smooth(losses), color=colour, linewidth=2, label=group)
        if not axes.lines:
            return ""
        axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color=_INK, alpha=0.12)
        axes.legend(frameon=False)
        figure.savefig(
            svg := io.StringIO(),
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
        )
    drawing = svg.getvalue().replace(_INK, "currentColor")
    drawing = re.sub(r' id="[a-z][\w.]*_\d+"', "", drawing[drawing.index("<svg") :])  # an id may occur once in a page
    return (
        f'<figure style="--n:3">{drawing}<figcaption>{escape(name)} '
        "<small>Thin: as logged. Thick: smoothed over a twentieth of the rows.</small></figcaption></figure>"
    )


def smooth(values: np.ndarray) -> np.ndarray:
    """Gaussian running mean of N values, normalised at the ends; its standard deviation is N / 20 values."""
    deviation = len(values) / 20
    offsets = np.arange(-int(3 * deviation), int(3 * deviation) + 1)
    kernel = np.exp(-0.5 * (offsets / deviation) ** 2)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _table(rows: Iterable[Sequence[str]]) -> str:
    """Rows of a name, which is escaped, and cells, which are HTML; empty without rows."""
    lines = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for name, *cells in rows
    )
    return f"<table>{lines}</table>" if lines else ""


def _number(value: float | str) -> str:
    return escape(str(value)) if isinstance(value, str | int) else f"{value:.3g}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def _fact(value: object) -> str:
    if isinstance(value, str) or not isinstance(value, Mapping | Sequence):
        return escape(str(value))
    if len(line := json.dumps(value, ensure_ascii=False, default=str)) <= 60:
        return escape(line)
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    return f"<details><summary>show</summary><pre>{escape(text)}</pre></details>"
