"""metrics.csv: every number of an experiment in one tidy table, one row per sampling seed."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from harness.config.experiment import Experiment
from harness.errors import UserError
from harness.evaluation.fingerprints import run_scores, teacher_scores
from harness.evaluation.registry import Metric, column_name, main_metric
from harness.features.base import provides
from harness.io.records import FeatureRecord, ScoreRecord, StudentRecord, TeacherRecord
from harness.workflow.status import run_status, teacher_status

SCHEMA = 2
COLUMNS = (
    *("schema", "experiment", "student", "method", "seed", "snapshot", "nfe", "ema"),
    *("images", "flops", "seconds", "sample_seed", "metric", "extractor", "num_samples"),
    *("reference", "value", "stderr", "protocol", "flag", "status", "device"),
)
OPTIONAL = ("device",)  # not in the tables of earlier versions
INTEGERS = ("seed", "nfe", "sample_seed", "num_samples")
NUMBERS = (*INTEGERS, "ema", "images", "flops", "seconds", "value", "stderr")
TEXTS = ("experiment", "student", "metric", "extractor", "protocol", "flag", "status", "device")
RERUN = "run the workflow again: it scores again and trains nothing"


def main_metric_in(experiment: Experiment, extractor: str) -> Metric | None:
    """The metric that ranks the students in an extractor's features; None without such a metric."""
    evaluation, settings = experiment.evaluation, experiment.features[extractor]
    return main_metric(evaluation.main_metric, provides(settings), evaluation.metrics)


def ranking_extractors(experiment: Experiment) -> list[str]:
    """The extractors that have a main metric."""
    names = experiment.evaluation.extractors
    return [name for name in names if main_metric_in(experiment, name) is not None]


def column_of(experiment: Experiment, metric: Metric, extractor: str) -> str:
    """The column of a metric at the largest sample count that it accepts."""
    return column_name(metric.name, metric.count(experiment.evaluation.num_samples), extractor)


def main_column(experiment: Experiment, extractor: str) -> str:
    """The column that ranks the students, of one of the `ranking_extractors`."""
    return column_of(experiment, main_metric_in(experiment, extractor), extractor)


def is_unavailable(status: pd.Series) -> pd.Series:
    """Which rows lack a number because a feature network is unavailable (not a failure)."""
    return status.str.startswith("unavailable")


def flatten(record: dict, prefix: str = "") -> dict:
    """A nested dictionary as one, its keys joined by dots."""
    flat: dict = {}
    for key, value in record.items():
        nested = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


# -- reading metrics.csv ------------------------------------------------------------------------


def read_metrics(path: Path) -> pd.DataFrame:
    """Read a metrics.csv of any experiment. It must have this version's schema, all columns but
    OPTIONAL ones, which are empty if missing, at least one row, and finite numbers (`UserError`
    with code "schema" or "damaged")."""

    def error(reason: str, code: str = "damaged") -> UserError:
        return UserError(f"{path}: {reason}; {RERUN}", code)

    try:
        table = pd.read_csv(path, dtype=dict.fromkeys(TEXTS, str))
    except (ValueError, OSError) as reason:  # pandas' own errors are ValueErrors
        raise error(f"not a table ({' '.join(str(reason).split())})") from None
    if table.empty:
        raise error("no rows")
    found = ", ".join(map(str, table["schema"].unique())) if "schema" in table else "none"
    if found != str(SCHEMA):
        raise error(f"schema {found}, but this version reads schema {SCHEMA}", "schema")
    table = table.assign(**{name: None for name in OPTIONAL if name not in table})
    if missing := [column for column in COLUMNS if column not in table]:
        raise error(f"columns are missing: {', '.join(missing)}")
    for column in NUMBERS:
        numbers = pd.to_numeric(table[column], errors="coerce")
        kind, valid = "a number", np.isfinite(numbers.astype(float))
        if column in INTEGERS:
            kind, valid = "an integer", valid & (numbers % 1 == 0)
        for row, value in table[column][table[column].notna() & ~valid].items():
            raise error(f"{column} in row {row + 1} is {str(value)!r}, not {kind}")
        table[column] = numbers
    return table


def with_columns(table: pd.DataFrame, source: Path) -> pd.DataFrame:
    """The table with `column`, the name of each number's column in a comparison ("" without a
    number). A column with several protocols raises a `UserError` (code "mixed-protocols")."""
    keys = table[["metric", "num_samples", "extractor"]].itertuples(index=False)
    names = ["" if pd.isna(m) or pd.isna(n) else column_name(m, int(n), e) for m, n, e in keys]
    table = table.assign(column=names)
    counts = table[table.column != ""].groupby("column").protocol.nunique(dropna=False)
    for column, count in counts[counts > 1].items():
        message = f"{source}: column {column} mixes {count} protocols; delete the older files"
        raise UserError(f"{message} under scores/ and run the workflow again", "mixed-protocols")
    return table


# -- reading score files ------------------------------------------------------------------------


