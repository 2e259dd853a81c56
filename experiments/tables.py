"""Tables and figure of an experiment: its arms beside the paper's rows, and whether its findings hold."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from personalize_jax.evaluation import metric_registry
from personalize_jax.metrics.table import (
    Entry,
    Estimate,
    SubjectScores,
    Table,
    cell,
    comma_separated,
    difference,
    entries,
    markdown,
)
from personalize_jax.runtime.files import replacing, write_text


class Finding(NamedTuple):
    """An expectation: a metric is greater in one arm than in another.

    Attributes:
        claim: the finding in words.
        metric: name of the metric.
        greater: name of the arm in which it is greater.
        less: name of the arm in which it is less.
    """

    claim: str
    metric: str
    greater: str
    less: str


def write(
    scores: Mapping[str, SubjectScores],
    findings: Sequence[Finding],
    paper: Mapping[str, Mapping[str, float]],
    folder: Path,
) -> str:
    """Write `tables.md`, `tables.csv`, `subjects.csv` and `figure.png`.

    Args:
        scores: scores of the subjects by arm.
        findings: expected findings.
        paper: the paper's own rows.
        folder: folder of the files.

    Returns:
        The tables as Markdown.
    """
    table = {arm: entries(arm_scores, metric_registry.better) for arm, arm_scores in scores.items()}
    text = tables(table, paper, len(next(iter(scores.values()))))
    if findings:
        text += "\n" + findings_table(scores, findings)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "tables.md", text)
    write_text(folder / "tables.csv", comma_separated(table))
    write_text(folder / "subjects.csv", subjects_csv(scores))
    with replacing(folder / "figure.png") as temporary:
        plot(table).savefig(temporary, format="png")
    return text


def tables(table: Table, paper: Mapping[str, Mapping[str, float]], num_subjects: int) -> str:
    """Markdown tables of the similarities, with the paper's own rows, and of the exact metrics that were measured."""
    first = next(iter(table.values()))
    measured = dict.fromkeys(name for metrics in table.values() for name in metrics)
    real = {name.removesuffix(" (real)"): value for name, value in first.items() if name.endswith(" (real)")}
    quoted = {
        f"paper: {row}": {name: Entry(Estimate(value, value, value)) for name, value in values.items()}
        for row, values in paper.items()
    }
    compared = {"real pictures": real, **table, **quoted}
    text = (
        f"Means over {num_subjects} subjects, with 95 % bootstrap intervals over them and the worst subject's value.\n"
    )
    for name, rows in (("similarity", compared), ("subject", table), ("class", table)):
        if columns := metric_registry.table_columns(name, measured):
            text += "\n" + markdown(rows, columns)
    return text


def subjects_csv(scores: Mapping[str, SubjectScores]) -> str:
    """The values of every subject as CSV: arm, subject, metric, value."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["arm", "subject", "metric", "value"])
    for arm, subjects in scores.items():
        for subject, metrics in subjects.items():
            writer.writerows([arm, subject, metric, f"{value:.6g}"] for metric, value in metrics.items())
    return text.getvalue()


def findings_table(scores: Mapping[str, SubjectScores], findings: Sequence[Finding]) -> str:
    """A Markdown table of the findings, each with the difference, subject by subject, and whether it holds.

    Findings about metrics that were not measured, such as exact ones of real pictures, are left out.
    """
    lines = ["| finding | metric | difference | holds |", "|---|---|---|---|"]
    for finding in findings:
        if not all(any(finding.metric in m for m in scores[arm].values()) for arm in (finding.greater, finding.less)):
            continue
        estimate = difference(scores[finding.greater], scores[finding.less], finding.metric)
        lines.append(f"| {finding.claim} | {finding.metric} | {cell(estimate)} | {verdict(estimate)} |")
    return "\n".join(lines) + "\n"


def verdict(difference: Estimate) -> str:
    """Whether a difference that is expected to be positive is so: its interval excludes zero."""
    if difference.low > 0:
        return "yes"
    return "no, the opposite" if difference.high < 0 else "undecided"


def plot(table: Table) -> Figure:
    """A panel for each metric: the arms from top to bottom, with their intervals."""
    in_figure = [metric.name for metric in metric_registry.METRICS if metric.in_figure]
    shown = [name for name in in_figure if any(name in metrics for metrics in table.values())]
    columns = min(4, len(shown))
    lines = -(-len(shown) // columns)
    height = 0.28 * len(table) + 0.9
    figure = Figure(figsize=(2.4 * columns + 1.6, height * lines), layout="constrained", dpi=100)
    panels = np.ravel(figure.subplots(lines, columns, sharey=True, squeeze=False))
    for empty in panels[len(shown) :]:
        empty.set_axis_off()
    for axes, metric in zip(panels, shown, strict=False):
        for y, metrics in enumerate(table.values()):
            if metric in metrics:
                mean, low, high = metrics[metric].estimate
                axes.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", color="#3b82c4", capsize=3)
        axes.set_title(metric, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(axis="x", alpha=0.3)
        axes.set_yticks(range(len(table)), list(table), fontsize=8)
        axes.set_ylim(len(table) - 0.5, -0.5)
    return figure
