"""What a run shows of itself: a contact sheet, and a page to read."""

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

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps

from personalize_jax.pipeline.pictures import encode_png

COLUMNS = 8
SMOOTH_FROM = 64  # smaller pictures are enlarged as squares, so that each of their pixels can be seen

_BLACK, _GREY = "#1c1c1c", "#6a6a6a"
_CURVES = {"instance": "#3b82c4", "prior": "#d9822b"}  # on white and on black alike
_INK = "#010203"  # stands for the page's text colour while Matplotlib draws


@dataclass(frozen=True, eq=False)
class Panel:
    """Pictures of one prompt. Neighbouring panels of the same title stand under one heading.

    Attributes:
        title: the heading, such as "A [V] dog in eight contexts".
        prompt: what the pictures were drawn from; stands below them.
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


def gallery(panels: Sequence[Panel], cell: int = 128) -> Image.Image:
    """A contact sheet on white: headings, and below them panels that flow from left to right, as many as fit a line.

    Pictures keep their proportions. From 64 pixels on they are scaled bicubically; smaller ones are enlarged without
    smoothing. The heading says so.

    Args:
        panels: one or more; a panel of more than 8 pictures is wrapped.
        cell: side of the square that each picture is scaled to, in pixels; the type grows with it.
    """
    if not panels:
        raise ValueError("no panels were given; a gallery needs at least one")
    groups = [_group_sheet(title, group, cell) for title, group in _groups(panels)]
    return ImageOps.expand(_join(groups, cell // 3, down=True), border=cell // 4, fill="white")


def report_html(
    title: str,
    panels: Sequence[Panel],
    curves: Mapping[str, Sequence[Mapping[str, float]]],
    scores: Mapping[str, tuple[float | str, str]],
    times: Mapping[str, float],
    facts: Mapping[str, object],
    subject: Mapping[str, object] | None = None,
) -> str:
    """One self-contained HTML page: pictures, loss curves and styles are part of it, and it asks for nothing else.

    Args:
        title: of the page.
        panels: as for `gallery`.
        curves: rows of metrics (see `read_metrics`) by name of the training, such as "base".
        scores: (value, what it means) by name of the metric.
        times: seconds by phase, in order.
        facts: values by name; mappings and sequences are shown as JSON, which unfolds if it is long.
        subject: likewise, what comes first: who is shown, and how to draw them.
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
    body = "".join(
        f"<section><h2>{escape(h)}</h2><div>{content}</div></section>\n" for h, content in sections if content
    )
    return f"{_HEAD.format(title=escape(title), style=_STYLE)}<h1>{escape(title)}</h1>\n{body}</main>\n</html>\n"


