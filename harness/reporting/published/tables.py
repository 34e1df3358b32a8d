"""Tables of published numbers with those that this project's runs reproduce.

`reported` comes from numbers.yaml, `reproduced` from an experiment's final scores in a metric `fid`
or `fid-…`. Fréchet distances in other features than Inception's are never compared with FIDs.
"""

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd

from harness.config.experiment import Experiment
from harness.config.loading import read_experiment
from harness.errors import UserError
from harness.evaluation.registry import column_name
from harness.io.artifacts import write_text
from harness.method import METHODS
from harness.reporting.collect import collect
from harness.reporting.formatting import as_text, latex, spread_text, write_table
from harness.reporting.manifest import read_manifest
from harness.reporting.published.match import (
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

logger = logging.getLogger(__name__)

COLUMNS = (
    *("paper", "table", "method", "variant", "nfe", "metric", "reported", "evidence", "source"),
    *("reproduced", "difference", "setting_match", "note"),
)
# A published table may cover several data sets.
TABLE_COLUMNS = (*COLUMNS[:2], "dataset", "conditioning", *COLUMNS[2:])
# The tables that `paper-tables` writes: paper -> prefixes of the tables' names.
TABLES = {name: ("",) for name in PAPERS} | {
    "DMD": ("Table 1", "Table 2", "Table 3", "Table 4", "Table 6")
}
FID_SAMPLES, COCO_SAMPLES = 50_000, 30_000
# Published metrics that are not compared with columns of a similar name here, and why.
NOT_COMPARED = {
    "CLIP-FID": "not compared: the source names neither the CLIP weights nor a library; Fréchet "
    "distances here use embeddings of unit length",
    "CLIP score (OpenCLIP-G)": "not compared: the paper names OpenCLIP-G, but its successor's "
    "code loads ViT-g-14 and adds a prefix to each prompt",
    "LAION aesthetic score": "not compared: the source names neither LAION's predictor nor the "
    "prompts",
}
NOT_REPRODUCED = {"reproduced": "", "difference": None, "setting_match": "", "note": ""}
CAPTION = (
    "Reported: harness/reporting/published/numbers.yaml, as in each source. Reproduced: one FID "
    "per training seed (the mean over sampling seeds), EMA weights at the end of the budget, "
    "mean ± std over training seeds; one mean for a teacher. Difference: reproduced - reported. "
    "Setting match: exact (settings, budget, teacher and sample count are the published ones), "
    "changed (some differ), unknown (the published settings are unknown), scaled or toy (as the "
    "experiment declares). Written by `python -m harness {}`."
)


def is_fid(metric) -> bool:
    return isinstance(metric, str) and re.fullmatch(r"fid(-.*)?", metric) is not None


def fids_of(experiment: Experiment, table: pd.DataFrame, name: str) -> tuple[pd.Series, str]:
    """The FIDs of a table row, one per training seed (each the mean over its sampling seeds), and
    the name of their column.

    Final weights, the experiment's main sample count. If several FIDs were computed: EDM's
    protocol, which all of PAPERS use.
    """
    rows = table[table.final & (table.student == name) & table.metric.map(is_fid)]
    rows = rows[(rows.num_samples == experiment.evaluation.num_samples) & (rows.status == "ok")]
    if rows.empty:
        return pd.Series(dtype=float), ""
    columns = zip(rows.metric != "fid-edm", rows.metric, rows.extractor, strict=True)
    _, metric, extractor = min(columns)
    rows = rows[(rows.metric == metric) & (rows.extractor == extractor)]
    label = column_name(metric, experiment.evaluation.num_samples, extractor)
    values = rows.value.astype(float).groupby(rows.seed, dropna=False).mean()
    return values, " ".join([label, *sorted(set(rows.flag) - {""})])


def _row(entry: dict, reproduction: Mapping = NOT_REPRODUCED) -> dict:
    """A row of TABLE_COLUMNS. The notes of a reproduction precede those of the number."""
    notes = [reproduction["note"]]
    if statistic := STATISTIC.get((entry["paper"], base(entry["method"]))):
        notes.append(f"reported is {statistic[0]} ({statistic[1]})")
    notes += [entry["note"], NOT_COMPARED.get(entry["metric"])]
    note = "; ".join(filter(None, notes))
    return entry | {"reported": entry["value"]} | reproduction | {"note": note}


def _reproduction(experiment: Experiment, table: pd.DataFrame, name: str, entry: dict) -> dict:
    """The columns that a run adds to the row of a published FID. The setting match is what the
    experiment declares, but `exact` only if all published settings are known and equal."""
    values, label = fids_of(experiment, table, name)
    who = f"{name} of {experiment.name}"
    rows = table[table.final & (table.student == name)]
    # An unavailable network affects only its own metrics.
    failed = rows[(rows.status != "ok") & (rows.metric.isna() | rows.metric.map(is_fid))]
    if len(failed):
        who += f", {len(failed)} excluded: {failed.status.iloc[0]}"
    if values.empty:
        return NOT_REPRODUCED | {"note": f"{who}: no run has an FID"}
    setting, notes, deviations = experiment.paper.setting, [], ()
    if student := experiment.students.get(name):
        changed = changed_settings(experiment, name, entry)
        deviations = METHODS[student.method].deviations_under(student.settings)
    else:
        official = official_network(experiment, experiment.reference_rows[name])
        changed = [] if official else ["network"]
    if changed is None:
        notes.append("the published settings are unknown")
    elif changed:
        notes.append(f"different from the published run: {', '.join(changed)}")
    papers = COCO_SAMPLES if entry["dataset"].startswith("COCO-2014-30k") else FID_SAMPLES
    if experiment.evaluation.num_samples != papers:
        notes.append(f"papers use {papers} samples; fewer raise the FID")
    if setting == "exact" and notes:
        setting = "unknown" if changed is None else "changed"
    return {
        "reproduced": spread_text(values.mean(), values.std(ddof=1)),
        "difference": round(values.mean() - entry["value"], 4),
        "setting_match": setting,
        "note": "; ".join([f"{who}: {label}", *notes, *deviations]),
    }


def _rows(experiment: Experiment, table: pd.DataFrame, entry: dict) -> list[dict]:
    """A published number with each of its reproductions, or without one."""
    names = runs_of(experiment, entry) if entry["metric"] == "FID" else []
    rows = [_row(entry, _reproduction(experiment, table, name, entry)) for name in names]
    return rows or [_row(entry)]


def paper_table(experiment: Experiment, table: pd.DataFrame) -> pd.DataFrame:
    """The published numbers on an experiment's data with its own, from `collect`'s table. Columns:
    COLUMNS; one row for each run that reproduces a number, or one without a reproduction."""
    entries = concerning(experiment.paper)
    return _frame([row for entry in entries for row in _rows(experiment, table, entry)], COLUMNS)


def _frame(rows: list[dict], columns: tuple) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=columns).astype({"nfe": "Int64"})


