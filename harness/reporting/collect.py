"""metrics.csv: every number of an experiment in one tidy table, one row per sampling seed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from harness import SCORES_FORMAT
from harness.config.experiment import Experiment
from harness.errors import UserError
from harness.evaluation.columns import column_name
from harness.evaluation.registry import Metric, main_metric
from harness.features.base import provides
from harness.io.artifacts import digest, read_json
from harness.workflow import failures

SCHEMA = 2
COLUMNS = (
    *("schema", "experiment", "student", "method", "seed", "snapshot", "nfe", "ema"),
    *("images", "flops", "seconds", "sample_seed", "metric", "extractor", "num_samples"),
    *("reference", "value", "stderr", "protocol", "flag", "status"),
)


WHOLE = ("seed", "nfe", "sample_seed", "num_samples")
NUMBERS = (*WHOLE, "ema", "images", "flops", "seconds", "value", "stderr")
TEXTS = ("experiment", "student", "metric", "extractor", "protocol", "flag", "status")


def main_metric_in(experiment: Experiment, extractor: str) -> Metric:
    """The metric that students are ranked and drawn by in an extractor's features."""
    return main_metric(experiment.evaluation.main_metric, provides(experiment.features[extractor]))


def main_column(experiment: Experiment, extractor: str) -> str:
    """Its column, at the most samples that it takes."""
    metric = main_metric_in(experiment, extractor)
    return column_name(metric.name, metric.count(experiment.evaluation.num_samples), extractor)


def _check_schema(path: Path, found: object, known: int, remedy: str) -> None:
    if found != known:
        age = "an older" if not isinstance(found, int) or found < known else "a newer"
        raise UserError(
            f"{path} was written by {age} version of the harness (schema {found}, here {known}); "
            f"{remedy}"
        )


def read_metrics(path: Path) -> pd.DataFrame:
    """A metrics.csv, of this experiment or another; one of another schema is a `UserError`."""
    try:
        table = pd.read_csv(path, dtype=dict.fromkeys(TEXTS, str))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; run the workflow") from None
    except (ValueError, OSError) as error:  # pandas' own errors are ValueErrors
        raise UserError(f"{path} is no table ({' '.join(str(error).split())})") from None
    remedy = "run the workflow again: it rescores, and trains nothing"
    if table.empty and "schema" in table:
        raise UserError(f"{path} has no rows; {remedy}")
    found = sorted(table["schema"].unique().tolist()) if "schema" in table else []
    _check_schema(path, found[0] if len(found) == 1 else found or "none", SCHEMA, remedy)
    missing = [column for column in COLUMNS if column not in table]
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)}; {remedy}")
    for column in NUMBERS:
        numbers = pd.to_numeric(table[column], errors="coerce")
        wrong = table[column].notna() & ~np.isfinite(numbers.astype(float))
        if column in WHOLE:
            wrong |= numbers.notna() & (numbers % 1 != 0)
        if wrong.any():
            row = int(wrong.to_numpy().argmax())
            kind = "whole number" if column in WHOLE else "number"
            found = str(table[column].iloc[row])
            raise UserError(f"{path}: {column} in row {row + 1} is {found!r}, no {kind}; {remedy}")
        table[column] = numbers
    return table


def flat(record: dict, prefix: str = "") -> dict:
    """Nested keys joined by dots."""
    out: dict = {}
    for key, value in record.items():
        nested = isinstance(value, dict)
        out |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return out


def is_unavailable(status: pd.Series) -> pd.Series:
    """Which rows stand for a number that was not to be had; nothing failed there."""
    return status.str.startswith("unavailable")


def _score(made: Path, made_spec: object, scores: Path, score_spec: object) -> dict | None:
    """The scores of what the record `made` describes, if both are what the experiment now asks
    for and belong together. A score file of another schema is a `UserError`."""
    if not made.exists() or not scores.exists():
        return None
    record, score = read_json(made), read_json(scores)
    remedy = "run the workflow again: it rescores, and trains nothing"
    _check_schema(scores, score.get("schema"), SCORES_FORMAT, remedy)
    present = record["spec"] == digest(made_spec) and score.get("spec") == digest(score_spec)
    return score if present and score["weights"] == record["sha256"] else None


def _reference_files(experiment: Experiment, teacher: str) -> tuple[tuple, tuple]:
    """A teacher's record and its scores, each with its spec."""
    return (
        (experiment.teacher_dir(teacher) / "teacher.json", experiment.teacher_spec(teacher)),
        (experiment.reference_score_path(teacher), experiment.reference_score_spec(teacher)),
    )


