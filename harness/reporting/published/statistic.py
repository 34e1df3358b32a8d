"""Which statistic a published FID is, and the same statistic of a run here.

An FID varies with the noise of the samples and, more, over the snapshots of a run, so the minimum
of three evaluations, the mean of ten, and the best snapshot of many are different numbers.
"""

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

import pandas as pd

from harness.config.experiment import Experiment
from harness.evaluation.registry import column_name
from harness.evaluation.selection import criterion
from harness.reporting.published.exact import is_published_fid
from harness.reporting.published.match import base, published


@dataclass(frozen=True)
class Statistic:
    """A statistic of `evaluations`, each of other samples. every: of a number of the snapshot with
    the lowest FID: the training images between the snapshots that the authors compared, and the
    largest distance that an exact experiment may use; None: of the last snapshot."""

    kind: Literal["mean", "minimum"]
    evaluations: int
    source: str
    every: tuple[int, int] | None = None

    def __str__(self) -> str:
        kind = f"the {self.kind} of {self.evaluations} evaluations"
        kind = kind if self.evaluations > 1 else "one evaluation"
        best = " of the snapshot with the lowest FID" if self.every else ""
        return f"{kind}{best} ({self.source})"


EDM = Statistic("minimum", 3, "NVlabs/edm README")
# sid_metrics.py evaluates a given snapshot ten times; that the snapshot is the one with the lowest
# FID is inferred from the names of the released checkpoints, which are not of the end of training.
SID = "mingyuanzhou/SiD sid_metrics.py; the selection is inferred from its checkpoints"
GDD = Statistic("mean", 1, "Zyriix/GDD training code", (250_000, 250_000))
# (paper, method) -> the statistic of its numbers. Others are not documented.
STATISTICS = {
    ("EDM", "edm"): EDM,
    ("SiD", "sid"): Statistic("mean", 10, SID, (500_000, 5_000_000)),
    ("SiDA", "sida family"): Statistic("mean", 10, "mingyuanzhou/SiD sid_metrics.py"),
    ("GDD", "gdd"): GDD,
    ("GDD", "gdd-i"): GDD,
}
# (paper, data set) whose authors compared other snapshots.
EVERY = {("SiD", "ImageNet-64"): (1_000_000, 5_000_000)}


def quotes(number: float, original: float) -> bool:
    """Whether a number is the original, rounded to the number's own digits. FIDs are printed with
    two decimals at least, of which numbers.yaml omits trailing zeros."""
    decimals = max(2, len(str(number).partition(".")[2]))
    return abs(number - original) <= 0.5 * 10**-decimals + 1e-9


def statistic_of(entry: dict) -> Statistic | None:
    """The statistic of a published number; None if its source does not state it. A number that
    another paper quotes, rounded, has that of the original."""
    method = base(entry["method"])
    found = STATISTICS.get((entry["paper"], method))
    if found is None and entry["value"] is not None:
        for paper in (p for p, name in STATISTICS if name == method):
            same = {"paper": paper, "metric": entry["metric"], "dataset": entry["dataset"]}
            same |= {"conditioning": entry["conditioning"]}
            originals = [e for e in published() if same.items() <= e.items()]
            originals = [e["value"] for e in originals if base(e["method"]) == method]
            if any(quotes(entry["value"], value) for value in originals):
                return statistic_of(entry | {"paper": paper})
    every = EVERY.get((entry["paper"], entry["dataset"]))
    if found and every:
        return Statistic(found.kind, found.evaluations, found.source, every)
    return found


def is_fid(metric) -> bool:
    return isinstance(metric, str) and re.fullmatch(r"fid(-.*)?", metric) is not None


