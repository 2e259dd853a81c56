"""The results of a sweep: a table with a row for each point, and a figure of parallel coordinates."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from launch.sweep_points import Point, varied
from personalize_jax.evaluation import metric_registry
from personalize_jax.metrics.similarity import Estimate
from personalize_jax.metrics.table import cell
from personalize_jax.runtime.files import replacing, write_text

MAX_TICKS = 8


class Result(NamedTuple):
    """The result of a point.

    Attributes:
        point: the point as it was last run.
        metrics: means over subjects; empty if it failed.
        status: "done", "stopped early", or the reason why it failed.
    """

    point: Point
    metrics: Mapping[str, Estimate]
    status: str


def ranked(results: Sequence[Result], metric: str) -> list[Result]:
    """The results that have a metric, the best first; equal ones stay in their order."""
    sign = 1 if _lower_is_better(metric) else -1
    return sorted((r for r in results if metric in r.metrics), key=lambda r: sign * r.metrics[metric].mean)


def write(results: Sequence[Result], metric: str, num_subjects: int, folder: Path) -> str:
    """Write `table.csv`, `table.md` and `figure.png`.

    Args:
        results: results in the order of the table.
        metric: the metric by which points are compared, and which colours the figure.
        num_subjects: number of subjects of the means.
        folder: folder of the files.

    Returns:
        The table as Markdown.
    """
    text = markdown(results, metric, num_subjects)
    write_text(folder / "table.md", text)
    write_text(folder / "table.csv", comma_separated(results, num_subjects))
    if ranked(results, metric):
        with replacing(folder / "figure.png") as temporary:
            plot(results, metric).savefig(temporary, format="png")
    return text


def markdown(results: Sequence[Result], metric: str, num_subjects: int) -> str:
    """The table as Markdown, with the metrics of the registry; the best point is bold."""
    metrics = _common_metrics(results, [known.name for known in metric_registry.METRICS], metric)
    columns = varied([result.point for result in results])
    best = ranked(results, metric)[:1]
    header = [*columns, *metrics, "status"]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for i, result in enumerate(results):
        cells = [_markdown_cell(values[i]) for values in columns.values()]
        for name in metrics:
            text = cell(result.metrics[name]) if name in result.metrics else ""
            cells.append(f"**{text}**" if name == metric and result in best else text)
        lines.append("| " + " | ".join([*cells, _markdown_cell(result.status)]) + " |")
    intervals = ", with 95 % bootstrap intervals over them" if num_subjects > 1 else ""
    text = f"Means over {num_subjects} subject{'s'[: num_subjects > 1]}{intervals}.\n\n" + "\n".join(lines) + "\n"
    return text + "".join(f"\nBest by {metric}: {result.point.name}\n" for result in best)


def comma_separated(results: Sequence[Result], num_subjects: int) -> str:
    """The table as CSV, with all metrics, and the ends of their intervals where there are several subjects."""
    metrics = dict.fromkeys(name for result in results for name in result.metrics)
    parts = Estimate._fields if num_subjects > 1 else ("mean",)
    columns = varied([result.point for result in results])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    metric_columns = [name if part == "mean" else f"{name} {part}" for name in metrics for part in parts]
    writer.writerow(["point", *columns, *metric_columns, "status"])
    for i, result in enumerate(results):
        overrides = [values[i] for values in columns.values()]
        estimates = [result.metrics.get(name) for name in metrics]
        numbers = ["" if e is None else f"{getattr(e, part):.6g}" for e in estimates for part in parts]
        writer.writerow([result.point.name, *overrides, *numbers, result.status])
    return text.getvalue()


def plot(results: Sequence[Result], metric: str) -> Figure:
    """A line for each scored point, over an axis for each override and metric, coloured by one metric."""
    scored = ranked(results, metric)
    metrics = _common_metrics(scored, [known.name for known in metric_registry.METRICS if known.in_figure], metric)
    columns = varied([result.point for result in scored])
    columns |= {name: [result.metrics[name].mean for result in scored] for name in metrics}
    figure = Figure(figsize=(1.4 * len(columns) + 1.6, 4.0), layout="constrained", dpi=100)
    axes = figure.subplots()
    means = [result.metrics[metric].mean for result in scored]
    colours = ScalarMappable(Normalize(min(means), max(means)), matplotlib.colormaps["viridis"])
    heights = []
    for x, values in enumerate(columns.values()):
        axis_heights, ticks = _axis_heights(values)
        heights.append(axis_heights)
        axes.axvline(x, color="#999999", linewidth=0.8)
        for height, label in ticks.items():
            axes.annotate(label, (x, height), (3, 0), textcoords="offset points", fontsize=7, va="center")
    for value, line in reversed(list(zip(means, zip(*heights, strict=True), strict=True))):  # the best on top
        axes.plot(range(len(columns)), line, color=colours.to_rgba(value), marker="o", markersize=3)
    names = [f"{name}\n(lower is better)" if _lower_is_better(name) else name.replace(".", ".\n") for name in columns]
    axes.set_xticks(range(len(columns)), names, fontsize=8)
    axes.set_yticks([])
    axes.set_ylim(-0.05, 1.05)
    axes.spines[:].set_visible(False)
    figure.colorbar(colours, ax=axes, label=metric)
    return figure


def _lower_is_better(column: str) -> bool:
    return metric_registry.better(column) == "lower"


def _common_metrics(results: Sequence[Result], names: Sequence[str], metric: str) -> list[str]:
    """Those of some metrics, and of the metric of comparison, that all scored results have."""
    scored = [result.metrics for result in results if result.metrics]
    return [name for name in dict.fromkeys((*names, metric)) if scored and all(name in m for m in scored)]


def _axis_heights(values: Sequence[Any]) -> tuple[list[float], dict[float, str]]:
    """Heights in [0, 1] of values on an axis, and labels by height; text has a height for each value."""
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    positions = np.array(values if numeric else [list(map(str, values)).index(str(value)) for value in values], float)
    if numeric and min(positions) > 0 and max(positions) / min(positions) >= 8:
        positions = np.log(positions)
    low, span = positions.min(), np.ptp(positions)
    heights = ((positions - low) / span if span else np.full(len(positions), 0.5)).tolist()
    labels = {height: f"{value:.3g}" if numeric else str(value) for height, value in zip(heights, values, strict=True)}
    if numeric and len(labels) > MAX_TICKS:
        labels = {height: labels[height] for height in (min(labels), max(labels))}
    return heights, labels


def _markdown_cell(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())
