"""Published numbers with those that this project reproduces: tables, and verify-teacher.

`reported` comes from numbers.yaml, `reproduced` from an experiment's final scores in a metric `fid`
or `fid-…`. Fréchet distances in other features than Inception's are never compared with FIDs.
"""

import logging
import math
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd

from harness.config.experiment import Experiment
from harness.config.loading import read_experiment
from harness.errors import UserError
from harness.evaluation.registry import column_name
from harness.io.artifacts import digest, write_text
from harness.io.records import TeacherRecord
from harness.method import METHODS
from harness.reporting.collect import collect, current_scores
from harness.reporting.formatting import as_text, latex, spread_text, write_table
from harness.reporting.manifest import read_manifest
from harness.reporting.published import match
from harness.reporting.published.match import PAPERS, STATISTIC

logger = logging.getLogger(__name__)

COLUMNS = (
    *("paper", "table", "method", "variant", "nfe", "metric", "reported", "evidence", "source"),
    *("reproduced", "difference", "setting_match", "note"),
)
# A published table may cover several data sets.
TABLE_COLUMNS = (*COLUMNS[:2], "dataset", "conditioning", *COLUMNS[2:])
# The tables that `paper-tables` writes: paper -> prefixes of the tables' names.
TABLES = dict.fromkeys(PAPERS, "") | {"DMD": tuple(f"Table {i}" for i in (1, 2, 3, 4, 6))}
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
    """The final FIDs of a table row at the main sample count, one per training seed (the mean over
    its sampling seeds), and the name of their column. If there are several: EDM's protocol, which
    all of PAPERS use."""
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
    statistic = STATISTIC.get((entry["paper"], match.base(entry["method"])))
    source = f"reported is {statistic[0]} ({statistic[1]})" if statistic else ""
    notes = [reproduction["note"], source, entry["note"], NOT_COMPARED.get(entry["metric"])]
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
        deviations = METHODS[student.method].deviations_under(student.settings)
    changed = match.changed_settings(experiment, name, entry)
    if changed is None:
        notes.append("the published settings are unknown")
    elif changed:
        notes.append(f"different from the published run: {', '.join(changed)}")
    papers = 30_000 if entry["dataset"].startswith("COCO-2014-30k") else 50_000
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
    """A published number with each of its reproductions."""
    names = match.runs_of(experiment, entry) if entry["metric"] == "FID" else []
    return [_row(entry, _reproduction(experiment, table, name, entry)) for name in names]


def paper_table(experiment: Experiment, table: pd.DataFrame) -> pd.DataFrame:
    """The published numbers on an experiment's data with its own, from `collect`'s table. Columns:
    COLUMNS; one row for each run that reproduces a number, or one without a reproduction."""
    entries = match.concerning(experiment.paper)
    rows = [row for e in entries for row in _rows(experiment, table, e) or [_row(e)]]
    return pd.DataFrame(rows, columns=COLUMNS).astype({"nfe": "Int64"})


def write_paper(experiment: Experiment, table: pd.DataFrame, folder: Path) -> list[Path]:
    """Write paper.{csv,md,tex} to a folder; returns their paths."""
    rows = paper_table(experiment, table)
    title = f"Published numbers on {experiment.paper.dataset}, and those of {experiment.name}"
    wide = "".join("p{4cm}" if name in ("source", "note") else "l" for name in COLUMNS)
    texts, tex = as_text(rows, ""), folder / "paper.tex"
    write_text(tex, latex(texts, title, wide))
    return [*write_table(rows, folder, "paper", title, CAPTION.format("report"), texts), tex]


# -- all experiments --------------------------------------------------------------------------


