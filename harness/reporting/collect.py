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
from harness.workflow.status import run_status, teacher_status

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


def column_of(experiment: Experiment, metric: Metric, extractor: str) -> str:
    """The column of a metric at the largest sample count that it accepts."""
    return column_name(metric.name, metric.count(experiment.evaluation.num_samples), extractor)


def main_column(experiment: Experiment, extractor: str) -> str:
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
    """Read a metrics.csv of any experiment.

    Raises a `UserError` (code "damaged" or "schema") unless the file has this version's schema, all
    columns, at least one row, and finite numbers.
    """

    def error(reason: str, code: str = "damaged") -> UserError:
        return UserError(f"{path} {reason}; {RERUN}", code)

    try:
        table = pd.read_csv(path, dtype=dict.fromkeys(TEXTS, str))
    except (ValueError, OSError) as reason:  # pandas' own errors are ValueErrors
        raise error(f"is not a table ({' '.join(str(reason).split())})") from None
    if table.empty:
        raise error("has no rows")
    schemas = list(table["schema"].unique()) if "schema" in table else []
    if schemas != [SCHEMA]:
        found = ", ".join(map(str, schemas)) or "none"
        raise error(f"has schema {found}; this version reads schema {SCHEMA}", "schema")
    if missing := [column for column in COLUMNS if column not in table]:
        raise error(f"lacks the columns {', '.join(missing)}")
    for column in NUMBERS:
        numbers = pd.to_numeric(table[column], errors="coerce")
        kind, valid = "a number", np.isfinite(numbers.astype(float))
        if column in INTEGERS:
            kind, valid = "an integer", valid & (numbers % 1 == 0)
        for row, value in table[column][table[column].notna() & ~valid].items():
            reason = f"{column} in row {row + 1} is {str(value)!r}, not {kind}"
            raise UserError(f"{path}: {reason}; {RERUN}", "damaged")
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
        raise UserError(
            f"{source}: column {column} mixes {count} protocols; delete the older files under "
            "scores/ and run the workflow again",
            "mixed-protocols",
        )
    return table


# -- reading score files ------------------------------------------------------------------------


def _current_scores(
    record: StudentRecord | TeacherRecord | None, training: object, path: Path, scoring: object
) -> ScoreRecord | None:
    """A score file, if it and the record of what it scored belong together and have the
    fingerprints `scoring` and `training`."""
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


def _score_rows(scores: ScoreRecord, names: dict[str | None, str]) -> list[dict]:
    """The tidy rows of a score file. names: entries to read -> their names in the table; entries
    without a name are a student's snapshots."""
    rows = []
    for entry in scores.entries:
        if entry.student not in names:
            continue
        facts = entry.model_dump(exclude={"rows"})
        facts |= {"student": names[entry.student], "grid": " ".join(entry.grid)}
        facts |= {"method": scores.method, "seed": scores.seed}
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
        jobs.append((reference_scores, teacher_status, (teacher,), path, identity, names))
    for student, seed in experiment.runs:
        identity = {"student": student, "method": experiment.students[student].method, "seed": seed}
        path, names = paths.scores(student, seed), {None: student}
        jobs.append((run_scores, run_status, (student, seed), path, identity, names))
    for read, status, job, path, identity, names in jobs:
        try:
            if (scores := read(experiment, *job)) is None:
                problem = "is missing or belongs to other weights or settings"
                raise UserError(f"{path} {problem}; run the workflow again", "missing-scores")
            protocols |= scores.protocols
            rows += _score_rows(scores, names)
        except UserError:
            if not partial:
                raise
            failed = {"status": status(experiment, *job), "final": True, "grid": ""}
            rows.append(identity | failed)
    facts = {"schema": SCHEMA, "experiment": experiment.name}
    table = pd.DataFrame(rows, columns=[*COLUMNS, "final", "grid", "leave_out", "features"])
    table = table.assign(status=table.status.fillna("ok"), **facts)
    integers = (*INTEGERS, "ema", "images", "flops", "features")
    table = table.astype(dict.fromkeys(integers, "Int64"))
    return with_columns(table, paths.root / "scores"), protocols
