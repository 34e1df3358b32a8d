"""Differences between students: intervals, ranks, and tables/pairwise.{csv,md}.

A score has a *sampling error*, from the noise that the images were generated from, and a *training
error*, from the training seed. Both are estimated on pairs: image i has the same noise in every
student, and a training seed gives every student the same noise and labels. Samples are never
resampled with replacement, because a Fréchet distance measures the noise of the second draw as
distance: its bootstrap distribution lies many standard errors above the estimate.
"""

import math
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd

from harness.config.experiment import Experiment
from harness.evaluation.registry import METRICS
from harness.reporting.formatting import rounded, write_table

LEVEL = 0.95
TRAINING_SEEDS = 3  # with fewer, the spread over training seeds is too uncertain for a rank
COLUMNS = (
    *("column", "a", "b", "difference", "low", "high", "level"),
    *("sampling_se", "training_se", "training_seeds", "verdict"),
)


@dataclass
class SeedScores:
    """One student's scores in one column: T training seeds, R sampling seeds, G groups of images.

    values: `(T, R)`. leave_out: `(T, R, G)`, the score without each group, if the metric has it.
    """

    values: np.ndarray
    leave_out: np.ndarray | None = None
    seeds: tuple[int, ...] = ()
    sampling_seeds: tuple[int, ...] = ()

    def select(self, seeds: list[int]) -> Self:
        """The scores of some of the training seeds."""
        index = [self.seeds.index(seed) for seed in seeds]
        leave_out = None if self.leave_out is None else self.leave_out[index]
        return replace(self, values=self.values[index], leave_out=leave_out, seeds=tuple(seeds))


@dataclass(frozen=True)
class Interval:
    """A difference a - b, its confidence interval and its two standard errors (NaN: unknown)."""

    difference: float
    low: float
    high: float
    sampling_se: float
    training_se: float
    training_seeds: int


def sampling_variance(a: SeedScores, b: SeedScores) -> tuple[float, float]:
    """Variance of a - b over the draw of the noise, and its degrees of freedom.

    A delete-d jackknife on pairs, which leaves the same images out of both students: with d[r, -g]
    the difference at sampling seed r without the images of group g, averaged over training seeds,

        v[r] = (G - 1) / G · Σ_g (d[r, -g] - mean_g d[r, -g])²,    v = Σ_r v[r] / R²

    because the R ranges of noise are disjoint; R (G - 1) degrees of freedom. For a metric without
    leave-out estimates: v = var_r(d[r]) / R with R - 1 degrees of freedom.
    """
    if a.leave_out is None or b.leave_out is None:
        return _variance_of_mean(a.values.mean(axis=0) - b.values.mean(axis=0))
    left = a.leave_out.mean(axis=0) - b.leave_out.mean(axis=0)  # (R, G)
    seeds, groups = left.shape
    variance = (groups - 1) * left.var(axis=1).sum() / seeds**2
    return float(variance), float(seeds * (groups - 1))


def training_variance(a: SeedScores, b: SeedScores) -> tuple[float, float]:
    """Variance of a - b over T training seeds, `s² / T`, and its T - 1 degrees of freedom. s:
    standard deviation of the difference between the runs of one seed, as in a paired t test."""
    return _variance_of_mean(a.values.mean(axis=1) - b.values.mean(axis=1))


def _variance_of_mean(difference: np.ndarray) -> tuple[float, float]:
    if len(difference) < 2:
        return math.nan, math.nan
    return float(difference.var(ddof=1) / len(difference)), float(len(difference) - 1)


def interval(a: SeedScores, b: SeedScores) -> Interval:
    """The interval of a - b at LEVEL, for students with the same training and sampling seeds:

        difference ± sqrt(t(R (G - 1))² · v_noise + t(T - 1)² · v_training)

    v_noise: `sampling_variance`; v_training: `training_variance`; t(df): Student's quantile with
    the degrees of freedom of its variance. The interval is exact if one of the errors is 0, else
    conservative; one quantile with the degrees of freedom of Welch and Satterthwaite would cover
    92 % instead of 95 % at three training seeds. With one training seed the interval is NaN.
    """
    from scipy.special import stdtrit

    difference = float(a.values.mean() - b.values.mean())
    parts = [sampling_variance(a, b), training_variance(a, b)]
    half = math.sqrt(sum(float(stdtrit(df, (1 + LEVEL) / 2)) ** 2 * v for v, df in parts))
    errors = [math.sqrt(variance) for variance, _ in parts]
    return Interval(difference, difference - half, difference + half, *errors, len(a.values))