def collect_all(results: Path, configs: Path, parse: Callable[..., Experiment]) -> list[tuple]:
    """The experiments with a section `paper` and their tidy tables, complete or not: those of the
    manifests in `results`, and those of the files in `configs` without a manifest. Experiments that
    cannot be read are skipped with a warning; their data and checkpoints need not exist."""
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
    (FIDs of the methods here and their teachers) without a run. parse: `parse_experiment`."""
    tables = collect_all(results, configs, parse)
    files: dict[str, list[dict]] = {}
    empty, cells, others = [], 0, 0
    for entry in match.published():
        if not (entry["table"] or "").startswith(TABLES.get(entry["paper"], ())):
            continue
        concerned = [item for item in tables if match.same_data(item[0].paper, entry)]
        rows = [row for e, t in concerned for row in _rows(e, t, entry) if row["reproduced"]]
        # Both halves of "Table 2 (left)" and "Table 2 (right)" are one file.
        title = f"{entry['paper']}, {entry['table'].split(' (')[0]}"
        files.setdefault(title, []).extend(rows or [_row(entry)])
        if match.is_own(entry) and entry["metric"] == "FID":
            cells += 1
            empty += [] if rows else [entry]
        elif match.is_own(entry):
            others += 1
    folder = results / "paper-tables"
    for title, rows in files.items():
        table = pd.DataFrame(rows, columns=TABLE_COLUMNS).astype({"nfe": "Int64"})
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


# -- verify-teacher -----------------------------------------------------------------------------


def check_inputs(experiment: Experiment, teacher: str, configfile: Path) -> None:
    """Check that everything that a teacher's scores need exists and is up to date; a `UserError`
    (code "missing-inputs") names a workflow target that trains no student."""
    paths = experiment.paths
    record = paths.teacher(teacher) / "teacher.json"
    features = map(paths.features, experiment.evaluation.extractors)
    inputs = [paths.data / "data.json", record, *(path / "features.json" for path in features)]
    if missing := [path for path in inputs if not path.exists()]:
        reason = f"{missing[0]} is missing"
    elif TeacherRecord.read(record).fingerprint != digest(experiment.teacher_fingerprint(teacher)):
        reason = f"teacher {teacher} was made with other settings than those of the experiment"
    else:
        return
    target = str(paths.reference_scores(teacher))
    command = ["snakemake", "--cores", "8", target, "--configfile", str(configfile)]
    raise UserError(f"{reason}; make it with: {shlex.join(command)}", "missing-inputs")


def teacher_lines(experiment: Experiment, teacher: str) -> list[str]:
    """Lines `reported | measured`, one per number, from up-to-date scores. A measured value is the
    mean over sampling seeds, whose samples are independent, with its standard error."""
    entries = current_scores(experiment, teacher).entries
    entry = next(entry for entry in entries if entry.student == "teacher")
    table = pd.DataFrame([row.model_dump() for row in entry.rows])
    table = table[table.num_samples == experiment.evaluation.num_samples]
    fids, others = [], []
    for key, rows in table.groupby(["metric", "num_samples", "extractor"], sort=False):
        error = math.hypot(*rows.stderr.astype(float)) / len(rows)
        text = spread_text(rows.value.astype(float).mean(skipna=False), error)
        (fids if is_fid(key[0]) else others).append(f"{column_name(*key)} {text}")
    sampler = experiment.teachers[teacher].sampler
    lines = [
        f"teacher {teacher}: {sampler.steps} Heun steps, {entry.nfe} network evaluations, "
        f"S_churn {sampler.s_churn:g}",
        "reported | measured",
    ]
    for number in match.concerning(experiment.paper) if experiment.paper else []:
        if not match.is_teacher(number) or number["metric"] != "FID":
            continue
        if not fids:
            measured = "no FID extractor in this experiment"
        elif match.is_number_of(experiment, teacher, number):
            measured = ", ".join(fids)
        else:
            same = match.same_network(experiment, teacher, number)
            measured = "another sampler" if same else "another network"
        facts = [number["method"], f"{number['nfe']} NFE" if number["nfe"] else "NFE not given"]
        facts += STATISTIC.get((number["paper"], match.base(number["method"])), ())[:1]
        source = f"{', '.join(facts)}; {number['paper']}, {number['table']}"
        lines.append(f"FID {number['value']:g} ({source}) | {measured}")
    return lines + [f"- | {text}" for text in fids + others]
