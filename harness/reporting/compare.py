"""`harness compare`: the results of several experiments or machines in one table.

It reads metrics.csv and manifest.json only, so a results folder may come from another machine.
Numbers are in one column only if they have the same protocol.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from harness.errors import UserError
from harness.evaluation.registry import METRICS
from harness.io.artifacts import write_text
from harness.reporting.collect import (
    columns_of,
    flatten,
    is_unavailable,
    read_metrics,
    require_one_protocol_per_column,
)
from harness.reporting.formatting import MISSING, markdown, number_text, spread_text
from harness.reporting.manifest import read_manifest

COSTS = {"images": 1, "flops": 1e12, "seconds": 1}
COST_NAMES = {
    "images": "images that received a generator update",
    "flops": "training compute, TFLOPs",
    "seconds": "training, seconds",
}
KEYS = ["column", "student"]


@dataclass
class Results:
    """One results folder. final: the rows of metrics.csv of the last weights; scores: one row per
    column and student; protocols: hash -> record, empty without a manifest."""

    folder: Path
    name: str
    final: pd.DataFrame
    scores: pd.DataFrame
    manifest: dict

    @property
    def protocols(self) -> dict:
        return self.manifest.get("protocols", {})


def read_results(folder: Path) -> Results:
    path = folder / "tables" / "metrics.csv"
    if not path.exists():
        reason = "has no tables/metrics.csv" if folder.is_dir() else "does not exist"
        raise UserError(
            f"{folder} {reason}; give the folder of an experiment, such as results/digits",
            "missing-file",
        )
    table = read_metrics(path)
    # The rows of each run's last snapshot; teachers and the floor have no training images.
    last = table.groupby(["student", "seed"], dropna=False).images.transform("max")
    final = table[table.images.isna() | (table.images == last)]
    final = final.assign(
        column=columns_of(final),
        protocol=final.protocol.fillna("unknown"),
        status=final.status.fillna("ok").astype(str),
    )
    require_one_protocol_per_column(final, path)
    manifest = folder / "manifest.json"
    return Results(
        folder,
        str(table.experiment.iloc[0]),
        final,
        _scores(final),
        read_manifest(manifest) if manifest.exists() else {},
    )


def _scores(final: pd.DataFrame) -> pd.DataFrame:
    """Mean and std over training seeds (each the mean over its sampling seeds), and protocols."""
    rows = []
    for (column, student), group in final[final.column != ""].groupby(KEYS, sort=False):
        values = group.groupby("seed", dropna=False).value.mean().dropna()
        not_ok = group.status[group.status != "ok"]
        rows.append(
            {
                "column": column,
                "student": student,
                "metric": group.metric.iloc[0],
                "num_samples": group.num_samples.iloc[0],
                "value": values.mean() if len(values) else None,
                "std": values.std(ddof=1) if len(values) > 1 else None,
                "seeds": group.seed.nunique() or None,
                "protocol": group.protocol.iloc[0],  # the only one of the column
                "status": not_ok.iloc[0] if len(not_ok) else "ok",
            }
        )
    names = [*KEYS, "metric", "num_samples", "value", "std", "seeds", "protocol", "status"]
    return pd.DataFrame(rows, columns=names)


def labels(results: list[Results]) -> list[str]:
    """The experiments' names, or their folders if two have the same name."""
    names = [r.name for r in results]
    folders = [str(r.folder) for r in results]
    if len(set(folders)) < len(folders):
        raise UserError(f"{max(folders, key=folders.count)} is given twice", "duplicate")
    return names if len(set(names)) == len(names) else folders


def _short(value: object) -> str:
    text = "missing" if value is None else str(value)
    return f"{text[:8]}…" if len(text) >= 32 and " " not in text else text


def protocol_difference(a: tuple[str, Results, str], b: tuple[str, Results, str]) -> str:
    """The keys in which two protocols differ, in one line. Each: label, results, hash."""
    records = []
    for label, results, protocol in (a, b):
        if protocol not in results.protocols:
            return (
                f"protocol {protocol} of {label} is unknown: {label} has no complete manifest.json"
            )
        records.append(flatten(results.protocols[protocol]))
    first, second = records
    return "; ".join(
        f"{key} is {_short(first.get(key))} in {a[0]} and {_short(second.get(key))} in {b[0]}"
        for key in dict.fromkeys([*first, *second])
        if first.get(key) != second.get(key)
    )


def _protocols(results: list[Results], column: str) -> list[str | None]:
    """Each experiment's protocol in a column; None if it does not have the column."""
    hashes = [r.scores[r.scores.column == column].protocol for r in results]
    return [group.iloc[0] if len(group) else None for group in hashes]


def _table(rows: dict[str, list[str]], headings: list[str]) -> str:
    lines = [[name, *cells] for name, cells in rows.items()]
    return markdown(pd.DataFrame(lines, columns=["", *headings]))