def read_metrics(file: Path) -> list[dict[str, float]]:
    """The rows of a `metrics.jsonl`; a last line cut short by a kill is left out, a missing file has no rows."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _groups(panels: Sequence[Panel]) -> Iterator[tuple[str, list[Panel]]]:
    return ((title, list(group)) for title, group in itertools.groupby(panels, lambda panel: panel.title))


def _group_sheet(title: str, panels: Sequence[Panel], cell: int) -> Image.Image:
    """A heading and the lines of panels below it."""
    gap = cell // 8
    limit = COLUMNS * cell + (COLUMNS - 1) * gap
    lines: list[list[Image.Image]] = [[]]
    for sheet in (_panel_sheet(panel, cell) for panel in panels):
        if lines[-1] and sum(s.width + gap for s in lines[-1]) + sheet.width > limit:
            lines.append([])
        lines[-1].append(sheet)
    scalings = ", ".join(dict.fromkeys(note for panel in panels if (note := _scaling(panel.images, cell))))
    width = max(sum(s.width + gap for s in line) - gap for line in lines)
    heading = [_text(title, cell, width, size=0.15, bold=True)] + [_text(scalings, cell, width, colour=_GREY)] * bool(
        scalings
    )
    return _join([_join(heading, 0, down=True), *(_join(line, gap, down=False) for line in lines)], gap, down=True)


def _panel_sheet(panel: Panel, cell: int) -> Image.Image:
    """Pictures in a grid whose rows are as equal as can be, with the prompt and the note below."""
    gap = max(cell // 32, 1)
    rows = math.ceil(len(panel.images) / COLUMNS)
    columns = math.ceil(len(panel.images) / rows)
    cells = [_scaled(pixels, cell) for pixels in panel.images]
    lines = [_join(cells[i : i + columns], gap, down=False) for i in range(0, len(cells), columns)]
    pictures = _join(lines, gap, down=True)
    texts = ((panel.prompt, _BLACK), (panel.note, _GREY))
    captions = [_text(text, cell, pictures.width, colour=colour) for text, colour in texts if text.strip()]
    return _join([pictures, *captions], gap, down=True)


def _scaled(pixels: np.ndarray, cell: int) -> Image.Image:
    image = Image.fromarray(pixels)
    method = Image.Resampling.BICUBIC if max(image.size) >= SMOOTH_FROM else Image.Resampling.NEAREST
    return ImageOps.pad(image, (cell, cell), method, color="white")


def _scaling(images: np.ndarray, cell: int) -> str:
    """What was done to pictures so that they fill their cells; nothing is said of nothing."""
    height, width = images.shape[1:3]
    side = max(height, width)
    if side == cell:
        return ""
    how = "reduced" if side > cell else "enlarged" if side >= SMOOTH_FROM else "enlarged without smoothing"
    return f"{width} × {height} pixels, {how}"


def _join(images: Sequence[Image.Image], gap: int, down: bool) -> Image.Image:
    """Images below one another, or beside one another, on white; flush left, or flush at the top."""
    lengths = [image.height if down else image.width for image in images]
    length = sum(lengths) + gap * (len(images) - 1)
    breadth = max(image.width if down else image.height for image in images)
    sheet = Image.new("RGB", (breadth, length) if down else (length, breadth), "white")
    for i, image in enumerate(images):
        start = sum(lengths[:i]) + gap * i
        sheet.paste(image, (0, start) if down else (start, 0))
    return sheet


def _text(text: str, cell: int, width: int, size: float = 0.1, bold: bool = False, colour: str = _BLACK) -> Image.Image:
    """Lines of text on white, `width` pixels wide; the size is a share of the cell."""
    pixels = max(round(size * cell), 9)
    font = _font(pixels, bold)
    lines = _wrap(" ".join(text.split()), font, width)
    leading = round(1.4 * pixels)
    sheet = Image.new("RGB", (width, leading * len(lines)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        draw.text((0, i * leading + leading // 2), line, colour, font, anchor="lm")
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, max_lines: int = 4) -> list[str]:
    """Lines no wider than `width`, broken at spaces where there are any; an ellipsis ends what is cut."""
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
    # The file that Matplotlib brings along, so that sheets look alike on every machine.
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
    """The losses of one training, as logged and smoothed, as inline SVG in the colour of the page's text."""
    style = {"svg.fonttype": "none", "svg.hashsalt": name, "text.color": _INK, "axes.edgecolor": _INK}
    style |= {"axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "font.size": 11}
    with matplotlib.rc_context(style):
        axes = (figure := Figure(figsize=(4.8, 2.7), layout="constrained")).add_subplot()
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
    """Gaussian running mean of [N] values, normalised at the ends; its deviation is N / 20 rows."""
    deviation = len(values) / 20
    offsets = np.arange(-int(3 * deviation), int(3 * deviation) + 1)
    kernel = np.exp(-0.5 * (offsets / deviation) ** 2)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _table(rows: Iterable[Sequence[str]]) -> str:
    """Rows of a name, which is escaped, and cells, which are HTML; nothing without rows."""
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


# Nothing but the page itself may be loaded, whatever a prompt or a file name holds.
_HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
<main>
"""

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --soft: #666; --rule: #ddd; --page: #fff; --cell: min(8.5rem, 29vw) }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --soft: #a0a0a0; --rule: #3a3a3a; --page: #151515 } }
body { margin: 0; background: var(--page); color: var(--ink); font: 1rem/1.5 system-ui, sans-serif }
main { max-width: 74rem; margin: 0 auto; padding: 1.5rem 1rem 4rem }
h1 { font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2.5rem 0 1rem; padding-top: .75rem; border-top: 1px solid var(--rule) }
section > div { display: flex; flex-wrap: wrap; gap: 1.5rem 1rem; overflow-x: auto }
figure { margin: 0; width: calc(var(--n) * (var(--cell) + .25rem) - .25rem); max-width: 100% }
.pictures { display: grid; gap: .25rem; grid-template-columns: repeat(auto-fill, minmax(calc(var(--cell) - 1px), 1fr)) }
img, svg { display: block; width: 100%; height: auto }
svg text { font-family: inherit !important }
figcaption { margin-top: .4rem; font-size: .875rem; line-height: 1.4; overflow-wrap: anywhere }
small { display: block; color: var(--soft) }
th, td { padding: .3rem 1.25rem .3rem 0; text-align: left; vertical-align: top; font-variant-numeric: tabular-nums }
th { font-weight: normal; color: var(--soft) }
pre { margin: .5rem 0; white-space: pre-wrap; overflow-wrap: anywhere }
"""