def seed_scores(final: pd.DataFrame, column: str) -> dict[str, SeedScores]:
    """Every student's scores in a column of `collect`'s table (its final rows).

    Only sampling seeds that all training seeds of the student have; leave-out estimates only if
    every row has the same number of them.
    """
    rows = final[(final.column == column) & final.seed.notna() & final.value.notna()]
    scores = {}
    for student, group in rows.sort_values(["seed", "sample_seed"]).groupby("student"):
        values = group.pivot(index="seed", columns="sample_seed", values="value").astype(float)
        values = values.dropna(axis=1)
        if values.empty:
            continue
        estimates = group[group.sample_seed.isin(values.columns)].leave_out.tolist()
        counts, leave_out = set(map(len, estimates)), None
        if len(counts) == 1 and max(counts) > 1:
            leave_out = np.array(estimates, float).reshape(*values.shape, -1)
        scores[student] = SeedScores(values.to_numpy(), leave_out, *map(tuple, values.axes))
    return scores


def verdict(result: Interval, higher_is_better: bool | None) -> str:
    """Decide a pair: "a better", "b better", "tie" (the interval contains 0), "not ranked" (too few
    training seeds), or "–" for a diagnostic metric, which has no preferred direction."""
    if higher_is_better is None:
        return "–"
    if result.training_seeds < TRAINING_SEEDS or math.isnan(result.low):
        return "not ranked"
    if result.low <= 0 <= result.high:
        return "tie"
    return "a better" if (result.difference > 0) == higher_is_better else "b better"


def decide(scores: dict[str, SeedScores], a: str, b: str, higher_is_better: bool | None) -> dict:
    """The fields of `Interval` and the verdict for two students, from their common training seeds:
    "not ranked" without scores (of a failed run) or with different sampling seeds."""
    result = Interval(*[math.nan] * 5, 0)
    if a in scores and b in scores and scores[a].sampling_seeds == scores[b].sampling_seeds:
        common = [seed for seed in scores[a].seeds if seed in scores[b].seeds]
        if common:
            result = interval(scores[a].select(common), scores[b].select(common))
    return vars(result) | {"verdict": verdict(result, higher_is_better)}


def pairwise(experiment: Experiment, table: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """All pairs of students in each of `columns` of `collect`'s table. Its columns: COLUMNS."""
    final, rows = table[table.final], []
    metric_of = final.drop_duplicates("column").set_index("column").metric
    for column in columns:
        scores = seed_scores(final, column)
        higher = METRICS[metric_of[column]].higher_is_better
        for a, b in combinations(experiment.students, 2):
            pair = {"column": column, "a": a, "b": b, "level": LEVEL}
            rows.append(pair | decide(scores, a, b, higher))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def ranks(pairs: pd.DataFrame, column: str, students: list[str]) -> dict[str, str]:
    """Each student's rank in a column of `pairwise`: "2" if all its pairs are decided, "tie 2–4"
    (its best and worst possible rank) if some are ties, "not ranked" with too few training seeds:
    such students do not affect the ranks of the others."""
    decided = pairs[(pairs.column == column) & (pairs.verdict != "not ranked")]
    swapped, rank_of = {"a better": "b better", "b better": "a better"}, {}
    for student in students:
        as_a, as_b = decided[decided.a == student].verdict, decided[decided.b == student].verdict
        verdicts = [*as_a, *as_b.replace(swapped)]
        best, ties = 1 + verdicts.count("b better"), verdicts.count("tie")
        rank = f"tie {best}–{best + ties}" if ties else str(best)
        rank_of[student] = rank if verdicts else "not ranked"
    return rank_of


def write_pairwise(pairs: pd.DataFrame, folder: Path, name: str) -> list[Path]:
    """Write pairwise.{csv,md} to a folder; returns their paths."""
    caption = (
        f"Difference: a - b, mean over training and sampling seeds. Interval: {LEVEL:.0%} for each "
        "pair, not corrected for multiple comparisons; it includes the sampling error (delete-d "
        "jackknife on the same noise in both) and the training error (spread of the difference "
        "over training seeds). tie: the interval contains 0. not ranked: fewer than "
        f"{TRAINING_SEEDS} training seeds or a missing score. –: a diagnostic metric without a "
        "preferred direction."
    )
    title = f"All pairs of students of {name}"
    texts = rounded(pairs, "difference", "low", "high", "sampling_se", "training_se")
    return write_table(pairs, folder, "pairwise", title, caption, texts)
