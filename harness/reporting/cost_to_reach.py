"""What it costs to reach a quality: tables/cost_to_reach.{csv,md}.

A run reaches a level at the first point of its curve that is at least as good. Between two
snapshots the curve is a straight line in the logarithms of cost and score, because snapshots lie on
a logarithmic grid and a Fréchet distance falls about as a power of the cost. The scores of other
metrics, and scores that are not positive, are interpolated linearly against the logarithm of the
cost.
"""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from harness.config.experiment import Experiment
from harness.evaluation.registry import FRECHET, Metric
from harness.reporting.collect import (
    main_column,
    main_metric_in,
    ranking_extractors,
    training_record,
)
from harness.reporting.formatting import rounded_text, write_table
from harness.reporting.intervals import LEVEL, TRAINING_SEEDS

UNITS = {  # column of the table -> heading, scale
    "images": ("images", 1),
    "flops": ("TFLOPs", 1e12),
    "seconds": ("seconds", 1),
}
LEVELS = 4  # of one column, without the teacher's
ROUND = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)  # round numbers of a decade
COLUMNS = (
    *("column", "level", "student", "unit", "seeds", "reached", "at_most"),
    *("cost", "low", "high", "lowest", "highest"),
)


class EqualCompute(NamedTuple):
    """The scores at the largest compute that every run with a curve reached."""

    flops: float
    scores: pd.Series  # student -> mean over its training seeds, best first
    missing: list[str]  # students whose first snapshot is later


# -- one curve ------------------------------------------------------------------------------------


def _straight(log: bool, *values: float):
    """The function in which the curve is straight between these values."""
    return np.log if log and min(values) > 0 else np.asarray


def first_passage(
    cost: np.ndarray, score: np.ndarray, level: float, higher_is_better=False, log=True
) -> float:
    """The cost at which a curve first reaches a level; infinity if it never does.

    cost: `(N,)`, ascending. score: `(N,)`. log: interpolate the logarithm of the score. A curve
    that starts beyond the level gives `cost[0]`, an upper bound.
    """
    reached = np.flatnonzero((score >= level) if higher_is_better else (score <= level))
    if not len(reached):
        return math.inf
    if not (i := reached[0]):
        return float(cost[0])
    f, g = _straight(log, level, score[i - 1], score[i]), _straight(True, cost[i - 1])
    share = (f(level) - f(score[i - 1])) / (f(score[i]) - f(score[i - 1]))
    at = (1 - share) * g(cost[i - 1]) + share * g(cost[i])
    return float(np.exp(at) if g is np.log else at)


def score_at(cost: np.ndarray, score: np.ndarray, at: float, log=True) -> float:
    """The score of a curve at a cost, interpolated as in `first_passage`; NaN outside the curve."""
    if not cost[0] <= at <= cost[-1]:
        return math.nan
    f, g = _straight(log, *score), _straight(True, cost[0])
    value = np.interp(g(at), g(cost), f(score))
    return float(np.exp(value) if f is np.log else value)


def over_seeds(costs: list[float]) -> dict[str, float]:
    """Geometric mean of the costs of T training seeds (`cost`), its interval at LEVEL (`low`,
    `high`: Student's t with T - 1 degrees of freedom on the logarithms; NaN with fewer than
    TRAINING_SEEDS seeds), and the `lowest` and `highest` seed. If a seed misses the level (an
    infinite cost), `cost`, `low` and `high` are NaN, and the extremes are those of the others."""
    from scipy.special import stdtrit

    found = np.array([cost for cost in costs if cost < math.inf])
    nothing = dict.fromkeys(("cost", "low", "high", "lowest", "highest"), math.nan)
    extremes = {"lowest": found.min(), "highest": found.max()} if len(found) else {}
    if len(found) < len(costs) or not len(found):
        return nothing | extremes
    if found.min() <= 0:  # nothing was spent: no logarithm
        return nothing | extremes | {"cost": found.mean()}
    logs, count = np.log(found), len(found)
    result = nothing | extremes | {"cost": math.exp(logs.mean())}
    if count >= TRAINING_SEEDS:
        half = stdtrit(count - 1, (1 + LEVEL) / 2) * logs.std(ddof=1) / math.sqrt(count)
        result |= {"low": math.exp(logs.mean() - half), "high": math.exp(logs.mean() + half)}
    return result


