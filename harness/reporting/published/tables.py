"""Published numbers with those that this project reproduces: tables, and verify-teacher.

`reported` comes from numbers.yaml, `reproduced` from an experiment's scores in a metric `fid` or
`fid-…`, in the same statistic (`published.statistic`). Fréchet distances in other features than
Inception's are never compared with FIDs.
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
from harness.evaluation.prepared import check_prepared
from harness.evaluation.registry import column_name
from harness.io.artifacts import digest, write_text
from harness.io.records import TeacherRecord
from harness.method import METHODS
from harness.reporting.collect import collect, current_scores, training_record
from harness.reporting.formatting import as_text, latex, spread_text, write_table
from harness.reporting.manifest import read_manifest
from harness.reporting.published import match
from harness.reporting.published.exact import evaluation_differences, training_differences
from harness.reporting.published.match import PAPERS
from harness.reporting.published.statistic import (
    fid_rows,
    is_fid,
    measure,
    of_best,
    statistic_differences,
    statistic_of,
)

logger = logging.getLogger(__name__)

COLUMNS = (
    *("paper", "table", "method", "variant", "nfe", "metric", "reported", "reported_is"),
    *("evidence", "source", "reproduced", "reproduced_is", "snapshots", "difference", "last"),
    *("setting_match", "note"),
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
TEXTS = ("reproduced", "reproduced_is", "last", "setting_match", "note")
NOT_REPRODUCED = dict.fromkeys(TEXTS, "") | {"difference": None, "snapshots": None}
INTEGERS = {"nfe": "Int64", "snapshots": "Int64"}
CAPTION = (
    "Reported: harness/reporting/published/numbers.yaml, as in each source; `reported_is`: its "
    "statistic, if the source states it. Reproduced: one FID per training seed in the same "
    "statistic, as far as it was measured (`reproduced_is`), mean ± std over training seeds; "
    "`snapshots`: how many snapshots of a run were compared, by other noise than that of the "
    "number. Difference: reproduced - reported. Last: the mean over sampling seeds at the end of "
    "the budget. Setting match: exact (settings, budget, teacher, data, FID, reference, statistic "
    "and sample count are the published ones), changed (some differ), unknown (the published "
    "settings are unknown), scaled or toy (as the experiment declares), released (the authors' "
    "weights, not trained here). Written by `python -m harness {}`."
)


def _row(entry: dict, reproduction: Mapping = NOT_REPRODUCED) -> dict:
    """A row of TABLE_COLUMNS. The notes of a reproduction precede those of the number."""
    statistic = statistic_of(entry) if entry["metric"] == "FID" else None
    reported = {"reported": entry["value"], "reported_is": str(statistic or "")}
    notes = [reproduction["note"], entry["note"], NOT_COMPARED.get(entry["metric"])]
    return entry | reported | reproduction | {"note": "; ".join(filter(None, notes))}


def _reproduction(experiment: Experiment, table: pd.DataFrame, name: str, entry: dict) -> dict:
    """The columns that a run adds to the row of a published FID. The setting match is what the
    experiment declares, but `exact` only if all published settings are known and equal."""
    fids, label = fid_rows(experiment, table, name)
    who = f"{name} of {experiment.name}"
    rows = table[table.final & (table.student == name)]
    # An unavailable network affects only its own metrics.
    failed = rows[(rows.status != "ok") & (rows.metric.isna() | rows.metric.map(is_fid))]
    if len(failed):
        who += f", {len(failed)} excluded: {failed.status.iloc[0]}"
    if fids.empty:
        return NOT_REPRODUCED | {"note": f"{who}: no run has an FID"}
    setting, notes, deviations = experiment.paper.setting, [], ()
    if student := experiment.students.get(name):
        deviations = METHODS[student.method].deviations_under(student.settings)
    is_released, protocol = name in experiment.released, fids.metric.iloc[0]
    changed = [] if is_released else training_differences(experiment, name, entry)
    if changed is None:
        notes.append("the published settings are unknown")
    if different := [*(changed or []), *evaluation_differences(experiment, entry, protocol)]:
        notes.append(f"different from the published run: {', '.join(different)}")
    statistic = statistic_of(entry)
    values, text, snapshots = measure(fids, statistic, is_released)
    differences = statistic_differences(experiment, name, entry)
    if not differences and of_best(experiment, name, statistic) and fids.selected.isna().all():
        differences = ["no snapshot was selected"]
    if differences:
        notes.append(f"another statistic: {', '.join(differences)}")
    papers = 30_000 if entry["dataset"].startswith("COCO-2014-30k") else 50_000
    if experiment.evaluation.num_samples != papers:
        notes.append(f"papers use {papers} samples; fewer raise the FID")
    if is_released:
        record = training_record(experiment, name, experiment.training.seeds[0])
        sha256 = f" (sha256 {record.released['sha256']})" if record else ""
        setting, deviations = (
            "released",
            [f"the authors' released weights{sha256}, not trained here"],
        )
    elif setting == "exact" and (notes or deviations):
        setting = "unknown" if changed is None else "changed"
    last = measure(fids, None).values
    return {
        "reproduced": spread_text(values.mean(), values.std(ddof=1)),
        "reproduced_is": text,
        "snapshots": snapshots,
        "difference": round(values.mean() - entry["value"], 4),
        "last": spread_text(last.mean(), last.std(ddof=1)),
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
    return pd.DataFrame(rows, columns=COLUMNS).astype(INTEGERS)


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
            trained = [row for row in rows if row["setting_match"] != "released"]
            empty += [] if trained else [entry]
        elif match.is_own(entry):
            others += 1
    folder = results / "paper-tables"
    for title, rows in files.items():
        table = pd.DataFrame(rows, columns=TABLE_COLUMNS).astype(INTEGERS)
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
    (code "missing-inputs" or "outdated") names what to run, which trains no student."""
    paths = experiment.paths
    record = paths.teacher(teacher) / "teacher.json"
    features = map(paths.features, experiment.evaluation.extractors)
    inputs = [paths.data / "data.json", record, *(path / "features.json" for path in features)]
    if missing := [path for path in inputs if not path.exists()]:
        reason = f"{missing[0]} is missing"
    elif TeacherRecord.read(record).fingerprint != digest(experiment.teacher_fingerprint(teacher)):
        reason = f"teacher {teacher} was made with other settings than those of the experiment"
    else:
        extractors = experiment.evaluation.extractors
        made_from = experiment.prepared_data, experiment.data_files()
        return check_prepared(experiment.scoring(), extractors, *made_from, configfile)
    target = str(paths.reference_scores(teacher))
    command = ["snakemake", "--cores", "8", target, "--configfile", str(configfile)]
    raise UserError(f"{reason}; make it with: {shlex.join(command)}", "missing-inputs")


