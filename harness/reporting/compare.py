"""`python -m harness compare`: experiments, or one experiment on several machines, side by side.

Everything is read from the folders' metrics.csv and manifest.json, so a folder may come from
anywhere. A number stands beside another only if both were made by one protocol.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from harness.errors import UserError
from harness.evaluation.columns import column_name
from harness.evaluation.registry import METRICS
from harness.io.artifacts import write_text
from harness.reporting.collect import (
    flat,
    is_unavailable,
    one_protocol_per_column,
    read_metrics,
)
from harness.reporting.manifest import read_manifest
from harness.reporting.tables import cell

COSTS = {"images": 1, "flops": 1e12, "seconds": 1}
COST_NAMES = {
    "images": "images that received a generator update",
    "flops": "training compute, TFLOPs",
    "seconds": "training, seconds",
}
KEYS = ["column", "student"]


@dataclass
class Results:
    """`final`: metrics.csv's rows of the last weights; `numbers`: one row per column and student;
    `protocols`: hash -> record, empty where there is no manifest."""

    folder: Path
    name: str
    final: pd.DataFrame
    numbers: pd.DataFrame
    manifest: dict

    @property
    def protocols(self) -> dict:
        return self.manifest.get("protocols", {})


def read_results(folder: Path) -> Results:
    path = folder / "tables" / "metrics.csv"
    if not path.exists():
        what = "has no tables/metrics.csv" if folder.is_dir() else "does not exist"
        raise UserError(f"{folder} {what}; name the folder of an experiment, as results/digits")
    table = read_metrics(path)
    final = _final(table)
    one_protocol_per_column(final, path)
    manifest = folder / "manifest.json"
    return Results(
        folder,
        str(table.experiment.iloc[0]),
        final,
        _numbers(final),
        read_manifest(manifest) if manifest.exists() else {},
    )


def _final(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of each run's last snapshot (teachers and the floor have none), with `column`."""
    last = table.groupby(["student", "seed"], dropna=False).images.transform("max")
    final = table[table.images.isna() | (table.images == last)]
    known = final.metric.notna() & final.num_samples.notna()
    columns = [
        column_name(m, int(n), e) if there else ""
        for m, n, e, there in zip(
            final.metric, final.num_samples, final.extractor, known, strict=True
        )
    ]
    protocol = final.protocol.fillna("unknown")
    status = final.status.fillna("ok").astype(str)
    return final.assign(column=columns, protocol=protocol, status=status)


def _numbers(final: pd.DataFrame) -> pd.DataFrame:
    """Mean and std over training seeds (each the mean over its sampling seeds), and protocols."""
    scored = final[final.column != ""]
    rows = []
    for (column, student), mine in scored.groupby(KEYS, sort=False):
        values = mine.groupby("seed", dropna=False).value.mean().dropna()
        bad = mine[mine.status != "ok"]
        rows.append(
            {
                "column": column,
                "metric": mine.metric.iloc[0],
                "num_samples": mine.num_samples.iloc[0],
                "student": student,
                "value": values.mean() if len(values) else None,
                "std": values.std(ddof=1) if len(values) > 1 else None,
                "seeds": mine.seed.nunique() or None,
                "protocol": mine.protocol.iloc[0],  # of a column there is one
                "status": bad.status.iloc[0] if len(bad) else "ok",
            }
        )
    names = [*KEYS, "metric", "num_samples", "value", "std", "seeds", "protocol", "status"]
    return pd.DataFrame(rows, columns=names)


def labels(results: list[Results]) -> list[str]:
    """The experiments' names; their folders where two have one name."""
    names = [r.name for r in results]
    folders = [str(r.folder) for r in results]
    if len(set(folders)) < len(folders):
        raise UserError(f"{max(folders, key=folders.count)} is named twice")
    return names if len(set(names)) == len(names) else folders


def _told(value: object) -> str:
    text = "not there" if value is None else str(value)
    return f"{text[:8]}…" if len(text) >= 32 and " " not in text else text


def difference(a: tuple[str, Results, str], b: tuple[str, Results, str]) -> str:
    """Which keys of two protocols differ, in one line. Each: label, results, hash."""
    records = []
    for label, results, protocol in (a, b):
        if protocol not in results.protocols:
            return f"protocol {protocol} of {label} is not known: it has no complete manifest.json"
        records.append(flat(results.protocols[protocol]))
    first, second = records
    return "; ".join(
        f"{key} is {_told(first.get(key))} in {a[0]} and {_told(second.get(key))} in {b[0]}"
        for key in dict.fromkeys([*first, *second])
        if first.get(key) != second.get(key)
    )


def _protocols(results: list[Results], column: str) -> list[str | None]:
    """Each experiment's protocol in a column; None where it does not have it."""
    mine = [r.numbers[r.numbers.column == column].protocol for r in results]
    return [hashes.iloc[0] if len(hashes) else None for hashes in mine]