def round_levels(
    best: float, worst: float, start: float, higher_is_better=False, log=True
) -> list[float]:
    """At most LEVELS round numbers, the hardest first: evenly spaced over those between the best
    score and the worst student's last score, and further towards `start`, the worst first score,
    if there are fewer. log: round in every decade; otherwise, and where no such number lies between
    the scores, multiples of 1, 2 or 5 times a power of ten, at least the third digit of the largest
    score."""
    low, high = sorted((best, start))
    if not (math.isfinite(low) and high > low):
        return []
    known = []
    if log and low > 0:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        numbers = (float(f"{step}e{decade}") for decade in decades for step in ROUND)
        known = [x for x in numbers if low <= x <= high]
    if not known:
        digit = 10.0 ** (math.floor(math.log10(max(-low, high))) - 2)
        width = max((abs(worst - best) or high - low) / LEVELS, digit)
        decade = 10.0 ** math.floor(math.log10(width))
        step = next(s * decade for s in (1, 2, 5, 10) if s * decade >= width * (1 - 1e-9))
        multiples = range(math.ceil(low / step), math.floor(high / step) + 1)
        known = [float(f"{i * step:.12g}") for i in multiples]
    known = sorted((x for x in known if low <= x <= high), reverse=higher_is_better)
    inside = sum((x >= worst) if higher_is_better else (x <= worst) for x in known)
    known = known[: max(LEVELS, inside)]
    chosen = np.linspace(0, len(known) - 1, min(LEVELS, len(known))).round().astype(int)
    return [known[i] for i in chosen]


# -- an experiment --------------------------------------------------------------------------------


def run_curves(experiment: Experiment, table: pd.DataFrame, column: str) -> pd.DataFrame:
    """The curve of every run in a column of `collect`'s table: student, seed, images, flops,
    seconds and value, ascending. Scores are means over sampling seeds; `seconds` are those of all
    processes together, so on GPUs they are GPU seconds. Selected snapshots count with the noise of
    the other snapshots, not with that of the last one."""
    rows = table[(table.column == column) & table.student.isin(list(experiment.students))]
    rows = rows[(rows.status == "ok") & (rows.final | rows.selected.isna())]
    rows = rows.astype(dict.fromkeys([*UNITS, "value"], float)).dropna(subset=["images", "value"])
    keys = ["student", "seed", "images"]
    points = rows.groupby(keys, sort=True)[["flops", "seconds", "value"]].mean().reset_index()
    processes = {
        run: getattr(training_record(experiment, *run), "processes", 1)
        for run in set(zip(points.student, points.seed, strict=True))
    }
    factor = [processes[run] for run in zip(points.student, points.seed, strict=True)]
    return points.assign(seconds=points.seconds * factor)


def equal_compute(experiment: Experiment, table: pd.DataFrame, extractor: str) -> EqualCompute:
    """The main scores in an extractor at equal compute."""
    metric = main_metric_in(experiment, extractor)
    points = run_curves(experiment, table, main_column(experiment, extractor)).dropna()
    runs = {run: rows for run, rows in points.groupby(["student", "seed"])}
    flops = min((rows.flops.iloc[-1] for rows in runs.values()), default=math.nan)
    log = metric.name in FRECHET
    values = pd.Series(
        {r: score_at(c.flops.to_numpy(), c.value.to_numpy(), flops, log) for r, c in runs.items()},
        dtype=float,
    )
    values = values.groupby(level=0).agg(lambda v: v.mean(skipna=False)) if len(values) else values
    scores = values.dropna().sort_values(ascending=not metric.higher_is_better, kind="stable")
    return EqualCompute(flops, scores, [name for name in values.index if name not in scores])


def cost_table(experiment: Experiment, table: pd.DataFrame) -> pd.DataFrame:
    """COLUMNS of every main column, level, student and unit, the hardest level first.

    Levels: `round_levels` of the main column, and the teacher's score if a student reaches it.
    seeds: of the student's runs with a curve; reached: how many of them reach the level. at_most:
    whether a run's first snapshot is already beyond the level, so the cost is an upper bound.
    Others: `over_seeds`."""
    rows = []
    for extractor in ranking_extractors(experiment):
        metric, column = main_metric_in(experiment, extractor), main_column(experiment, extractor)
        points, higher = run_curves(experiment, table, column), bool(metric.higher_is_better)
        log = metric.name in FRECHET
        # A run with one point has no curve.
        counts = points.groupby(["student", "seed"]).value.transform("size")
        points = points[counts > 1]
        if points.empty:
            continue
        for level in _levels(experiment, table, column, points, higher, log):
            for student in [s for s in experiment.students if s in set(points.student)]:
                runs = [run for _, run in points[points.student == student].groupby("seed")]
                first = [run.value.iloc[0] for run in runs]
                at_most = any(v >= level if higher else v <= level for v in first)
                for unit in UNITS:
                    arrays = [(run[unit].to_numpy(), run.value.to_numpy()) for run in runs]
                    costs = [first_passage(x, y, level, higher, log) for x, y in arrays]
                    if np.isnan(costs).any():
                        continue
                    facts = {"column": column, "level": level, "student": student, "unit": unit}
                    facts |= {"seeds": len(runs), "reached": int(np.isfinite(costs).sum())}
                    rows.append(facts | {"at_most": at_most} | over_seeds(costs))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def teacher_scores(experiment: Experiment, table: pd.DataFrame, column: str) -> dict[str, float]:
    """The score of every teacher, with all its steps, in a column."""
    names = [experiment.teacher_row(name) for name in experiment.teachers]
    rows = table[(table.column == column) & table.student.isin(names) & (table.status == "ok")]
    return rows.astype({"value": float}).groupby("student", sort=False).value.mean().to_dict()


