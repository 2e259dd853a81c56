"""Turns scores of pictures into tables: a value for each subject, means over subjects with intervals, differences."""

import csv
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from personalize_jax.metrics.similarity import Estimate, interval

Scores = dict[str, float | str]
SubjectScores = dict[str, dict[str, float]]  # by subject, then by metric
Better = Literal["higher", "lower"]  # which way of a metric is better


class Row(NamedTuple):
    """A picture and its scores.

    Attributes:
        subject: the subject's name; intervals are taken over subjects.
        role: "photo" (real), "subject" (sampled with the identifier), "class" (sampled without it) or "class before"
            (sampled from the pretrained cascade).
        prompt: the prompt, with "[V]" for the identifier; empty for a photo.
        seed: the picture's seed; None where it is not known.
        file: the picture's file.
        scores: the score by each metric: a number, or a category as text.
    """

    subject: str
    role: str
    prompt: str
    seed: int | None
    file: str
    scores: Scores


class Worst(NamedTuple):
    """The worst value of a metric over subjects, and the subject that has it."""

    value: float
    subject: str


class Entry(NamedTuple):
    """What a table says of a metric in one of its rows.

    Attributes:
        estimate: the mean over subjects.
        worst: the worst subject; None where there are not several subjects, or neither way is better.
    """

    estimate: Estimate
    worst: Worst | None = None


Table = Mapping[str, Mapping[str, Entry]]  # by row, then by metric


def mean(numbers: Sequence[float]) -> float:
    """The mean of numbers.

    Raises:
        ValueError: no numbers.
    """
    if not len(numbers):
        raise ValueError("The mean of nothing was asked for; give at least one number.")
    return float(np.mean(numbers))


def entropy(categories: Sequence[str]) -> float:
    """The entropy of the frequencies of categories, in bits: 0 for a single one, log2 K for K equally frequent ones.

    This plug-in estimator is too low by about (K - 1) / (2 N ln 2) bits (Miller 1955): compare entropies of equal N.

    Raises:
        ValueError: no categories.
    """
    if not len(categories):
        raise ValueError("The entropy of nothing was asked for; give at least one category.")
    q = np.unique(categories, return_counts=True)[1] / len(categories)
    return float(np.sum(q * np.log2(1 / q)))


def subject_scores(rows: Iterable[Row], combine: Callable[[str], Callable[[Sequence[Any]], float]]) -> SubjectScores:
    """Combine the scores of each subject's pictures, for each metric those of the pictures that have it.

    Args:
        rows: the pictures of all subjects.
        combine: takes a metric's name; gives the function that combines its scores.
    """
    values: dict[str, dict[str, list]] = {}
    for row in rows:
        of_subject = values.setdefault(row.subject, {})
        for name, value in row.scores.items():
            of_subject.setdefault(name, []).append(value)
    return {
        subject: {name: combine(name)(scores) for name, scores in metrics.items()}
        for subject, metrics in values.items()
    }


def estimates(scores: SubjectScores) -> dict[str, Estimate]:
    """The mean of each metric over the subjects that have it."""
    names = dict.fromkeys(name for metrics in scores.values() for name in metrics)
    return {name: interval([metrics[name] for metrics in scores.values() if name in metrics]) for name in names}


def worst_subject(scores: SubjectScores, metric: str, better: Better | None) -> Worst | None:
    """The subject with the worst value of a metric, the first of equally bad ones.

    Args:
        scores: the subjects' scores.
        metric: the metric.
        better: which way of it is better.

    Returns:
        The worst; None where neither way is better, or fewer than two subjects have the metric.
    """
    values = [Worst(metrics[metric], subject) for subject, metrics in scores.items() if metric in metrics]
    if better is None or len(values) < 2:
        return None
    return (min if better == "higher" else max)(values, key=lambda one: one.value)


def entries(scores: SubjectScores, better: Callable[[str], Better | None]) -> dict[str, Entry]:
    """The mean and the worst of each metric over the subjects that have it.

    Args:
        scores: the subjects' scores.
        better: takes a metric's name; tells which way of it is better.
    """
    return {
        name: Entry(estimate, worst_subject(scores, name, better(name))) for name, estimate in estimates(scores).items()
    }


def difference(scores: SubjectScores, others: SubjectScores, metric: str) -> Estimate:
    """The mean over subjects of the difference of a metric between two rows of a table, subject by subject.

    Raises:
        ValueError: no subject has the metric in both.
    """
    common = [s for s in scores if metric in scores[s] and metric in others.get(s, {})]
    if not common:
        raise ValueError(f"No subject has {metric!r} in both rows; evaluate the same subjects.")
    return interval([scores[subject][metric] - others[subject][metric] for subject in common])


def markdown(table: Table, columns: Sequence[str]) -> str:
    """A Markdown table of means, intervals and worst values; a metric that a row lacks has an empty cell."""
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, metrics in table.items():
        cells = [cell(*metrics[column]) if column in metrics else "" for column in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def transposed(table: Table) -> str:
    """A Markdown table with a line for each metric, for few rows of many metrics."""
    metrics = dict.fromkeys(metric for row in table.values() for metric in row)
    return markdown({m: {name: row[m] for name, row in table.items() if m in row} for m in metrics}, list(table))


def cell(estimate: Estimate, worst: Worst | None = None) -> str:
    """Format an entry, such as ".684 (.651 to .712), worst .412"; the mean alone where there is no interval."""
    mean, low, high = map(_short, estimate)
    if estimate.low == estimate.high:
        return mean
    return f"{mean} ({low} to {high})" + (f", worst {_short(worst.value)}" if worst else "")


def _short(value: float) -> str:
    return re.sub(r"^(-?)0\.", r"\1.", f"{value:.3f}")


def comma_separated(table: Table) -> str:
    """A table as CSV, a line for each row and metric: row, metric, mean, low, high, worst, worst subject."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "metric", *Estimate._fields, "worst", "worst subject"])
    for name, metrics in table.items():
        for metric, (estimate, worst) in metrics.items():
            found = (repr(float(worst.value)), worst.subject) if worst else ("", "")
            writer.writerow([name, metric, *map(repr, map(float, estimate)), *found])
    return text.getvalue()