def write_paper(experiment: Experiment, table: pd.DataFrame, folder: Path) -> list[Path]:
    """Write paper.{csv,md,tex} to a folder; returns their paths."""
    rows = paper_table(experiment, table)
    title = f"Published numbers on {experiment.paper.dataset}, and those of {experiment.name}"
    wide = "".join("p{4cm}" if name in ("source", "note") else "l" for name in COLUMNS)
    texts, tex = as_text(rows, ""), folder / "paper.tex"
    write_text(tex, latex(texts, title, wide))
    return [*write_table(rows, folder, "paper", title, CAPTION.format("report"), texts), tex]


# -- all experiments --------------------------------------------------------------------------


def collect_all(
    results: Path, configs: Path, parse: Callable[..., Experiment]
) -> list[tuple[Experiment, pd.DataFrame]]:
    """The experiments with a section `paper` and their tidy tables, complete or not: those of the
    manifests in `results`, and those of the files in `configs` without a manifest.

    parse: `harness.validation.parse_experiment`. Experiments that cannot be read are skipped with a
    warning; their data and checkpoints need not exist.
    """
    tables = {}
    for path in [*sorted(results.glob("*/manifest.json")), *sorted(configs.glob("*.yaml"))]:
        try:
            is_file = path.suffix == ".yaml"
            config = read_experiment(path) if is_file else read_manifest(path).get("config")
            if not config or not config.get("paper"):
                continue
            experiment = parse(config, str(path), results, files=False)
            if experiment.name not in tables:
                tables[experiment.name] = experiment, collect(experiment, partial=True)[0]
        except UserError as error:
            logger.warning("skipped %s: %s", path, error)
    return list(tables.values())


def write_paper_tables(
    parse: Callable[..., Experiment],
    results: Path = Path("results"),
    configs: Path = Path("configs/paper"),
) -> None:
    """Write one file per published table of PAPERS, with the runs in `results`; print the cells
    (FIDs of the methods here and their teachers) without a run. parse: of `collect_all`."""
    tables = collect_all(results, configs, parse)
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
        # Both halves of "Table 2 (left)" and "Table 2 (right)" are one file.
        title = f"{entry['paper']}, {entry['table'].split(' (')[0]}"
        files.setdefault(title, []).extend(rows or [_row(entry)])
        if is_own(entry) and entry["metric"] == "FID":
            cells += 1
            empty += [] if rows else [entry]
        elif is_own(entry):
            others += 1
    folder = results / "paper-tables"
    for title, rows in files.items():
        table = _frame(rows, TABLE_COLUMNS)
        name = re.sub("[^a-z0-9]+", "-", title.lower()).strip("-")
        write_table(table, folder, name, title, CAPTION.format("paper-tables"), as_text(table, ""))
    count = "1 experiment" if len(tables) == 1 else f"{len(tables)} experiments"
    print(f"{len(files)} tables in {folder}/ (.csv, .md), from {count}")
    print(
        f"{len(empty)} of {cells} FIDs of the methods here and their teachers have no run yet "
        f"({others} numbers in other metrics are listed as reported)"
    )
    for entry in empty:
        name = " ".join(filter(None, [entry["method"], entry["variant"]]))
        table = f"{entry['paper']}, {entry['table']}: {entry['dataset']} {entry['conditioning']}"
        print(f"  {table}: {name}: {entry['value']:g}")
