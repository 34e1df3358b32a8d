"""`harness compare`: the results of several experiments or machines in one table.

It reads metrics.csv and manifest.json only, so a results folder may come from another machine.
Numbers are in one column only if they have the same protocol.
"""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from harness.errors import UserError
from harness.evaluation.registry import METRICS
from harness.io.artifacts import write_text
from harness.reporting.collect import (
    flatten,
    is_unavailable,
    read_metrics,
    with_columns,
)
from harness.reporting.formatting import MISSING, markdown, number_text, spread_text
from harness.reporting.manifest import read_manifest
from harness.reporting.summary import seed_means

COSTS = {  # unit -> title, format, scale
    "images": ("images that received a generator update", ",.0f", 1),
    "flops": ("training compute, TFLOPs", ".3g", 1e12),
    "seconds": ("training, seconds", ",.0f", 1),
}


@dataclass
class Results:
    """One results folder. final: the rows of metrics.csv of the last weights; manifest: empty if
    the folder has none."""

    folder: Path
    final: pd.DataFrame
    manifest: dict


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
    protocol, status = final.protocol.fillna("unknown"), final.status.fillna("ok").astype(str)
    final = with_columns(final.assign(protocol=protocol, status=status), path)
    manifest = folder / "manifest.json"
    return Results(folder, final, read_manifest(manifest) if manifest.exists() else {})


def labels(results: list[Results]) -> list[str]:
    """The experiments' names, or their folders if two have the same name."""
    names = [str(r.final.experiment.iloc[0]) for r in results]
    folders = [str(r.folder) for r in results]
    if len(set(folders)) < len(folders):
        raise UserError(f"{max(folders, key=folders.count)} is given twice", "duplicate")
    return names if len(set(names)) == len(names) else folders


def _scores(final: pd.DataFrame) -> pd.DataFrame:
    """One row per column, student and experiment."""
    keys = ["column", "student", "experiment"]
    final = final[final.column != ""]
    grouped = final.groupby(keys, sort=False)
    facts = grouped[["metric", "num_samples", "protocol"]].first()
    facts["seeds"] = grouped.seed.nunique().replace(0, None)
    facts["status"] = grouped.status.agg(lambda s: next((x for x in s if x != "ok"), "ok"))
    return facts.join(seed_means(final, keys)).reset_index()


def _markdown(table: pd.DataFrame) -> str:
    return markdown(table.rename_axis("").reset_index())


def _section(
    title: str, rows: pd.DataFrame, students: list[str], headings: list[str], titles: dict
) -> str:
    """The `text` of each student and experiment, without students that have none. titles: longer
    headings of some experiments."""
    table = rows.pivot(index="student", columns="experiment", values="text")
    table = table.reindex(index=students, columns=headings).dropna(how="all").fillna(MISSING)
    return f"## {title}\n\n{_markdown(table.rename(columns=titles))}"


def _facts(result: Results) -> dict[str, str]:
    final, m = result.final, flatten(result.manifest)
    training, sampling = (
        ", ".join(map(str, sorted(seeds.dropna().astype(int).unique())))
        for seeds in (final.seed, final.sample_seed)
    )
    return {
        "folder": str(result.folder),
        "commit": str(m.get("commit", MISSING))[:10],
        "device": str(m.get("device.used", MISSING)),
        "processor": str(m.get("device.processor", MISSING)),
        "torch": str(m.get("packages.torch", MISSING)),
        "training seeds": training or MISSING,
        "sampling seeds": sampling or MISSING,
    }


def _short(value: object) -> str:
    text = "missing" if value is None else str(value)
    return f"{text[:8]}…" if len(text) >= 32 and " " not in text else text


def protocol_difference(protocols: dict[str, str], records: dict[str, dict]) -> str:
    """The keys in which two protocols differ, in one line.

    protocols: two experiments -> their hashes; records: experiment -> hash -> protocol.
    """
    for name, protocol in protocols.items():
        if protocol not in records[name]:
            return f"protocol {protocol} of {name} is unknown: {name} has no complete manifest.json"
    a, b = protocols
    first, second = (flatten(records[name][protocols[name]]) for name in (a, b))
    return "; ".join(
        f"{key} is {_short(first.get(key))} in {a} and {_short(second.get(key))} in {b}"
        for key in dict.fromkeys([*first, *second])
        if first.get(key) != second.get(key)
    )


def compare_results(results: list[Results]) -> tuple[str, pd.DataFrame]:
    """A markdown text of the columns at each metric's largest sample count, and all columns as a
    table: one row per column, protocol and student, three columns per experiment."""
    headings = labels(results)
    pairs = dict(zip(headings, results, strict=True))
    records = {heading: r.manifest.get("protocols", {}) for heading, r in pairs.items()}
    tables = [r.final.assign(experiment=heading) for heading, r in pairs.items()]
    final = pd.concat(tables, ignore_index=True)
    students, scores = list(final.student.unique()), _scores(final)
    scores["text"] = list(map(spread_text, scores["mean"], scores["std"]))
    scores["text"] = scores.text.mask(is_unavailable(scores.status), scores.status)
    largest = scores.groupby("metric").num_samples.transform("max")
    sections, differences = [], {}
    for column, rows in scores.groupby("column", sort=False):
        protocols = rows.drop_duplicates("experiment").set_index("experiment").protocol
        first = protocols.index[0]
        others = protocols[protocols != protocols[first]]
        for name, protocol in others.items():
            sides = {first: protocols[first], name: protocol}
            differences.setdefault(protocol_difference(sides, records), []).append(column)
        titles = {name: f"{name} (protocol {hash_[:8]})" for name, hash_ in protocols.items()}
        if rows.num_samples.iloc[0] == largest[rows.index[0]]:
            metric = rows.metric.iloc[0]
            arrow = METRICS[metric].arrow if metric in METRICS else ""
            sections.append(
                _section(column + arrow, rows, students, headings, titles if len(others) else {})
            )
    runs = final.drop_duplicates(["experiment", "student", "seed"])
    costs = runs.groupby(["experiment", "student"], sort=False)[list(COSTS)].mean().reset_index()
    for unit, (title, form, scale) in COSTS.items():
        known = costs.dropna(subset=unit)
        known = known.assign(text=[number_text(value, form, scale) for value in known[unit]])
        if len(known):
            sections.append(_section(title, known, students, headings, {}))
    failed = final[final.status.str.startswith("failed")]
    text = [
        f"# Comparison of {', '.join(headings)}",
        _markdown(pd.DataFrame({heading: _facts(r) for heading, r in pairs.items()})),
        *(
            f"**Different protocols, not comparable:** {', '.join(columns)}: {reason}."
            for reason, columns in differences.items()
        ),
        *dict.fromkeys(f"{r.experiment}: {r.student}: {r.status}" for r in failed.itertuples()),
        *sections,
        "Mean ± std over training seeds, last weights.",
    ]
    wide = scores.set_index(["column", "protocol", "student", "experiment"])
    wide = wide.unstack("experiment", sort=False).swaplevel(axis="columns")
    order = pd.MultiIndex.from_product([headings, ["mean", "std", "seeds"]])
    wide = wide.reindex(columns=order)
    wide.columns = [name + {"mean": ""}.get(part, f"_{part}") for name, part in wide.columns]
    return "\n\n".join(text), wide.reset_index()


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