def teacher_lines(experiment: Experiment, teacher: str) -> list[str]:
    """Lines `reported | measured`, one per number, from up-to-date scores. A measured value is the
    mean over sampling seeds, whose samples are independent, with its standard error; beside a
    number that is a minimum, also the minimum of as many sampling seeds."""
    entries = current_scores(experiment, teacher).entries
    entry = next(entry for entry in entries if entry.student == "teacher")
    table = pd.DataFrame([row.model_dump() for row in entry.rows])
    table = table[table.num_samples == experiment.evaluation.num_samples]
    fids, others, values_of = [], [], {}
    for key, rows in table.groupby(["metric", "num_samples", "extractor"], sort=False):
        error = math.hypot(*rows.stderr.astype(float)) / len(rows)
        values, column = rows.value.astype(float), column_name(*key)
        text = f"{column} {spread_text(values.mean(skipna=False), error)}"
        (fids if is_fid(key[0]) else others).append(text)
        values_of[text] = values
    sampler = experiment.teachers[teacher].sampler
    lines = [
        f"teacher {teacher}: {sampler.steps} Heun steps, {entry.nfe} network evaluations, "
        f"S_churn {sampler.s_churn:g}",
        "reported | measured",
    ]
    for number in match.concerning(experiment.paper) if experiment.paper else []:
        if not match.is_teacher(number) or number["metric"] != "FID":
            continue
        statistic = statistic_of(number)
        if not fids:
            measured = "no FID extractor in this experiment"
        elif match.is_number_of(experiment, teacher, number):
            measured = ", ".join(fids)
            if statistic and statistic.kind == "minimum":
                count = statistic.evaluations
                lowest = [
                    values_of[fid][:count].min() for fid in fids if len(values_of[fid]) >= count
                ]
                measured += "".join(f", minimum of {count}: {spread_text(x)}" for x in lowest)
        else:
            same = match.same_network(experiment, teacher, number)
            measured = "another sampler" if same else "another network"
        facts = [number["method"], f"{number['nfe']} NFE" if number["nfe"] else "NFE not given"]
        facts += [str(statistic).split(" (")[0]] if statistic else []
        source = f"{', '.join(facts)}; {number['paper']}, {number['table']}"
        lines.append(f"FID {number['value']:g} ({source}) | {measured}")
    return lines + [f"- | {text}" for text in fids + others]
