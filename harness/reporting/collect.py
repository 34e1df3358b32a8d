"""metrics.csv: every number of an experiment in one tidy table, one row per sampling seed."""

from pathlib import Path

import numpy as np
import pandas as pd

from harness.config.experiment import Experiment
from harness.errors import UserError
from harness.evaluation.protocol import fingerprint, reference_fingerprint
from harness.evaluation.registry import Metric, column_name, main_metric
from harness.features.base import provides
from harness.io.artifacts import digest
from harness.io.records import FeatureRecord, ScoreRecord, StudentRecord, TeacherRecord
from harness.workflow import failures

SCHEMA = 2
COLUMNS = (
    *("schema", "experiment", "student", "method", "seed", "snapshot", "nfe", "ema"),
    *("images", "flops", "seconds", "sample_seed", "metric", "extractor", "num_samples"),
    *("reference", "value", "stderr", "protocol", "flag", "status"),
)
INTEGERS = ("seed", "nfe", "sample_seed", "num_samples")
NUMBERS = (*INTEGERS, "ema", "images", "flops", "seconds", "value", "stderr")
TEXTS = ("experiment", "student", "metric", "extractor", "protocol", "flag", "status")
RERUN = "run the workflow again: it scores again and trains nothing"


def main_metric_in(experiment: Experiment, extractor: str) -> Metric:
    """The metric that ranks the students in an extractor's features."""
    return main_metric(experiment.evaluation.main_metric, provides(experiment.features[extractor]))


def main_column(experiment: Experiment, extractor: str) -> str:
    """The column of that metric, at the largest sample count that it accepts."""
    metric = main_metric_in(experiment, extractor)
    return column_name(metric.name, metric.count(experiment.evaluation.num_samples), extractor)


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
    """Read a metrics.csv of any experiment.

    Raises a `UserError` (code "damaged" or "schema") unless the file has this version's schema, all
    columns, at least one row, and finite numbers.
    """
    try:
        table = pd.read_csv(path, dtype=dict.fromkeys(TEXTS, str))
    except (ValueError, OSError) as error:  # pandas' own errors are ValueErrors
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is not a table ({reason}); {RERUN}", "damaged") from None
    if table.empty:
        raise UserError(f"{path} has no rows; {RERUN}", "damaged")
    schemas = list(table["schema"].unique()) if "schema" in table else []
    if schemas != [SCHEMA]:
        found = ", ".join(map(str, schemas)) or "none"
        raise UserError(
            f"{path} has schema {found}; this version reads schema {SCHEMA}; {RERUN}", "schema"
        )
    missing = [column for column in COLUMNS if column not in table]
    if missing:
        raise UserError(f"{path} lacks the columns {', '.join(missing)}; {RERUN}", "damaged")
    for column in NUMBERS:
        numbers = pd.to_numeric(table[column], errors="coerce")
        kind, valid = "a number", np.isfinite(numbers.astype(float))
        if column in INTEGERS:
            kind, valid = "an integer", valid & (numbers % 1 == 0)
        invalid = table[column][table[column].notna() & ~valid]
        if len(invalid):
            row, value = invalid.index[0] + 1, str(invalid.iloc[0])
            raise UserError(
                f"{path}: {column} in row {row} is {value!r}, not {kind}; {RERUN}", "damaged"
            )
        table[column] = numbers
    return table


def require_one_protocol_per_column(table: pd.DataFrame, source: Path) -> None:
    """Raise a `UserError` (code "mixed-protocols") if a column of a table (with `column`) holds
    numbers of several protocols."""
    for column, group in table[table.column != ""].groupby("column"):
        count = group.protocol.nunique(dropna=False)
        if count > 1:
            raise UserError(
                f"{source}: column {column} mixes {count} protocols; delete the older files under "
                "scores/ and run the workflow again",
                "mixed-protocols",
            )


# -- reading score files ------------------------------------------------------------------------


def _current_scores(
    record: StudentRecord | TeacherRecord | None, training: object, path: Path, scoring: object
) -> ScoreRecord | None:
    """A score file, if it and the record of what it scored are up to date and belong together.

    training, scoring: the fingerprints that they should have.
    """
    if record is None or record.fingerprint != digest(training) or not path.exists():
        return None
    scores = ScoreRecord.read(path)
    current = scores.fingerprint == digest(scoring) and scores.weights == record.sha256
    return scores if current else None


def student_record(experiment: Experiment, student: str, seed: int) -> StudentRecord | None:
    """The record of a finished run."""
    return StudentRecord.read_optional(experiment.paths.run(student, seed) / "student.json")