def _levels(
    experiment: Experiment, table: pd.DataFrame, column: str, points, higher: bool, log: bool
) -> list[float]:
    means = points.groupby(["student", "images"]).value.mean()
    ends = means.groupby("student")
    extremes = ("max", "min") if higher else ("min", "max")
    best, worst = means.agg(extremes[0]), ends.last().agg(extremes[1])
    start = ends.first().agg(extremes[1])
    found = round_levels(best, worst, start, higher, log)
    teachers = teacher_scores(experiment, table, column).values()
    reached = [x for x in teachers if (best >= x > start if higher else best <= x < start)]
    # One level for each text: a teacher's score replaces a round number.
    by_text = {rounded_text(x): x for x in [*found, *reached]}
    return sorted(by_text.values(), reverse=higher)


# -- texts ----------------------------------------------------------------------------------------


def number(value: float, unit: str) -> str:
    """A cost with three significant digits, such as "11,300" images or "0.83" TFLOPs."""
    return rounded_text(value / UNITS[unit][1])


def cost_text(row, bounds: bool = True) -> str:
    """A row of `cost_table` as text: "1.2 (0.9 to 1.5)" with its interval, "1.2 [1.1–1.3]" with the
    extreme seeds where there is no interval, "≤ 1.2", "2 of 3 seeds, from 1.1" or "not reached"."""
    if not row.reached:
        return "not reached"
    cost, low, high, lowest, highest = (
        number(value, row.unit) for value in (row.cost, row.low, row.high, row.lowest, row.highest)
    )
    if row.reached < row.seeds:
        return f"{row.reached} of {row.seeds} seeds, from {lowest}"
    if row.at_most:
        return f"≤ {cost}"
    if bounds and pd.notna(row.low):
        return f"{cost} ({low} to {high})"
    return f"{cost} [{lowest}–{highest}]" if bounds and lowest != highest else cost


def shown_level(rows: pd.DataFrame, column: str) -> float | None:
    """The hardest level of a column that at least half of the students reach with all their seeds:
    the level for a table with room for one."""
    rows = rows[(rows.column == column) & (rows.unit == "images")]
    reached = (rows.reached == rows.seeds).groupby(rows.level, sort=False).mean()
    return next((level for level, share in reached.items() if share >= 0.5), None)


def sign(metric: Metric) -> str:
    """What a level means: "≤" or "≥"."""
    return "≥" if metric.higher_is_better else "≤"


def level_texts(
    rows: pd.DataFrame, column: str, level: float, bounds: bool = False
) -> dict[str, dict[str, str]]:
    """Student -> unit -> `cost_text` of a level of a column. bounds: with those of TFLOPs."""
    found: dict[str, dict[str, str]] = {}
    for row in rows[(rows.column == column) & (rows.level == level)].itertuples():
        units = found.setdefault(row.student, dict.fromkeys(UNITS, "–"))
        units[row.unit] = cost_text(row, bounds and row.unit == "flops")
    return found


def seconds_heading(table: pd.DataFrame) -> str:
    """ "GPU seconds" if every run of `collect`'s table was trained on a GPU, else "seconds"."""
    devices = table.device[table.seed.notna()].dropna()
    on_gpu = len(devices) and not devices.str.startswith("cpu").any()
    return "GPU seconds" if on_gpu else "seconds"


def texts(rows: pd.DataFrame, seconds: str = "seconds") -> pd.DataFrame:
    """`cost_table` as texts: one row per column, level and student, one column per unit."""
    keys = ["column", "level", "student"]
    rows = rows.assign(text=[cost_text(row) for row in rows.itertuples()])
    wide = rows.set_index([*keys, "unit"]).text.unstack("unit", sort=False).reset_index()
    wide = wide.reindex(columns=[*keys, *UNITS]).astype(object)
    wide["level"] = wide.level.map(rounded_text)
    headings = {unit: heading for unit, (heading, _) in UNITS.items()} | {"seconds": seconds}
    return wide.fillna("–").rename(columns=headings)


def reading(seconds: str = "seconds") -> str:
    """How to read the costs, in one paragraph."""
    return (
        "The cost at which a run first reaches the level, interpolated between snapshots; TFLOPs "
        f"and {seconds} include teacher pairs. Geometric mean over training seeds, with its "
        f"{LEVEL:.0%} interval in parentheses; with fewer than {TRAINING_SEEDS} seeds "
        "[lowest–highest]. "
        "≤: the first snapshot is already beyond the level."
    )


def write_cost_to_reach(experiment: Experiment, table: pd.DataFrame, folder: Path) -> list[Path]:
    """Write cost_to_reach.{csv,md} to a folder; returns their paths."""
    rows, seconds = cost_table(experiment, table), seconds_heading(table)
    title = f"What it costs to reach a score on {experiment.name}"
    caption = reading(seconds) if len(rows) else "No run has scores at more than one snapshot."
    return write_table(rows, folder, "cost_to_reach", title, caption, texts(rows, seconds))
