"""metrics.csv: every number of an experiment in one tidy table."""

from __future__ import annotations

import pandas as pd

from harness import failures
from harness.artifacts import read_json
from harness.config import Experiment
from harness.errors import UserError

SCHEMA = 1
COLUMNS = (
    *("schema", "experiment", "student", "method", "seed", "snapshot", "nfe", "ema"),
    *("images", "flops", "seconds", "sample_seed", "metric", "extractor", "num_samples"),
    *("reference", "value", "stderr", "protocol", "flag", "status"),
)


def column_name(metric: str, num_samples: int, extractor: str) -> str:
    """`fd_n2000_digits-cnn`: what a column of a comparison is called."""
    return f"{metric}_n{num_samples}_{extractor}"


def _score(experiment: Experiment, student: str, seed: int) -> dict | None:
    """The run's scores, if they belong to its present weights."""
    run, path = (
        experiment.run_dir(student, seed) / "student.json",
        experiment.score_path(student, seed),
    )
    if not run.exists() or not path.exists():
        return None
    score = read_json(path)
    return score if score["weights"] == read_json(run)["sha256"] else None


def _rows(experiment: Experiment, record: dict, common: dict) -> list[dict]:
    rows = []
    for entry in record["entries"]:
        facts = {
            key: entry[key] for key in ("snapshot", "nfe", "ema", "images", "flops", "seconds")
        }
        name = entry.get("student", record.get("student"))
        real = name == "floor"
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
                    "sample_seed": None if real else experiment.evaluation.sampling_seed,
                    "reference": protocol["reference"],
                    "flag": " ".join(filter(None, flags)),
                    "final": entry["final"],
                    "grid": " ".join(entry["grid"]),
                }
            )
    return rows


def collect(experiment: Experiment, partial: bool = False) -> tuple[pd.DataFrame, dict[str, dict]]:
    """The tidy table (with two columns more than metrics.csv: `final`, `grid`) and the protocols.

    A run without valid scores is an error, or with `partial` a row `failed (reason)`.
    """
    rows, protocols = [], {}
    common = {"schema": SCHEMA, "experiment": experiment.name, "status": "ok"}
    for teacher in experiment.teachers:
        path = experiment.reference_score_path(teacher)
        if path.exists() or not partial:
            record = read_json(path)
            protocols |= record["protocols"]
            rows += _rows(experiment, record, common)
    for student, seed in experiment.runs:
        score = _score(experiment, student, seed)
        if score is not None:
            protocols |= score["protocols"]
            rows += _rows(experiment, score, common)
        elif partial:
            reason = failures.reason(experiment, student, seed)
            method = experiment.students[student].method
            failed = {"student": student, "method": method, "seed": seed, "final": True, "grid": ""}
            rows.append(common | failed | {"status": f"failed ({reason})"})
        else:
            raise UserError(
                f"{experiment.score_path(student, seed)} is missing or belongs to other weights; "
                "run the workflow again"
            )
    table = pd.DataFrame(rows, columns=[*COLUMNS, "final", "grid"])
    for column in ("seed", "nfe", "ema", "images", "flops", "sample_seed", "num_samples"):
        table[column] = table[column].astype("Int64")
    table["column"] = [
        "" if pd.isna(n) else column_name(m, n, e)
        for m, n, e in zip(table.metric, table.num_samples, table.extractor, strict=True)
    ]
    _one_protocol_per_column(table)
    return table, protocols


def _one_protocol_per_column(table: pd.DataFrame) -> None:
    for column, group in table[table.column != ""].groupby("column"):
        if group.protocol.nunique() > 1:
            raise UserError(
                f"column {column} would mix {group.protocol.nunique()} protocols; delete the older "
                "files under scores/ and run the workflow again"
            )
