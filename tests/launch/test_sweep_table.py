import csv
import io

import pytest
from matplotlib.colors import to_hex

from configs import world
from launch.sweep_points import read_points
from launch.sweep_table import Result, comma_separated, markdown, plot, ranked, write
from personalize_jax.metrics.similarity import Estimate

SCORES = ({"DINO": 0.5, "PRES": 0.1}, {"DINO": 0.7, "PRES": 0.4}, {}, {"DINO": 0.6, "PRES": 0.2})


@pytest.fixture
def results(tmp_path):
    """Four points, of which the third failed; the first overrides nothing."""
    file = tmp_path / "sweep.py"
    file.write_text(
        "def sweep(config):\n"
        "    yield {}\n"
        "    yield {'training.prior.weight': 0.0}\n"
        "    yield {'training.prior.weight': 0.0, 'subject.rule': 'frequent'}\n"
        "    yield {'training.optimizer.learning_rate': 1e-2}\n"
    )
    points = read_points(file, world.get_config())
    estimates = [{k: Estimate(v, v - 0.05, v + 0.05) for k, v in scores.items()} for scores in SCORES]
    statuses = ("done", "done", "failed: The loss is nan | at step 3", "stopped early")
    return [Result(*result) for result in zip(points, estimates, statuses, strict=True)]


def test_the_best_come_first_and_failures_not_at_all(results):
    assert [results.index(r) for r in ranked(results, "DINO")] == [1, 3, 0]
    assert [results.index(r) for r in ranked(results, "PRES")] == [0, 3, 1]
    assert ranked(results, "CLIP-T") == []


@pytest.mark.parametrize("metric", ["PRES", "leakage", "is subject", "DINO", "CLIP-T", "DIV", "context"])
def test_of_leaks_the_least_is_the_best_and_of_all_else_the_most(metric, results):
    low, high = (results[0]._replace(metrics={metric: Estimate(v, v, v)}) for v in (0.1, 0.9))
    assert ranked([low, high], metric)[0] == (low if metric in ("PRES", "leakage", "is subject") else high)


def test_the_csv_has_a_row_a_point_and_every_override(results):
    rows = list(csv.DictReader(io.StringIO(comma_separated(results, num_subjects=3))))
    assert [row["point"] for row in rows] == [result.point.name for result in results]
    assert [float(row["training.prior.weight"]) for row in rows] == [2.0, 0.0, 0.0, 2.0]
    assert [float(row["training.optimizer.learning_rate"]) for row in rows] == [4e-4, 4e-4, 4e-4, 1e-2]
    assert [row["subject.rule"] for row in rows] == ["rarest", "rarest", "frequent", "rarest"]
    assert [row["DINO"] for row in rows] == ["0.5", "0.7", "", "0.6"]
    assert (rows[0]["DINO low"], rows[0]["DINO high"]) == ("0.45", "0.55")
    assert [row["status"] for row in rows] == [result.status for result in results]


def test_one_subject_has_no_intervals(results):
    rows = list(csv.DictReader(io.StringIO(comma_separated(results, num_subjects=1))))
    assert rows[0]["DINO"] == "0.5" and "DINO low" not in rows[0]
    assert "interval" not in markdown(results, "DINO", 1) and "interval" in markdown(results, "DINO", 2)


def test_the_markdown_marks_the_best(results):
    text = markdown(results, "PRES", 3)
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.replace("\\|", "").strip("|").split("|")] for line in lines]
    assert len(lines) == 5 and len({len(row) for row in cells}) == 1
    assert text.count("**") == 2 and "**.100 (.050 to .150)**" in lines[1]
    assert text.endswith("Best by PRES: unchanged\n")


def test_without_any_success_there_is_a_table_and_no_figure(results, tmp_path):
    text = write([results[2]], "DINO", 1, tmp_path)
    assert "failed: The loss is nan" in text and "Best" not in text
    assert (tmp_path / "table.csv").exists() and not (tmp_path / "figure.png").exists()


def test_the_figure_has_a_line_a_scored_point_coloured_by_the_metric(results, tmp_path):
    axes, colour_bar = plot(results, "DINO").axes
    names = [label.get_text().replace("\n", "") for label in axes.get_xticklabels()]
    overrides = ["training.prior.weight", "training.optimizer.learning_rate"]
    assert names == [*overrides, "DINO", "PRES(lower is better)"]
    lines = [line for line in axes.lines if len(line.get_xdata()) == len(names)]
    assert len(lines) == 3 and all(0 <= y <= 1 for line in lines for y in line.get_ydata())
    by_metric = sorted(lines, key=lambda line: line.get_ydata()[2])
    assert [line.get_ydata()[2] for line in by_metric] == pytest.approx([0, 0.5, 1])
    assert len({to_hex(line.get_color()) for line in lines}) == 3
    assert colour_bar.get_ylabel() == "DINO"
    write(results, "DINO", 3, tmp_path)
    assert (tmp_path / "figure.png").stat().st_size > 1000


def test_words_and_single_points_can_be_drawn(results):
    words = [result._replace(metrics=results[0].metrics) for result in results]
    for some in (words, results[:1]):
        (axes, _) = plot(some, "DINO").axes
        assert all(0 <= y <= 1 for line in axes.lines for y in line.get_ydata())