def feature_record(experiment: Experiment, name: str) -> FeatureRecord | None:
    """The record of a trained or fetched feature network."""
    return FeatureRecord.read_optional(experiment.paths.features(name) / "features.json")


def training_record(
    experiment: Experiment, name: str, seed: int | None = None
) -> StudentRecord | TeacherRecord | None:
    """The record of a student's finished run or, without a seed, of a teacher."""
    if seed is None:
        return TeacherRecord.read_optional(experiment.paths.teacher(name) / "teacher.json")
    return StudentRecord.read_optional(experiment.paths.run(name, seed) / "student.json")


def scores_path(experiment: Experiment, name: str, seed: int | None = None) -> Path:
    """The score file of a run or, without a seed, of a teacher and the floor."""
    paths = experiment.paths
    return paths.reference_scores(name) if seed is None else paths.scores(name, seed)


def current_scores(
    experiment: Experiment, name: str, seed: int | None = None
) -> ScoreRecord | None:
    """The scores in `scores_path`, if they are of the current weights and settings."""
    path, scoring = scores_path(experiment, name, seed), experiment.scoring()
    if seed is not None:
        return run_scores(scoring, experiment.student_run(name, seed), path)
    return teacher_scores(scoring, experiment.teacher_job(name), path)


def device_text(scores: ScoreRecord, trained: bool = True) -> str | None:
    """Where the network of a score file was trained, and where it was scored if that is another
    device: "NVIDIA H200" or "NVIDIA H200, scored on cpu". Only where it was scored, for networks
    that were not trained here and for real images (`trained`: False). None if unknown."""
    trained_on = scores.trained_on if trained else None
    if trained_on is None or scores.device_name in (None, trained_on):
        return trained_on or scores.device_name
    return f"{trained_on}, scored on {scores.device_name}"


def _score_rows(scores: ScoreRecord, names: dict[str | None, str]) -> Iterator[dict]:
    """The tidy rows of a score file. names: entries (None: a student's snapshots) -> `student`."""
    for entry in [entry for entry in scores.entries if entry.student in names]:
        facts = entry.model_dump(exclude={"rows"}) | {"student": names[entry.student]}
        facts |= {"method": scores.method, "seed": scores.seed, "grid": " ".join(entry.grid)}
        for row in entry.rows:
            flags = [row.flag, "contended" if scores.contended else ""]
            flags += ["released"] if scores.released else []
            flags += ["selection"] if entry.selection else []
            flags += [f"selected-among-{entry.selected}"] if entry.selected else []
            facts["flag"] = " ".join(filter(None, flags))
            facts["reference"] = scores.protocols[row.protocol]["reference"]
            facts["features"] = scores.dimensions.get(row.extractor)
            facts["device"] = device_text(scores, trained=entry.student != "floor")
            yield row.model_dump(exclude_none=True) | facts


def collect(experiment: Experiment, partial: bool = False) -> tuple[pd.DataFrame, dict[str, dict]]:
    """The tidy table and the protocols by their hashes.

    Columns beyond metrics.csv: `column`, the name of the number's column in a comparison; `final`,
    whether the row is of the run's last snapshot; `grid`, the snapshot grids that the row is on;
    `selected`, for the best snapshot, how many were compared; `leave_out`, the jackknife estimates;
    `features`, the extractor's feature dimension. Rows of the selection seed have the flag
    `selection`, those of the best snapshot the flag `selected-among-<n>`.

    A run without valid scores raises a `UserError` (code "missing-scores"), or with `partial`
    becomes a row `failed (reason)`.
    """
    protocols, rows = {}, []
    teachers = [(teacher,) for teacher in experiment.teachers]
    for job in [*teachers, *experiment.runs]:
        if job in teachers:
            names = {r: experiment.teacher_row(job[0], r) for r in ("teacher", "teacher-1step")}
            # Every teacher's file holds the floor.
            names |= {"floor": "floor"} if job == teachers[0] else {}
            facts, status = {"student": names["teacher"]}, teacher_status
        else:
            student, seed = job
            names, status = {None: student}, run_status
            facts = {"student": student, "seed": seed}
            facts["method"] = experiment.students[student].method
        try:
            if (scores := current_scores(experiment, *job)) is None:
                problem = "is missing or belongs to other weights or settings"
                message = f"{scores_path(experiment, *job)} {problem}; run the workflow again"
                raise UserError(message, "missing-scores")
            protocols |= scores.protocols
            rows += _score_rows(scores, names)
        except UserError:
            if not partial:
                raise
            rows.append(facts | {"status": status(experiment, *job), "final": True, "grid": ""})
    more = ("final", "grid", "selected", "leave_out", "features")
    table = pd.DataFrame(rows, columns=[*COLUMNS, *more])
    status = table.status.fillna("ok")
    table = table.assign(schema=SCHEMA, experiment=experiment.name, status=status)
    integers = (*INTEGERS, "ema", "images", "flops", "features", "selected")
    table = table.astype(dict.fromkeys(integers, "Int64"))
    return with_columns(table, experiment.paths.root / "scores"), protocols
