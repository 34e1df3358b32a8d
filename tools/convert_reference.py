"""Convert tables of schema 1 or of wide comparison tables to today's format, in place.

    python tools/convert_reference.py results/reference/*

Adds summary.csv, which is computed from metrics.csv, and rewrites comparison.csv as its pivot. The
numbers do not change, and the manifest keeps the commit that made them; comparison.md says it, too.
"""

import json
import sys
from pathlib import Path

import pandas as pd

from harness.evaluation.registry import METRICS
from harness.io.artifacts import sha256_file, write_json, write_text
from harness.reporting.collect import COLUMNS, SCHEMA
from harness.reporting.compare import read_results
from harness.reporting.tables import COLUMNS as SUMMARY_COLUMNS
from harness.reporting.tables import STUDENT_COLUMNS, Summary, student_scores, wide


def convert(folder: Path) -> None:
    tables = folder / "tables"
    metrics = pd.read_csv(tables / "metrics.csv", dtype=str, keep_default_na=False)
    if list(metrics.columns) != list(COLUMNS):
        raise SystemExit(f"{tables}/metrics.csv has other columns")
    write_text(tables / "metrics.csv", metrics.assign(schema=SCHEMA).to_csv(index=False))
    final = read_results(folder).final
    old = pd.read_csv(tables / "comparison.csv")
    old = old.rename(columns={"seconds_flag": "flag"})
    columns = _columns(final, old)
    scores = student_scores(final, columns, list(old.student))
    scores["rank"] = None
    for column in columns.index[columns.ranked]:
        if f"{column}_rank" in old:
            rows = scores.column == column
            rank_of = dict(zip(old.student, old[f"{column}_rank"], strict=True))
            scores.loc[rows, "rank"] = scores.student[rows].map(rank_of)
    students = old.reindex(columns=list(STUDENT_COLUMNS))
    comparison = wide(Summary(scores, students, columns, pd.DataFrame(), 1))
    _check_values(comparison, old, columns)
    write_text(tables / "summary.csv", scores[list(SUMMARY_COLUMNS)].to_csv(index=False))
    write_text(tables / "comparison.csv", comparison.to_csv(index=False))
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    note = f"* Made at commit {manifest['commit']}; tables converted to schema {SCHEMA}."
    text = (
        (tables / "comparison.md")
        .read_text()
        .replace("`_sampling_std` in comparison.csv", "`sampling_std` in summary.csv")
    )
    if note not in text:
        write_text(tables / "comparison.md", f"{text.rstrip()}\n{note}\n")
    for run in manifest["runs"].values():
        if "key" in run:
            run["run_id"] = run.pop("key")
    names = ["metrics.csv", "summary.csv", "comparison.csv", "comparison.md"]
    manifest["outputs"] |= {f"tables/{name}": sha256_file(tables / name) for name in names}
    write_json(path, manifest)


def _columns(final: pd.DataFrame, old: pd.DataFrame) -> pd.DataFrame:
    """`Summary.columns`, with the order and the ranked columns of the old table."""
    columns = final[final.column != ""].drop_duplicates("column").set_index("column")
    columns = columns[["metric", "extractor", "num_samples"]]
    columns = columns.loc[[name for name in old if name in columns.index]]
    suffixes = ("_rank", "_best_of")
    ranked = [any(c.startswith(tuple(n + s for s in suffixes)) for c in old) for n in columns.index]
    main = columns.num_samples == columns.num_samples.max()
    return columns.assign(main=main, ranked=ranked)


def _check_values(comparison: pd.DataFrame, old: pd.DataFrame, columns: pd.DataFrame) -> None:
    for name in columns.index:
        for column in (name, f"{name}_std"):
            if column in comparison:
                error = (comparison[column] - old[column]).abs().max()
                assert not error > 1e-9 * (1 + old[column].abs().max()), (column, error)
        assert columns.metric[name] in METRICS, name


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        unconverted = not (Path(argument) / "tables" / "summary.csv").exists()
        if unconverted and (Path(argument) / "manifest.json").exists():
            convert(Path(argument))
