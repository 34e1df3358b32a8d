"""Published numbers beside those of this project's runs.

`reported` comes from published.yaml, `reproduced` from an experiment's final scores, and only from
a metric whose name is `fid` or `fid-…`: a Fréchet distance in another network's features is no FID.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pandas as pd

from harness.config.experiment import Experiment
from harness.errors import UserError
from harness.evaluation.columns import column_name
from harness.io.artifacts import write_text
from harness.method import get_method
from harness.reporting.collect import collect
from harness.reporting.manifest import read_manifest
from harness.reporting.published.catalogue import (
    PAPERS,
    STATISTIC,
    base,
    changed_settings,
    concerning,
    is_own,
    official_network,
    published,
    runs_of,
    same_data,
)
from harness.reporting.tables import cell, latex
from harness.validation import load_experiment, parse_experiment

COLUMNS = (
    *("paper", "table", "method", "variant", "nfe", "metric", "reported", "evidence", "source"),
    *("reproduced", "difference", "setting_match", "note"),
)
# A published table may hold several data sets.
TABLE_COLUMNS = (*COLUMNS[:2], "dataset", "conditioning", *COLUMNS[2:])
# The tables that `paper-tables` writes, by the beginning of their names.
TABLES = {name: ("",) for name in PAPERS} | {
    "DMD": ("Table 1", "Table 2", "Table 3", "Table 4", "Table 6")
}
FID_SAMPLES, COCO_SAMPLES = 50_000, 30_000
# Why a published metric is shown and not compared, where a column here has a similar name.
NOT_COMPARED = {
    "CLIP-FID": "not compared: the source names neither CLIP's weights nor a library; Fréchet "
    "distances here are between embeddings of length 1",
    "CLIP score (OpenCLIP-G)": "not compared: the paper says OpenCLIP-G, its successor's code "
    "loads ViT-g-14 and puts words before each prompt",
    "LAION aesthetic score": "not compared: which of LAION's predictors and which prompts it is "
    "of was not said",
}
CAPTION = (
    "Reported: harness/reporting/published/numbers.yaml, as in each source. Reproduced: one FID "
    "per training seed (the mean over sampling seeds), EMA weights at the end of the budget, "
    "mean ± std over training seeds; a teacher's is one mean. Difference: reproduced - reported. "
    "Setting match: exact (settings, budget, teacher and sample count are the published ones), "
    "changed (not all of them), unknown (nobody published them), scaled or toy (as the experiment "
    "declares)."
)


def is_fid(metric) -> bool:
    return isinstance(metric, str) and re.fullmatch(r"fid(-.*)?", metric) is not None


def measured(experiment: Experiment, table: pd.DataFrame, name: str) -> tuple[pd.Series, str]:
    """The FIDs of a row of the tables, one per training seed (each the mean over its sampling
    seeds), and the column they stand in.

    Final weights, the experiment's main sample count. Where several FIDs were computed: EDM's own
    protocol, which all papers of `PAPERS` use.
    """
    rows = table[table.final & (table.student == name) & table.metric.map(is_fid)]
    rows = rows[(rows.num_samples == experiment.evaluation.num_samples) & (rows.status == "ok")]
    columns = sorted(
        {(m != "fid-edm", m, e) for m, e in zip(rows.metric, rows.extractor, strict=True)}
    )
    if not columns:
        return pd.Series(dtype=float), ""
    _, metric, extractor = columns[0]
    rows = rows[(rows.metric == metric) & (rows.extractor == extractor)]
    label = column_name(metric, experiment.evaluation.num_samples, extractor)
    values = rows.value.astype(float).groupby(rows.seed, dropna=False).mean()
    return values, " ".join([label, *sorted(set(rows.flag) - {""})])


def _row(entry: dict) -> dict:
    """A published number by itself."""
    row = {key: entry[key] for key in TABLE_COLUMNS if key in entry}
    row |= {"reported": entry["value"], "reproduced": "", "difference": None, "setting_match": ""}
    statistic = STATISTIC.get((entry["paper"], base(entry["method"])))
    notes = [f"reported is {statistic[0]} ({statistic[1]})" if statistic else "", entry["note"]]
    notes.append(NOT_COMPARED.get(entry["metric"]))
    return row | {"note": "; ".join(filter(None, notes))}


def _setting_match(experiment: Experiment, name: str, entry: dict) -> tuple[str, list[str]]:
    """How far a run's settings are those of a published number, and notes on it. It is the
    experiment's word, but for `exact`: that needs published settings, and all of them."""
    setting, notes = experiment.paper.setting, []
    if name in experiment.students:
        changed = changed_settings(experiment, name, entry)
    else:
        official = official_network(experiment, experiment.scale_rows[name])
        changed = [] if official else ["network"]
    if changed is None:
        notes.append("the published settings are not known")
    elif changed:
        notes.append(f"not as published: {', '.join(changed)}")
    papers = COCO_SAMPLES if entry["dataset"].startswith("COCO-2014-30k") else FID_SAMPLES
    if experiment.evaluation.num_samples != papers:
        notes.append(f"papers use {papers} samples, and fewer raise an FID")
    if setting == "exact" and notes:
        setting = "unknown" if changed is None else "changed"
    return setting, notes


