"""The registry of metrics, from which everything that lists metrics takes them.

A new metric is a file that ends with a `Metric`, and a line of METRICS; its encoder, if new, a line of
`scoring.ENCODERS`.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping

from personalize_jax.metrics import clip_i, clip_t, dino, div, pres
from personalize_jax.metrics.metric import Metric
from personalize_jax.metrics.table import Better
from personalize_jax.world import exact_metrics

METRICS: tuple[Metric, ...] = (  # in the order of tables
    dino.METRIC,
    clip_i.METRIC,
    clip_t.METRIC,
    pres.METRIC,
    div.METRIC,
    *exact_metrics.METRICS,
)
SUFFIXES = {"photo": " (real)", "class before": " before"}  # of columns with the scores of photos, or of "class before"


def metrics_for(encoders: Iterable[str]) -> list[Metric]:
    """The metrics that some encoders can measure, in order.

    With a second encoder of a kind, such as "clip (large)" beside "clip", there is a second metric, "CLIP-I (large)".

    Args:
        encoders: names of encoders, as in `Metric.needs`.
    """
    names = list(encoders)
    further = [name for name in names if " " in name]
    metrics = []
    for metric in METRICS:
        metrics.append(metric)
        for name in further:
            kind, _, label = name.partition(" ")
            if kind in metric.needs:
                needs = tuple(name if need == kind else need for need in metric.needs)
                metrics.append(dataclasses.replace(metric, name=f"{metric.name} {label}", needs=needs))
    return [metric for metric in metrics if set(metric.needs) <= set(names)]


def metric_versions(encoders: Iterable[str]) -> dict[str, int]:
    """The versions of the metrics of `metrics_for` that score pictures, by name; others follow from their scores."""
    return {metric.name: metric.version for metric in metrics_for(encoders) if metric.derive is None}


def up_to_date(recorded: Mapping[str, int], encoders: Iterable[str]) -> bool:
    """Whether scores of pictures are those of `metric_versions`, so that none need be made again.

    Args:
        recorded: the versions of the metrics that the scores are of, by name; derived ones do not matter.
        encoders: as for `metrics_for`.
    """
    derived = {metric.name for metric in METRICS if metric.derive is not None}
    return {name: recorded[name] for name in recorded if name not in derived} == metric_versions(encoders)


def column_metric(column: str) -> Metric | None:
    """The metric of a column: CLIP-I of "CLIP-I (large) (real)", PRES of "PRES before"; None if it has no metric."""
    name = re.sub(r"( \(.*\))?( before)?$", "", column)
    return next((metric for metric in METRICS if metric.name == name), None)


def better(column: str) -> Better | None:
    """Which way of a column is better; None for neither, or where it has no metric."""
    metric = column_metric(column)
    return metric.better if metric else None


def table_columns(table: str, columns: Iterable[str]) -> list[str]:
    """The columns of one table of an experiment: its metrics in order, then those of further encoders.

    Args:
        table: see `Metric.table`; columns without a metric, such as an experiment's own, stand in "similarity".
        columns: the columns of all tables.
    """
    columns = [column for column in columns if not column.endswith(tuple(SUFFIXES.values()))]
    listed = [metric.name for metric in METRICS if metric.table == table and metric.name in columns]

    def belongs(column: str) -> bool:
        metric = column_metric(column)
        return (metric.table if metric else "similarity") == table

    return listed + [column for column in columns if column not in listed and belongs(column)]


def markdown() -> str:
    """All metrics as a Markdown table, for documents."""
    lines = ["| metric | what | unit | better | read by |", "|---|---|---|---|---|"]
    for metric in METRICS:
        section = f" (section {metric.section})" if metric.section else ""
        cells = (
            metric.name,
            metric.definition + section,
            metric.unit,
            metric.better or "neither",
            ", ".join(metric.needs),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