def _table(rows: dict[str, list[str]], heads: list[str]) -> str:
    body = pd.DataFrame([[name, *cells] for name, cells in rows.items()], columns=["", *heads])
    return body.to_markdown(index=False, disable_numparse=True)


def _facts(results: list[Results], heads: list[str]) -> str:
    def fact(r: Results, *keys: str) -> str:
        value: object = r.manifest
        for key in keys:
            value = value.get(key, "–") if isinstance(value, dict) else "–"
        return str(value)

    def seeds(r: Results, column: str) -> str:
        found = sorted({int(seed) for seed in r.final[column].dropna()})
        return ", ".join(map(str, found)) or "–"

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
        heads,
    )


def _students(results: list[Results]) -> list[str]:
    return list(dict.fromkeys(name for r in results for name in r.final.student))


def _costs(results: list[Results], heads: list[str]) -> list[str]:
    """What a run of each student has spent, mean over training seeds."""
    parts = []
    for unit, scale in COSTS.items():
        rows = {}
        for name in _students(results):
            spent = [
                r.final[r.final.student == name].drop_duplicates("seed")[unit].astype(float).mean()
                for r in results
            ]
            if any(pd.notna(value) for value in spent):
                form = ".3g" if unit == "flops" else ",.0f"
                rows[name] = ["–" if pd.isna(v) else format(v / scale, form) for v in spent]
        if rows:
            parts.append(f"## {COST_NAMES[unit]}\n\n{_table(rows, heads)}")
    return parts


def side_by_side(results: list[Results]) -> tuple[str, pd.DataFrame]:
    """A markdown text of the columns at the most samples, and all columns as a table: one row per
    column, protocol and student, three columns per experiment."""
    heads, rows, sections = labels(results), [], []
    columns = list(dict.fromkeys(c for r in results for c in r.numbers.column))
    known = pd.concat([r.numbers for r in results]).drop_duplicates("column").set_index("column")
    most = known.groupby("metric").num_samples.max()
    notes: dict[str, list[str]] = {}
    for column in columns:
        hashes = _protocols(results, column)
        found = [h for h in hashes if h is not None]
        one = len(set(found)) <= 1
        if not one:
            first = next(i for i, h in enumerate(hashes) if h is not None)
            for i, h in enumerate(hashes):
                if h not in (None, hashes[first]):
                    sides = [(heads[j], results[j], hashes[j]) for j in (first, i)]
                    notes.setdefault(difference(*sides), []).append(column)
        titles = [
            head if one or h is None else f"{head} (protocol {h[:8]})"
            for head, h in zip(heads, hashes, strict=True)
        ]
        cells: dict[str, list[str]] = {}
        for name in _students(results):
            line, tidy = [], {}
            for head, r, h in zip(heads, results, hashes, strict=True):
                mine = r.numbers[(r.numbers.column == column) & (r.numbers.student == name)]
                if mine.empty:
                    line.append("–")
                    continue
                number = mine.iloc[0]
                unavailable = is_unavailable(mine.status).item()
                line.append(number.status if unavailable else cell(number.value, number["std"]))
                numbers = {"": number.value, "_std": number["std"], "_seeds": number.seeds}
                tidy.setdefault(h, {}).update({f"{head}{k}": v for k, v in numbers.items()})
            if tidy:
                cells[name] = line
            rows += [
                {"column": column, "protocol": h, "student": name} | v for h, v in tidy.items()
            ]
        metric, count = known.metric[column], known.num_samples[column]
        if count == most[metric]:
            arrow = METRICS[metric].arrow if metric in METRICS else ""
            sections.append(f"## {column}{arrow}\n\n{_table(cells, titles)}")
    failed = [
        f"{head}: {row.student}: {row.status}"
        for head, r in zip(heads, results, strict=True)
        for row in r.final[r.final.status.str.startswith("failed")].itertuples()
    ]
    lines = [f"# {', '.join(heads)}: side by side", _facts(results, heads)]
    lines += [
        f"**Not one protocol, so not to be compared:** {', '.join(which)}: {why}."
        for why, which in notes.items()
    ]
    lines += list(dict.fromkeys(failed))
    lines += sections + _costs(results, heads)
    lines.append("Mean ± std over training seeds, last weights.")
    order = [f"{head}{k}" for head in heads for k in ("", "_std", "_seeds")]
    tidy_table = pd.DataFrame(rows, columns=["column", "protocol", "student", *order])
    return "\n\n".join(lines), tidy_table


def print_side_by_side(folders: list[Path], out: Path | None) -> None:
    if len(folders) < 2:
        raise UserError("compare needs two folders at least, as results/a results/b")
    text, table = side_by_side([read_results(folder) for folder in folders])
    if out is not None:
        write_text(out, table.to_csv(index=False))
        text += f"\n\nAll columns: {out}"
    print(text)