def _reproduction(experiment: Experiment, table: pd.DataFrame, name: str, entry: dict) -> dict:
    """What a run adds to the row of a published FID."""
    values, label = measured(experiment, table, name)
    who = f"{name} of {experiment.name}"
    mine = table[table.final & (table.student == name)]
    # What another network could not see is no failure of an FID.
    failed = mine[(mine.status != "ok") & (mine.metric.isna() | mine.metric.map(is_fid))]
    if len(failed):
        who += f", {len(failed)} not counted: {failed.status.iloc[0]}"
    if values.empty:
        return {"note": f"{who}: no run scored by an FID"}
    setting, notes = _setting_match(experiment, name, entry)
    notes = [f"{who}: {label}", *notes]
    if name in experiment.students:
        method = get_method(experiment.students[name].method)
        notes += method.deviations_under(experiment.method_config(name))
    return {
        "reproduced": cell(values.mean(), values.std(ddof=1) if len(values) > 1 else None),
        "difference": round(values.mean() - entry["value"], 4),
        "setting_match": setting,
        "note": "; ".join(notes),
    }


def paper_table(experiment: Experiment, table: pd.DataFrame) -> pd.DataFrame:
    """The published numbers that concern an experiment, beside its own.

    `table`: the tidy table of `collect`. Columns: COLUMNS; the index is the position of the number
    in `published()`. A number that two students reproduce has two rows, and one that none does
    has one, as context.
    """
    rows, index = [], []
    for i in concerning(experiment.paper):
        mine = _rows(experiment, table, published()[i])
        rows += mine
        index += [i] * len(mine)
    return _frame(rows, COLUMNS, index)


def _rows(experiment: Experiment, table: pd.DataFrame, entry: dict) -> list[dict]:
    bare = _row(entry)
    names = runs_of(experiment, entry) if entry["metric"] == "FID" else []
    rows = [bare | _reproduction(experiment, table, name, entry) for name in names]
    for row in rows:
        row["note"] = "; ".join(filter(None, [row["note"], bare["note"]]))
    return rows or [bare]


def _frame(rows: list[dict], columns: tuple, index: list[int] | None = None) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=columns, index=index).astype({"nfe": "Int64"})


def _text(table: pd.DataFrame) -> pd.DataFrame:
    """The table as text, empty where nothing is known."""
    text = table.astype(object).where(table.notna(), "")
    return text.map(lambda value: f"{value:g}" if isinstance(value, float) else str(value))


def _markdown(table: pd.DataFrame, title: str, stage: str) -> str:
    body = _text(table).to_markdown(index=False, disable_numparse=True)
    return f"# {title}\n\n{body}\n\n{CAPTION} Written by `python -m harness {stage}`.\n"


