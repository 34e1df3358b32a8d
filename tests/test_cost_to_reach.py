"""What it costs to reach a score: closed forms, and the table of a synthetic experiment."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from harness.reporting import cost_to_reach
from harness.reporting.cost_to_reach import (
    equal_compute,
    first_passage,
    over_seeds,
    round_levels,
    score_at,
)
from harness.reporting.figures import costs
from tests.reports import tidy_table, write_run
from tests.test_page import make_experiment

COST = np.array([100.0, 200.0, 400.0, 800.0])
COLUMN = "fd_n400_tiny-cnn"


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_a_power_law_is_interpolated_exactly(power):
    """score = 7 cost^-p reaches a level at cost (7 / level)^(1/p), between any two snapshots."""
    score = 7 * COST**-power
    for cost in (100.0001, 150.0, 333.0, 799.0):
        level = 7 * cost**-power
        assert first_passage(COST, score, level) == pytest.approx(cost)
        assert score_at(COST, score, cost) == pytest.approx(level)


def test_first_passages_of_special_curves():
    score = np.array([4.0, 2.0, 3.0, 1.0])
    # The first of two passages, from above; 2.5 lies at a share log(4/2.5) / log(4/2).
    share = math.log(4 / 2.5) / math.log(2)
    assert first_passage(COST, score, 2.5) == pytest.approx(100 * 2**share)
    assert first_passage(COST, score, 2.0) == pytest.approx(200)
    assert first_passage(COST, score, 5.0) == 100  # reached before the first snapshot
    assert first_passage(COST, score, 0.9) == math.inf
    # Higher is better, linear in the score: half way in the logarithm of the cost.
    rising = np.array([10.0, 20.0, 30.0, 40.0])
    assert first_passage(COST, rising, 15.0, True, log=False) == pytest.approx(100 * 2**0.5)
    # Scores that are not positive, and a cost of nothing, are interpolated linearly.
    assert first_passage(COST, np.array([1.0, -1.0, -2.0, -3.0]), 0.0) == pytest.approx(
        100 * 2**0.5
    )
    assert first_passage(np.array([0.0, 100.0]), np.array([4.0, 1.0]), 2.0) == pytest.approx(50)
    assert math.isnan(score_at(COST, score, 99.0)) and math.isnan(score_at(COST, score, 801.0))


def test_the_interval_over_seeds_is_students_t_on_logarithms():
    costs = [math.e, math.e**2, math.e**3]
    found = over_seeds(costs)
    half = 4.302652729911275 * 1 / math.sqrt(3)  # t(0.975, 2 degrees), standard deviation 1
    assert found["cost"] == pytest.approx(math.e**2)
    assert found["low"] == pytest.approx(math.exp(2 - half))
    assert found["high"] == pytest.approx(math.exp(2 + half))
    assert (found["lowest"], found["highest"]) == (costs[0], costs[2])
    two = over_seeds([1.0, 4.0])
    assert two["cost"] == pytest.approx(2) and math.isnan(two["low"]) and two["highest"] == 4
    partial = over_seeds([3.0, math.inf, 2.0])
    assert math.isnan(partial["cost"]) and (partial["lowest"], partial["highest"]) == (2, 3)
    assert all(map(math.isnan, over_seeds([math.inf]).values()))


@pytest.mark.parametrize(
    ("best", "worst", "start", "higher", "log", "expected"),
    [
        (0.573, 0.987, 3.0, False, True, [0.6, 0.8, 1, 1.2]),
        (1.9, 20.0, 400.0, False, True, [2, 4, 10, 20]),  # of 2, 2.5, 3, 4, … 15, 20
        (20.2, 33.2, 100.0, False, True, [25, 30, 40, 50]),
        (0.9, 0.5, 0.1, True, False, [0.9, 0.8, 0.6, 0.5]),
        (-1.0, 2.0, 4.0, False, False, [-1, 0, 1, 2]),
        # No round number between the scores: multiples of a fine step.
        (0.95, 0.97, 0.99, False, True, [0.95, 0.955, 0.965, 0.97]),
        (20.1, 20.3, 24.9, False, True, [20.1, 20.2, 20.3, 20.4]),
        (5.0, 5.0 + 1e-9, 9.0, False, False, [5, 5.01, 5.02, 5.03]),  # at least the third digit
        (2.0, 2.0, 2.0, False, True, []),
        (math.nan, 1.0, 2.0, False, True, []),
    ],
)
def test_levels_are_round_numbers_from_the_best_score_on(best, worst, start, higher, log, expected):
    assert round_levels(best, worst, start, higher, log) == pytest.approx(expected)


@pytest.fixture
def experiment(tmp_path):
    """Three students with runs of 160 images; on s2, two processes."""
    experiment = make_experiment(tmp_path)
    for student, seed in experiment.runs:
        write_run(experiment, student, seed, processes=1 + (student == "s2"))
    return experiment


def curves(experiment, scores):
    """Scores 2, then 1 times the given ones at 80 and 160 images."""
    numbers = {("fd", "tiny-cnn"): {"teacher": [0.5]} | scores}
    return tidy_table(experiment, numbers, curve=True)


def test_the_table_has_every_student_level_and_unit(experiment):
    # The score of s1 is 160 / images.
    table = curves(experiment, {"s1": [1.0] * 3, "s2": [1.2, 1.3, 1.4], "s3": [3.0] * 3})
    rows = cost_to_reach.cost_table(experiment, table)
    assert list(dict.fromkeys(rows.level)) == [1, 1.5, 2, 3]
    assert list(rows.columns) == list(cost_to_reach.COLUMNS)
    at = rows.set_index(["student", "level", "unit"]).loc
    assert at["s1", 1.5, "images"].cost == pytest.approx(80 * 2 / 1.5)
    assert at["s1", 1.5, "flops"].cost == pytest.approx(1e12 / 1.5)
    assert at["s1", 1.5, "seconds"].cost == pytest.approx(1 / 1.5)
    assert at["s1", 3, "images"].at_most and at["s1", 3, "images"].cost == pytest.approx(80)
    assert at["s2", 1.5, "images"].reached == 3
    assert at["s2", 1.5, "seconds"].lowest == pytest.approx(2 * 1.2 / 1.5)  # of two processes
    texts = cost_to_reach.texts(rows).set_index(["student", "level"])
    assert texts.TFLOPs["s1", "1.5"] == "0.667 (0.667 to 0.667)"
    assert texts.images["s3", "1.5"] == "not reached" and texts.images["s1", "3"] == "≤ 80"
    assert cost_to_reach.shown_level(rows, COLUMN) == 1.5


def test_seeds_that_miss_a_level_are_counted(experiment):
    table = curves(experiment, {"s1": [1.0, 1.0, 2.0], "s2": [4.0] * 3, "s3": [4.0] * 3})
    rows = cost_to_reach.cost_table(experiment, table)
    row = rows[(rows.student == "s1") & (rows.level == 1.5) & (rows.unit == "images")].iloc[0]
    assert (row.reached, row.seeds) == (2, 3) and math.isnan(row.cost)
    assert cost_to_reach.cost_text(row) == "2 of 3 seeds, from 107"


def test_a_level_is_the_teachers_if_a_student_reaches_it(experiment):
    table = curves(experiment, {"s1": [0.4] * 3, "s2": [0.7] * 3, "s3": [0.7] * 3})
    rows = cost_to_reach.cost_table(experiment, table)
    assert 0.5 in set(rows.level)


def test_a_teachers_level_replaces_the_round_number_with_its_text(experiment):
    table = curves(experiment, {"s1": [0.4] * 3, "s2": [0.7] * 3, "s3": [0.7] * 3})
    table["value"] = table.value.where(table.student != "teacher", 0.5001)
    rows = cost_to_reach.cost_table(experiment, table)
    assert 0.5001 in set(rows.level) and 0.5 not in set(rows.level)


def test_large_levels_have_no_exponent(experiment):
    scores = {"s1": [1000.0] * 3, "s2": [1200.0] * 3, "s3": [3000.0] * 3}
    table = curves(experiment, scores)
    rows = cost_to_reach.cost_table(experiment, table)
    assert set(cost_to_reach.texts(rows).level) == {"1,000", "1,500", "2,000", "3,000"}
    marks = costs.figure(experiment, table).to_dict()["concat"][0]["description"]
    assert "s1 1,500 at" in marks


def test_the_chart_finds_metrics_with_underscores(experiment, monkeypatch):
    table = curves(experiment, {"s1": [1.0] * 3, "s2": [1.2] * 3, "s3": [3.0] * 3})
    name = "harness.reporting.collect.column_name"
    monkeypatch.setattr(name, lambda metric, count, extractor: f"my_{metric}_n{count}_{extractor}")
    chart = costs.figure(experiment, table.assign(column="my_" + table.column))
    assert len(chart.to_dict()["concat"]) == 3


def test_students_are_compared_at_equal_compute(experiment):
    table = curves(experiment, {"s1": [1.0] * 3, "s2": [1.2] * 3, "s3": [3.0] * 3})
    cheap = table.student == "s2"
    table = table.assign(flops=table.flops.where(~cheap, table.flops * 0.6))
    late = (table.student == "s3") & ~table.final
    table = table.assign(flops=table.flops.where(~late, 0.9e12))
    found = equal_compute(experiment, table, "tiny-cnn")
    assert found.flops == pytest.approx(0.6e12) and found.missing == ["s3"]
    assert found.scores.to_dict() == pytest.approx({"s2": 1.2, "s1": 1 / 0.6})


def test_files_and_column_of_the_costs(experiment, tmp_path):
    table = curves(experiment, {"s1": [1.0] * 3, "s2": [1.2] * 3, "s3": [3.0] * 3})
    csv, markdown = cost_to_reach.write_cost_to_reach(experiment, table, tmp_path)
    assert list(pd.read_csv(csv).columns) == list(cost_to_reach.COLUMNS)
    assert "| fd_n400_tiny-cnn | 1.5 " in " ".join(markdown.read_text().split("  "))
    once = table[table.final]
    _, markdown = cost_to_reach.write_cost_to_reach(experiment, once, tmp_path)
    assert "No run has scores at more than one snapshot." in markdown.read_text()


def test_gpu_seconds_are_named(experiment):
    table = curves(experiment, {"s1": [1.0] * 3})
    assert cost_to_reach.seconds_heading(table) == "seconds"
    table = table.assign(device="NVIDIA H200")
    assert cost_to_reach.seconds_heading(table) == "GPU seconds"