def _facts(results: list[Results], headings: list[str]) -> str:
    def fact(r: Results, *keys: str) -> str:
        value: object = r.manifest
        for key in keys:
            value = value.get(key, MISSING) if isinstance(value, dict) else MISSING
        return str(value)

    def seeds(r: Results, column: str) -> str:
        numbers = sorted({int(seed) for seed in r.final[column].dropna()})
        return ", ".join(map(str, numbers)) or MISSING

    return _table(
        {
            "folder": [str(r.folder) for r in results],
            "commit": [fact(r, "commit")[:10] for r in results],
            "device": [fact(r, "device", "used") for r in results],
            "processor": [fact(r, "device", "processor") for r in results],
            "torch": [fact(r, "packages", "torch") for r in results],
            "training seeds": [seeds(r, "seed") for r in results],
            "sampling seeds": [seeds(r, "sample_seed") for r in results],
        },
        headings,
    )


def _students(results: list[Results]) -> list[str]:
    return list(dict.fromkeys(name for r in results for name in r.final.student))


def _costs(results: list[Results], headings: list[str]) -> list[str]:
    """What training a student cost, mean over training seeds."""
    sections = []
    for unit, scale in COSTS.items():
        rows = {}
        for name in _students(results):
            costs = [
                r.final[r.final.student == name].drop_duplicates("seed")[unit].astype(float).mean()
                for r in results
            ]
            if any(pd.notna(value) for value in costs):
                form = ".3g" if unit == "flops" else ",.0f"
                rows[name] = [number_text(value, form, scale) for value in costs]
        if rows:
            sections.append(f"## {COST_NAMES[unit]}\n\n{_table(rows, headings)}")
    return sections


def _column_section(
    results: list[Results], headings: list[str], column: str, hashes: list[str | None]
) -> tuple[dict[str, list[str]], list[dict]]:
    """One column: the cells of each student, and rows of the wide table, one per protocol."""
    cells: dict[str, list[str]] = {}
    rows = []
    for name in _students(results):
        line, by_protocol = [], {}
        for heading, r, protocol in zip(headings, results, hashes, strict=True):
            score = r.scores[(r.scores.column == column) & (r.scores.student == name)]
            if score.empty:
                line.append(MISSING)
                continue
            unavailable = is_unavailable(score.status).item()
            score = score.iloc[0]
            line.append(score.status if unavailable else spread_text(score.value, score["std"]))
            numbers = {"": score.value, "_std": score["std"], "_seeds": score.seeds}
            row = by_protocol.setdefault(protocol, {})
            row |= {f"{heading}{suffix}": value for suffix, value in numbers.items()}
        if by_protocol:
            cells[name] = line
        for protocol, row in by_protocol.items():
            rows.append({"column": column, "protocol": protocol, "student": name} | row)
    return cells, rows


def compare_results(results: list[Results]) -> tuple[str, pd.DataFrame]:
    """A markdown text of the columns at each metric's largest sample count, and all columns as a
    table: one row per column, protocol and student, three columns per experiment."""
    headings, rows, sections = labels(results), [], []
    known = pd.concat([r.scores for r in results]).drop_duplicates("column").set_index("column")
    largest = known.groupby("metric").num_samples.max()
    differences: dict[str, list[str]] = {}
    for column, (metric, count) in known[["metric", "num_samples"]].T.items():
        hashes = _protocols(results, column)
        present = [i for i, protocol in enumerate(hashes) if protocol is not None]
        others = [i for i in present if hashes[i] != hashes[present[0]]]
        for i in others:
            sides = [(headings[j], results[j], hashes[j]) for j in (present[0], i)]
            differences.setdefault(protocol_difference(*sides), []).append(column)
        titles = [
            f"{heading} (protocol {protocol[:8]})" if others and protocol else heading
            for heading, protocol in zip(headings, hashes, strict=True)
        ]
        cells, new = _column_section(results, headings, column, hashes)
        rows += new
        if count == largest[metric]:
            arrow = METRICS[metric].arrow if metric in METRICS else ""
            sections.append(f"## {column}{arrow}\n\n{_table(cells, titles)}")
    failed = [
        f"{heading}: {row.student}: {row.status}"
        for heading, r in zip(headings, results, strict=True)
        for row in r.final[r.final.status.str.startswith("failed")].itertuples()
    ]
    text = [
        f"# Comparison of {', '.join(headings)}",
        _facts(results, headings),
        *(
            f"**Different protocols, not comparable:** {', '.join(columns)}: {reason}."
            for reason, columns in differences.items()
        ),
        *dict.fromkeys(failed),
        *sections,
        *_costs(results, headings),
        "Mean ± std over training seeds, last weights.",
    ]
    order = [f"{heading}{suffix}" for heading in headings for suffix in ("", "_std", "_seeds")]
    return "\n\n".join(text), pd.DataFrame(rows, columns=["column", "protocol", "student", *order])


def print_comparison(folders: list[Path], out: Path | None) -> None:
    """Print the comparison of results folders; `out`: a CSV file for all columns."""
    if len(folders) < 2:
        raise UserError(
            "compare needs at least two folders, such as results/a results/b", "arguments"
        )
    text, table = compare_results([read_results(folder) for folder in folders])
    if out is not None:
        write_text(out, table.to_csv(index=False))
        text += f"\n\nAll columns: {out}"
    print(text)
