"""The registry of metrics: everything that lists metrics asks it.

A new metric is a file that ends with a `Metric`, and a line of METRICS; its encoder, if new, a line of
`scoring.ENCODERS`.
"""

import dataclasses
import re
from collections.abc import Iterable

from personalize_jax.metrics import clip_i, clip_t, dino, div, pres
from personalize_jax.metrics.metric import Metric
from personalize_jax.world import exact_metrics

METRICS: tuple[Metric, ...] = (  # in the order of tables
    dino.METRIC,
    clip_i.METRIC,
    clip_t.METRIC,
    pres.METRIC,
    div.METRIC,
    *exact_metrics.METRICS,
)
SUFFIXES = {"photo": " (real)", "class before": " before"}  # of the columns that hold the scores of other pictures


def measured(encoders: Iterable[str]) -> list[Metric]:
    """The metrics that can be measured, in order.

    Where there are several encoders of a kind, "clip" and "clip (large)", those of the second are metrics of their own,
    such as "CLIP-I (large)".

    Args:
        encoders: names of encoders, by which metrics need them.
    """
    names = list(encoders)
    further = [name for name in names if " " in name]
    found = []
    for metric in METRICS:
        found.append(metric)
        for name in further:
            kind, _, label = name.partition(" ")
            if kind in metric.needs:
                needs = tuple(name if need == kind else need for need in metric.needs)
                found.append(dataclasses.replace(metric, name=f"{metric.name} {label}", needs=needs))
    return [metric for metric in found if set(metric.needs) <= set(names)]


def definitions(encoders: Iterable[str]) -> dict[str, int]:
    """The version of each metric that is measured: scores of other versions, or of fewer metrics, are out of date."""
    return {metric.name: metric.version for metric in measured(encoders)}


def metric_of(column: str) -> Metric | None:
    """The metric of a column: CLIP-I of "CLIP-I (large) (real)", PRES of "PRES before"; None if it is no metric's."""
    name = re.sub(r"( \(.*\))?( before)?$", "", column)
    return next((metric for metric in METRICS if metric.name == name), None)


def columns_of(table: str, columns: Iterable[str]) -> list[str]:
    """Which columns a table of an experiment has: its metrics in order, then those of further encoders.

    Args:
        table: see `Metric.table`; columns of no metric, such as an experiment's own, stand in "similarity".
        columns: names of all that was measured.
    """
    columns = [column for column in columns if not column.endswith(tuple(SUFFIXES.values()))]
    listed = [metric.name for metric in METRICS if metric.table == table and metric.name in columns]

    def belongs(column: str) -> bool:
        metric = metric_of(column)
        return (metric.table if metric else "similarity") == table

    return listed + [column for column in columns if column not in listed and belongs(column)]


def markdown() -> str:
    """A table of all metrics, for documents."""
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