def fid_rows(experiment: Experiment, table: pd.DataFrame, name: str) -> tuple[pd.DataFrame, str]:
    """The FIDs of a row of `collect`'s table at the main sample count, of the last and the selected
    snapshot, and the name of their column with the flags of the last one. If there are several
    columns: EDM's protocol, which all papers here use, in the extractor that is named first: it is
    the one that `evaluation.statistics` belongs to."""
    rows = table[(table.final | table.selected.notna()) & (table.student == name)]
    rows = rows[rows.metric.map(is_fid).astype(bool) & (rows.status == "ok")]
    rows = rows[rows.num_samples == experiment.evaluation.num_samples]
    if not rows.final.any():
        return rows[:0], ""
    order = [*experiment.evaluation.extractors, *rows.extractor].index
    rank = rows.extractor.map(order)
    columns = zip(rows.metric != "fid-edm", rank, rows.metric, rows.extractor, strict=True)
    _, _, metric, extractor = min(columns)
    rows = rows[(rows.metric == metric) & (rows.extractor == extractor)]
    label = column_name(metric, experiment.evaluation.num_samples, extractor)
    flags = set(" ".join(rows.flag[rows.final].dropna()).split())
    flags = sorted(flag for flag in flags if not flag.startswith("selected-"))
    return rows, " ".join([label, *flags])


class Measurement(NamedTuple):
    """One FID for each training seed. text: which statistic it is. snapshots: how many snapshots of
    each run were compared, at most."""

    values: pd.Series
    text: str
    snapshots: int


def measure(rows: pd.DataFrame, statistic: Statistic | None, released: bool = False) -> Measurement:
    """A statistic of `fid_rows`, as far as they allow: the minimum of its first evaluations or the
    mean of all, at the selected snapshot or the last one. None: the mean at the last one. released:
    the only snapshot is one that the authors selected."""
    selected = rows.selected.notna()
    best = statistic is not None and statistic.every is not None and selected.any()
    rows = rows[selected if best else rows.final]
    groups = rows.value.astype(float).groupby(rows.seed, dropna=False)
    count = int(groups.size().min())
    looked = int(rows.selected.max()) if best else 1
    where = f"the best of {looked} snapshots" if best else "the last snapshot"
    where = "the authors' released weights" if released else where
    wanted = statistic.evaluations if statistic else 1
    if statistic and statistic.kind == "minimum" and count >= wanted:
        values = groups.apply(lambda values: values.iloc[:wanted].min())
        return Measurement(values, f"the minimum of {wanted} evaluations", 1)
    kind = f"the mean of {count} evaluations" if count > 1 else "one evaluation"
    return Measurement(groups.mean(), f"{kind} of {where}", looked)


def of_best(experiment: Experiment, name: str, statistic: Statistic | None) -> bool:
    """Whether a statistic requires the selection of a snapshot of a student. The authors selected
    the released weights."""
    trained = name in experiment.students and name not in experiment.released
    return trained and statistic is not None and statistic.every is not None


def statistic_differences(experiment: Experiment, name: str, entry: dict) -> list[str]:
    """How the statistic that an experiment measures of a row (a student or a teacher) differs from
    that of a published FID: phrases about its sampling seeds, the selection of a snapshot, and the
    grid of snapshots. Empty if it is the same, or if the source does not state its statistic."""
    statistic, evaluation = statistic_of(entry), experiment.evaluation
    if statistic is None:
        return []
    count, differences = len(evaluation.sampling_seeds), []
    if count < statistic.evaluations:
        text = f"{count} sampling seed{'s' * (count != 1)} instead of {statistic.evaluations}"
        differences.append(text)
    if not of_best(experiment, name, statistic):
        return differences
    if evaluation.selection_seed is None:
        differences.append("the last snapshot instead of that with the lowest FID")
    elif not is_published_fid(metric := criterion(experiment.scoring()).metric.name, entry):
        differences.append(f"the snapshot is selected by {metric} instead of the published FID")
    finest, coarsest = statistic.every
    grids = experiment.students[name].snapshots
    grid = grids.get("images")
    if grid is None or grid.every is None or "flops" in grids:
        differences.append(f"snapshots not every {finest:,} images")
    elif not finest <= grid.every <= coarsest:
        differences.append(f"snapshots every {grid.every:,.0f} images instead of {finest:,}")
    return differences