def reference_scores(experiment: Experiment, teacher: str) -> dict | None:
    """A teacher's score file, if it is what the experiment now asks for."""
    made, scores = _reference_files(experiment, teacher)
    return _score(*made, *scores)


def _rows(
    experiment: Experiment, record: dict, common: dict, names: dict[str, str] | None
) -> list[dict]:
    rows = []
    for entry in record["entries"]:
        facts = {
            key: entry[key] for key in ("snapshot", "nfe", "ema", "images", "flops", "seconds")
        }
        name = entry.get("student", record.get("student"))
        if names is not None:
            if name not in names:
                continue
            name = names[name]
        for row in entry["rows"]:
            protocol = record["protocols"][row["protocol"]]
            flags = [row["flag"], "contended" if record.get("contended") else ""]
            rows.append(
                common
                | facts
                | row
                | {
                    "student": name,
                    "method": record["method"],
                    "seed": record["seed"],
                    "reference": protocol["reference"],
                    "flag": " ".join(filter(None, flags)),
                    "final": entry["final"],
                    "grid": " ".join(entry["grid"]),
                    "features": record["dimensions"].get(row["extractor"]),
                }
            )
    return rows


def collect(experiment: Experiment, partial: bool = False) -> tuple[pd.DataFrame, dict[str, dict]]:
    """The tidy table (with columns more than metrics.csv: `final`, `grid`, `leave_out`, `column`;
    `features`: how many the extractor gives) and the protocols.

    A run without valid scores is an error, or with `partial` a row `failed (reason)`.
    """
    rows, protocols = [], {}
    common = {"schema": SCHEMA, "experiment": experiment.name, "status": "ok"}

    def add(
        made: tuple,
        scores: tuple,
        identity: dict,
        reason: Callable[[], str],
        names: dict[str, str] | None = None,
    ) -> None:
        """`names`: the entries of the score file to take, and what to call them; None: all."""
        try:
            record = _score(*made, *scores)
        except UserError:
            if not partial:
                raise
            record = None  # old scores are as good as none
        if record is not None:
            protocols.update(record["protocols"])
            rows.extend(_rows(experiment, record, common, names))
        elif partial:
            failed = {"status": reason(), "final": True, "grid": ""}
            rows.append(common | identity | failed)
        else:
            raise UserError(
                f"{scores[0]} is missing or belongs to other weights or settings; run the "
                "workflow again"
            )

    first = next(iter(experiment.teachers))
    for teacher in experiment.teachers:
        add(
            *_reference_files(experiment, teacher),
            {"student": experiment.teacher_row(teacher)},
            functools.partial(failures.teacher_status, experiment, teacher),
            # The floor stands in every teacher's file, since one job makes both.
            {row: experiment.teacher_row(teacher, row) for row in ("teacher", "teacher-1step")}
            | ({"floor": "floor"} if teacher == first else {}),
        )
    for student, seed in experiment.runs:
        add(
            (
                experiment.run_dir(student, seed) / "student.json",
                [experiment.run_spec(student, seed), experiment.budget_spec(student)],
            ),
            (experiment.score_path(student, seed), experiment.score_spec()),
            {"student": student, "method": experiment.students[student].method, "seed": seed},
            functools.partial(failures.run_status, experiment, student, seed),
        )
    table = pd.DataFrame(rows, columns=[*COLUMNS, "final", "grid", "leave_out", "features"])
    for column in (
        "seed",
        "nfe",
        "ema",
        "images",
        "flops",
        "sample_seed",
        "num_samples",
        "features",
    ):
        table[column] = table[column].astype("Int64")
    table["column"] = [
        "" if pd.isna(n) else column_name(m, n, e)
        for m, n, e in zip(table.metric, table.num_samples, table.extractor, strict=True)
    ]
    one_protocol_per_column(table, experiment.root / "scores")
    return table, protocols


def one_protocol_per_column(table: pd.DataFrame, where: Path) -> None:
    """Refuse a table (with `column`) that `where` gave if numbers of two protocols would be
    averaged or stand in one column."""
    for column, group in table[table.column != ""].groupby("column"):
        count = group.protocol.nunique(dropna=False)
        if count > 1:
            raise UserError(
                f"{where}: column {column} would mix {count} protocols; delete the older files "
                "under scores/ and run the workflow again"
            )