def feature_record(experiment: Experiment, name: str) -> FeatureRecord | None:
    """The record of a trained or fetched feature network."""
    return FeatureRecord.read_optional(experiment.paths.features(name) / "features.json")


def run_scores(experiment: Experiment, student: str, seed: int) -> ScoreRecord | None:
    """A run's scores, if they are up to date."""
    run = experiment.student_run(student, seed)
    record = student_record(experiment, student, seed)
    path, scoring = experiment.paths.scores(student, seed), fingerprint(experiment.scoring())
    return _current_scores(record, [run.fingerprint, run.budget], path, scoring)


def reference_scores(experiment: Experiment, teacher: str) -> ScoreRecord | None:
    """A teacher's scores, if they are up to date."""
    return _current_scores(
        TeacherRecord.read_optional(experiment.paths.teacher(teacher) / "teacher.json"),
        experiment.teacher_fingerprint(teacher),
        experiment.paths.reference_scores(teacher),
        reference_fingerprint(experiment.scoring(), experiment.teachers[teacher].sampler),
    )


def _score_rows(scores: ScoreRecord, names: dict[str, str] | None) -> list[dict]:
    """The tidy rows of a score file. names: entries to read and their names in the table; None:
    all entries, which are snapshots of a student."""
    rows = []
    for entry in scores.entries:
        if names is not None and entry.student not in names:
            continue
        facts = entry.model_dump(include={"snapshot", "nfe", "ema", "images", "flops", "seconds"})
        facts |= {"student": scores.student if names is None else names[entry.student]}
        facts |= {"method": scores.method, "seed": scores.seed}
        facts |= {"final": entry.final, "grid": " ".join(entry.grid)}
        for row in entry.rows:
            flags = [row.flag, "contended" if scores.contended else ""]
            score = row.model_dump(exclude_none=True) | {"flag": " ".join(filter(None, flags))}
            score["reference"] = scores.protocols[row.protocol]["reference"]
            score["features"] = scores.dimensions.get(row.extractor)
            rows.append(facts | score)
    return rows


def collect(experiment: Experiment, partial: bool = False) -> tuple[pd.DataFrame, dict[str, dict]]:
    """The tidy table and the protocols by their hashes.

    Columns beyond metrics.csv: `column`, the name of the number's column in a comparison; `final`,
    whether the row is of the run's last snapshot; `grid`, the snapshot grids that the row is on;
    `leave_out`, the jackknife estimates; `features`, the extractor's feature dimension.

    A run without valid scores raises a `UserError` (code "missing-scores"), or with `partial`
    becomes a row `failed (reason)`.
    """
    protocols: dict[str, dict] = {}
    rows: list[dict] = []
    paths, jobs = experiment.paths, []
    for teacher in experiment.teachers:
        names = {row: experiment.teacher_row(teacher, row) for row in ("teacher", "teacher-1step")}
        # Every teacher's file holds the floor: one job scores both.
        names |= {} if jobs else {"floor": "floor"}
        identity, path = {"student": names["teacher"]}, paths.reference_scores(teacher)
        jobs.append((reference_scores, failures.teacher_status, (teacher,), path, identity, names))
    for student, seed in experiment.runs:
        identity = {"student": student, "method": experiment.students[student].method, "seed": seed}
        path = paths.scores(student, seed)
        jobs.append((run_scores, failures.run_status, (student, seed), path, identity, None))
    for read, status, job, path, identity, names in jobs:
        try:
            scores = read(experiment, *job)
        except UserError:
            if not partial:
                raise
            scores = None
        if scores is not None:
            protocols |= scores.protocols
            rows += _score_rows(scores, names)
        elif partial:
            failed = {"status": status(experiment, *job), "final": True, "grid": ""}
            rows.append(identity | failed)
        else:
            raise UserError(
                f"{path} is missing or belongs to other weights or settings; run the workflow "
                "again",
                "missing-scores",
            )
    table = pd.DataFrame(rows, columns=[*COLUMNS, "final", "grid", "leave_out", "features"])
    table = table.assign(
        schema=SCHEMA, experiment=experiment.name, status=table.status.fillna("ok")
    )
    integers = (*INTEGERS, "ema", "images", "flops", "features")
    table = table.astype(dict.fromkeys(integers, "Int64"))
    table["column"] = columns_of(table)
    require_one_protocol_per_column(table, paths.root / "scores")
    return table, protocols


def columns_of(table: pd.DataFrame) -> list[str]:
    """The column name of each row; empty for rows without a number."""
    return [
        "" if pd.isna(metric) or pd.isna(count) else column_name(metric, int(count), extractor)
        for metric, count, extractor in zip(
            table.metric, table.num_samples, table.extractor, strict=True
        )
    ]
