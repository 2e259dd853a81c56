import csv

import numpy as np
import pytest

from personalize_jax.metrics.similarity import Estimate
from personalize_jax.metrics.table import (
    Entry,
    Row,
    Worst,
    cell,
    comma_separated,
    difference,
    entries,
    entropy,
    estimates,
    markdown,
    mean,
    subject_scores,
    transposed,
)


def row(subject, **scores):
    return Row(subject, "subject", "a [V] dog", 0, "x.png", scores)


def test_entropy_of_known_distributions():
    assert entropy(["red"] * 5) == 0
    assert entropy(["red", "blue", "green", "gray"]) == pytest.approx(2)
    assert entropy(["red", "red", "blue"]) == pytest.approx(np.log2(3) - 2 / 3)
    for combine in (entropy, mean):
        with pytest.raises(ValueError, match="at least one"):
            combine([])


def test_a_metric_counts_over_the_pictures_that_have_it():
    rows = [row("rex", DINO=0.2), row("rex", DINO=0.4, context=1.0), row("rex", context=0.0), row("tom", DINO=0.9)]
    scores = subject_scores(rows, {"DINO": mean, "context": mean}.get)
    assert scores["rex"] == pytest.approx({"DINO": 0.3, "context": 0.5})
    assert scores["tom"] == {"DINO": 0.9}
    means = estimates(scores)
    assert means["DINO"].mean == pytest.approx(0.6)
    assert means["context"] == (0.5, 0.5, 0.5)


def test_each_metric_combines_pictures_in_its_own_way():
    rows = [row("rex", colours=c, DINO=0.5) for c in ("red", "red", "blue", "blue")]
    assert subject_scores(rows, {"DINO": mean, "colours": entropy}.get) == {"rex": {"colours": 1, "DINO": 0.5}}


def test_subjects_count_alike_however_many_pictures_they_have():
    scores = subject_scores([row("rex", DINO=0.0)] * 9 + [row("tom", DINO=1.0)], {"DINO": mean}.get)
    assert estimates(scores)["DINO"].mean == pytest.approx(0.5)


def test_differences_are_taken_subject_by_subject():
    a = {f"s{i}": {"DINO": i / 10 + 0.05} for i in range(10)}
    b = {f"s{i}": {"DINO": i / 10} for i in reversed(range(5, 15))}
    estimate = difference(a, b, "DINO")
    assert estimate == pytest.approx((0.05, 0.05, 0.05))  # though the subjects differ widely among themselves
    with pytest.raises(ValueError, match="No subject has 'PRES'"):
        difference(a, b, "PRES")


def test_the_worst_subject_has_the_least_of_what_should_be_high_and_the_most_of_what_should_be_low():
    scores = {
        "rex": {"DINO": 0.7, "leakage": 0.1, "colours": 2.0, "context": 1.0},
        "tom": {"DINO": 0.4, "leakage": 0.3, "colours": 3.0},
        "kim": {"DINO": 0.9, "leakage": 0.3, "colours": 1.0},
    }
    found = entries(scores, {"DINO": "higher", "leakage": "lower", "context": "higher"}.get)
    assert found["DINO"].worst == Worst(0.4, "tom") and found["leakage"].worst == Worst(0.3, "tom")
    assert found["colours"].worst is None  # of which neither way is better
    assert found["context"].worst is None  # which only one of them has
    assert {name: entry.estimate for name, entry in found.items()} == estimates(scores)


def test_tables_hold_what_was_estimated():
    worst = Worst(0.25, "tom")
    table = {
        "with": {"DINO": Entry(Estimate(0.5, 0.4, 0.61), worst), "PRES": Entry(Estimate(1.0, 1.0, 1.0), worst)},
        "paper": {"DINO": Entry(Estimate(0.7, 0.7, 0.7))},
    }
    assert cell(Estimate(-0.5, -0.75, 2.5)) == "-.500 (-.750 to 2.500)"
    assert markdown(table, ["DINO", "PRES"]).splitlines() == [
        "| | DINO | PRES |",
        "|---|---|---|",
        "| with | .500 (.400 to .610), worst .250 | 1.000 |",
        "| paper | .700 |  |",
    ]
    assert transposed(table).splitlines()[2:] == [
        "| DINO | .500 (.400 to .610), worst .250 | .700 |",
        "| PRES | 1.000 |  |",
    ]
    lines = list(csv.DictReader(comma_separated(table).splitlines()))
    columns = ["row", "metric", "mean", "low", "high", "worst", "worst subject"]
    assert [[line[column] for column in columns] for line in lines] == [
        ["with", "DINO", "0.5", "0.4", "0.61", "0.25", "tom"],
        ["with", "PRES", "1.0", "1.0", "1.0", "0.25", "tom"],
        ["paper", "DINO", "0.7", "0.7", "0.7", "", ""],
    ]
