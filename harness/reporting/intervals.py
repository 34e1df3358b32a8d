"""Differences between students: intervals, ranks, and tables/pairwise.{csv,md}.

A number has two errors, which more of the other kind of seed cannot lower. The *sampling error*
comes from the noise that images were generated from. Image i has the same noise in every student,
so it is estimated on pairs: a delete-d jackknife that leaves the same images out of both. The
*training error* comes from the training seed. One seed gives every student the same noise and
labels to train with, so it, too, is estimated on pairs: from the spread of the difference.

Samples are never redrawn with replacement: a redraw adds the noise of a second draw to that of the
first, and a Fréchet distance takes noise for distance. Its bootstrap distribution lies above the
estimate by many times the error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from harness.config.experiment import Experiment
from harness.evaluation.registry import METRICS
from harness.io.artifacts import write_text

LEVEL = 0.95
TRAINING_SEEDS = 3  # with fewer, a spread over them says next to nothing
COLUMNS = (
    *("column", "a", "b", "difference", "low", "high", "level"),
    *("sampling_se", "training_se", "training_seeds", "verdict"),
)


@dataclass
class Measured:
    """One student's numbers in one column: T training seeds, R sampling seeds, G groups.

    values: `(T, R)`. leave_out: `(T, R, G)`, the value without each group of images; None for a
    metric that has no such estimates. seeds: the T training seeds; noise: the R sampling seeds.
    """

    values: np.ndarray
    leave_out: np.ndarray | None = None
    seeds: tuple[int, ...] = ()
    noise: tuple[int, ...] = ()

    def of(self, seeds: list[int]) -> Measured:
        """Of some of the training seeds."""
        index = [self.seeds.index(seed) for seed in seeds]
        left = None if self.leave_out is None else self.leave_out[index]
        return Measured(self.values[index], left, tuple(seeds), self.noise)


@dataclass(frozen=True)
class Interval:
    """A difference a - b, its interval and the two errors in it (NaN: unknown)."""

    difference: float
    low: float
    high: float
    sampling_se: float
    training_se: float
    training_seeds: int


def sampling_variance(a: Measured, b: Measured) -> tuple[float, float]:
    """Variance of a - b over the draw of the noise, and its degrees of freedom.

    With d[r] the difference on sampling seed r, averaged over each student's training seeds (which
    all see the same noise), and d[r, -g] the same without the images of group g:

        v[r] = (G - 1) / G · Σ_g (d[r, -g] - mean_g d[r, -g])²,    v = Σ_r v[r] / R²

    since the R ranges of noise are disjoint; R (G - 1) degrees of freedom. Of a metric without
    leave-out estimates: v = var_r(d[r]) / R, R - 1 degrees of freedom.
    """
    if a.leave_out is not None and b.leave_out is not None:
        left = a.leave_out.mean(axis=0) - b.leave_out.mean(axis=0)  # (R, G)
        seeds, groups = left.shape
        variance = (groups - 1) * left.var(axis=1).sum() / seeds**2
        return float(variance), float(seeds * (groups - 1))
    difference = a.values.mean(axis=0) - b.values.mean(axis=0)
    if len(difference) < 2:
        return math.nan, math.nan
    return float(difference.var(ddof=1) / len(difference)), float(len(difference) - 1)


def training_variance(a: Measured, b: Measured) -> tuple[float, float]:
    """Variance of a - b over T training seeds, `s² / T`, and its T - 1 degrees of freedom.

    s is the standard deviation of the difference between the runs of one seed, each run's number
    its mean over sampling seeds. As a paired t test it holds however the two depend on each other;
    of separate variances it would have to be assumed that they do not.
    """
    difference = a.values.mean(axis=1) - b.values.mean(axis=1)
    if len(difference) < 2:
        return math.nan, math.nan
    return float(difference.var(ddof=1) / len(difference)), float(len(difference) - 1)


def interval(a: Measured, b: Measured, level: float = LEVEL) -> Interval:
    """The interval of a - b, of two students with the same training seeds and sampling seeds:

        difference ± sqrt(t(R (G - 1))² · v_noise + t(T - 1)² · v_training)

    v_noise: `sampling_variance`; v_training: `training_variance`; t(df) Student's quantile, of each
    with its own degrees of freedom (without groups, t(R - 1)). It is exact where one of the errors
    is 0 and covers more than its level where both count. One quantile for the sum, with Welch's
    and Satterthwaite's degrees of freedom, would cover 92 % instead of 95 at three training seeds:
    two degrees of freedom are too few to estimate others from. Part of v_noise, what noise does to
    one training seed and not to the next, is in v_training, too: again rather too wide. Without
    two training seeds there is no interval.
    """
    from scipy.special import stdtrit

    difference = float(a.values.mean() - b.values.mean())
    parts = [sampling_variance(a, b), training_variance(a, b)]
    half = math.sqrt(sum(float(stdtrit(df, (1 + level) / 2)) ** 2 * v for v, df in parts))
    return Interval(
        difference,
        difference - half,
        difference + half,
        math.sqrt(parts[0][0]),
        math.sqrt(parts[1][0]),
        len(a.values),
    )


def measured(final: pd.DataFrame, column: str) -> dict[str, Measured]:
    """Every student's numbers in a column of `collect`'s table (its final rows).

    Only sampling seeds that all its training seeds have, and leave-out estimates only where every
    row has as many.
    """
    rows = final[(final.column == column) & final.seed.notna() & final.value.notna()]
    found = {}
    for student, mine in rows.sort_values(["seed", "sample_seed"]).groupby("student"):
        values = mine.pivot(index="seed", columns="sample_seed", values="value").astype(float)
        values = values.dropna(axis=1)
        if values.empty:
            continue
        groups = mine[mine.sample_seed.isin(values.columns)].leave_out.tolist()
        counts, left = set(map(len, groups)), None
        if len(counts) == 1 and max(counts) > 1:
            left = np.array(groups, float).reshape(*values.shape, -1)
        seeds, noise = tuple(values.index), tuple(values.columns)
        found[student] = Measured(values.to_numpy(), left, seeds, noise)
    return found


def verdict(found: Interval, higher_is_better: bool | None) -> str:
    """Who is better: "a better", "b better", "tie" (the interval contains 0) or "not ranked"; "–"
    of a diagnostic, where nobody is."""
    if higher_is_better is None:
        return "–"
    if found.training_seeds < TRAINING_SEEDS or math.isnan(found.low):
        return "not ranked"
    if found.low <= 0 <= found.high:
        return "tie"
    return "a better" if (found.difference > 0) == higher_is_better else "b better"


def decide(numbers: dict[str, Measured], a: str, b: str, higher_is_better: bool | None) -> dict:
    """The fields of `Interval` and the verdict on a pair of `measured` students, by the training
    seeds that both have. One that is not there (a failed run, an unavailable column) or had other
    noise is not ranked."""
    found = Interval(*[math.nan] * 5, 0)
    if a in numbers and b in numbers and numbers[a].noise == numbers[b].noise:
        common = [seed for seed in numbers[a].seeds if seed in numbers[b].seeds]
        if common:
            found = interval(numbers[a].of(common), numbers[b].of(common))
    return vars(found) | {"verdict": verdict(found, higher_is_better)}


def pairwise(experiment: Experiment, table: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """All pairs of students in each of `columns`: COLUMNS. `table`: `collect`'s."""
    final, rows = table[table.final], []
    metric_of = final.drop_duplicates("column").set_index("column").metric
    for column in columns:
        numbers = measured(final, column)
        higher = METRICS[metric_of[column]].higher_is_better
        for a, b in combinations(experiment.students, 2):
            pair = {"column": column, "a": a, "b": b, "level": LEVEL}
            rows.append(pair | decide(numbers, a, b, higher))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def ranks(pairs: pd.DataFrame, column: str, students: list[str]) -> dict[str, str]:
    """Each student's rank in a column, as `pairwise` decides it: "2" where every pair that it is in
    is decided, "tie 2–4" where some are not (the best and the worst that it can be), "not ranked"
    with too few training seeds. Students that cannot be ranked leave the others' ranks alone."""
    decided = pairs[(pairs.column == column) & (pairs.verdict != "not ranked")]
    told = {}
    for student in students:
        first, second = decided[decided.a == student], decided[decided.b == student]
        ties = sum(int((mine.verdict == "tie").sum()) for mine in (first, second))
        losses = (first.verdict == "b better").sum() + (second.verdict == "a better").sum()
        best = 1 + int(losses)
        told[student] = f"tie {best}–{best + ties}" if ties else str(best)
        if first.empty and second.empty:
            told[student] = "not ranked"
    return told


def number(value: object) -> str:
    """A number as text, three significant digits."""
    return "–" if value is None or pd.isna(value) else f"{value:.3g}"


def write_pairwise(pairs: pd.DataFrame, folder: Path, name: str) -> list[Path]:
    """`pairwise.{csv,md}` in a folder; returns their paths."""
    text = pairs.copy()
    for column in ("difference", "low", "high", "sampling_se", "training_se"):
        text[column] = text[column].map(number)
    body = text.to_markdown(index=False, disable_numparse=True)
    caption = (
        f"Difference: a - b, mean over training and sampling seeds. Interval: {LEVEL:.0%}, for "
        "each pair by itself; sampling error (delete-d jackknife on the same noise in both) and "
        "training error (spread of the difference over training seeds) are both in it. A tie: the "
        f"interval contains 0. Not ranked: fewer than {TRAINING_SEEDS} training seeds or no "
        "number. –: a diagnostic, of which neither end is better."
    )
    files = {
        folder / "pairwise.csv": pairs.to_csv(index=False),
        folder / "pairwise.md": f"# All pairs of students of {name}\n\n{body}\n\n{caption}\n",
    }
    for path, content in files.items():
        write_text(path, content)
    return list(files)