def write_paper(experiment: Experiment, table: pd.DataFrame, folder: Path) -> list[Path]:
    """`paper.{csv,md,tex}` in a folder; returns their paths."""
    paper = experiment.paper
    rows = paper_table(experiment, table)
    title = f"Published numbers on {paper.dataset} and those of {experiment.name}"
    wide = "".join("p{4cm}" if name in ("source", "note") else "l" for name in COLUMNS)
    files = {
        folder / "paper.csv": rows.to_csv(index=False),
        folder / "paper.md": _markdown(rows, title, "report"),
        folder / "paper.tex": latex(_text(rows), title, wide),
    }
    for path, text in files.items():
        write_text(path, text)
    return list(files)


# -- all experiments --------------------------------------------------------------------------


def find_experiments(results: Path, configs: Path) -> list[Experiment]:
    """The experiments with a `paper:` section: as their manifests in `results` say, and those of
    the files in `configs` that have no manifest. One that cannot be read is left out, aloud; data
    and checkpoints need not be there, since runs may have been made elsewhere, or not yet."""

    def of_manifest(path: Path) -> Experiment | None:
        config = read_manifest(path).get("config")
        if not isinstance(config, dict) or not config.get("paper"):
            return None
        return parse_experiment(config, str(path), results, files=False)

    def of_file(path: Path) -> Experiment | None:
        return load_experiment(path, results=results, files=False)

    found: dict[str, Experiment] = {}
    sources = [(of_manifest, path) for path in sorted(results.glob("*/manifest.json"))]
    sources += [(of_file, path) for path in sorted(configs.glob("*.yaml"))]
    for load, path in sources:
        try:
            experiment = load(path)
        except UserError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        if experiment and experiment.paper:
            found.setdefault(experiment.name, experiment)
    return list(found.values())


def _tables(experiments: list[Experiment]) -> list[tuple[Experiment, pd.DataFrame]]:
    """The tidy table of each experiment, as far as its runs go."""
    tables = []
    for experiment in experiments:
        try:
            tables.append((experiment, collect(experiment, partial=True)[0]))
        except UserError as error:
            print(f"left out: {experiment.name}: {error}", file=sys.stderr)
    return tables


def _file_name(paper: str, table: str) -> str:
    """`dmd-table-2` of DMD's "Table 2 (left)": both halves of a table are one file."""
    return re.sub("[^a-z0-9]+", "-", f"{paper} {table.split(' (')[0]}".lower()).strip("-")


def write_paper_tables(
    results: Path = Path("results"), configs: Path = Path("configs/paper")
) -> None:
    """One file per published table of DMD, SiD, SIM and GDD, from whatever runs exist; prints the
    cells (FIDs of the methods here and their teachers) that no run has filled."""
    tables = _tables(find_experiments(results, configs))
    files: dict[str, list[dict]] = {}
    empty, cells, others = [], 0, 0
    for entry in published():
        if entry["paper"] not in PAPERS or not entry["table"].startswith(TABLES[entry["paper"]]):
            continue
        rows = [
            row
            for experiment, table in tables
            if same_data(experiment.paper, entry)
            for row in _rows(experiment, table, entry)
            if row["reproduced"]
        ]
        name = _file_name(entry["paper"], entry["table"])
        files.setdefault(name, []).extend(rows or [_row(entry)])
        if is_own(entry):
            cells += entry["metric"] == "FID"
            others += entry["metric"] != "FID"
            empty += [entry] if entry["metric"] == "FID" and not rows else []
    folder = results / "paper-tables"
    for name, rows in files.items():
        table = _frame(rows, TABLE_COLUMNS)
        title = f"{rows[0]['paper']}, {rows[0]['table'].split(' (')[0]}"
        write_text(folder / f"{name}.csv", table.to_csv(index=False))
        write_text(folder / f"{name}.md", _markdown(table, title, "paper-tables"))
    count = "1 experiment" if len(tables) == 1 else f"{len(tables)} experiments"
    print(f"{len(files)} tables in {folder}/ (.csv, .md), from {count}")
    print(
        f"{len(empty)} of {cells} FIDs of the methods here and their teachers have no run yet"
        f" ({others} numbers in other metrics are shown as reported)"
    )
    for entry in empty:
        what = " ".join(filter(None, [entry["method"], entry["variant"]]))
        where = f"{entry['paper']}, {entry['table']}: {entry['dataset']} {entry['conditioning']}"
        print(f"  {where}: {what}: {entry['value']:g}")
