"""verify-teacher: a teacher's published FIDs beside what its own sampler measures here."""

from __future__ import annotations

import math
import shlex
from pathlib import Path

from harness.config.experiment import Experiment
from harness.errors import UserError
from harness.evaluation.columns import column_name
from harness.io.artifacts import digest, read_json
from harness.reporting.collect import reference_scores
from harness.reporting.published.catalogue import (
    STATISTIC,
    base,
    concerning,
    is_number_of,
    is_teacher,
    published,
    same_network,
)
from harness.reporting.published.tables import is_fid
from harness.reporting.tables import cell


def check_made(experiment: Experiment, teacher: str, configfile: Path) -> None:
    """What a teacher's scores are made from must be there. A `UserError` names their target, which
    makes that and trains no student."""
    record = experiment.teacher_dir(teacher) / "teacher.json"
    features = [experiment.features_dir(name) for name in experiment.evaluation.extractors]
    needed = [experiment.data_dir() / "data.json", record]
    needed += [folder / "features.json" for folder in features]
    missing = [path for path in needed if not path.exists()]
    if missing:
        reason = f"{missing[0]} is missing"
    elif read_json(record)["spec"] != digest(experiment.teacher_spec(teacher)):
        reason = f"teacher {teacher} was made with other settings than the experiment's"
    else:
        return
    target = str(experiment.reference_score_path(teacher))
    command = ["snakemake", "--cores", "8", target, "--configfile", str(configfile)]
    raise UserError(f"{reason}; what the teacher's scores need is made by: {shlex.join(command)}")


def _mean_cell(rows: list[dict]) -> str:
    """Mean ± standard error of one number's rows, whose samples are independent draws."""
    if any(row["value"] is None for row in rows):
        return cell(None, None)
    value = sum(row["value"] for row in rows) / len(rows)
    return cell(value, math.hypot(*(row["stderr"] for row in rows)) / len(rows))


def teacher_lines(experiment: Experiment, teacher: str) -> list[str]:
    """`reported | measured`, one line per number; a measured value is the mean over sampling seeds
    with its standard error over the draw of samples."""
    scores = reference_scores(experiment, teacher)
    if scores is None:
        raise UserError(
            f"teacher {teacher} was made with other settings than the experiment's; run the "
            "workflow again"
        )
    entry = next(entry for entry in scores["entries"] if entry["student"] == "teacher")
    rows = [r for r in entry["rows"] if r["num_samples"] == experiment.evaluation.num_samples]
    numbers: dict[tuple, list[dict]] = {}
    for row in rows:
        numbers.setdefault((row["metric"], row["num_samples"], row["extractor"]), []).append(row)
    fids, others = [], []
    for key, group in numbers.items():
        text = f"{column_name(*key)} {_mean_cell(group)}"
        (fids if is_fid(key[0]) else others).append(text)
    sampler = experiment.teachers[teacher].sampler
    lines = [
        f"teacher {teacher}: {sampler.steps} Heun steps, {entry['nfe']} network evaluations, "
        f"S_churn {sampler.s_churn:g}",
        "reported | measured",
    ]
    for i in concerning(experiment.paper) if experiment.paper else []:
        number = published()[i]
        if not is_teacher(number) or number["metric"] != "FID":
            continue
        if not fids:
            found = "no FID extractor in this experiment"
        elif is_number_of(experiment, teacher, number):
            found = ", ".join(fids)
        else:
            same = same_network(experiment, teacher, number)
            found = "another sampler" if same else "another network"
        what = [number["method"], f"{number['nfe']} NFE" if number["nfe"] else "NFE not given"]
        what += STATISTIC.get((number["paper"], base(number["method"])), ())[:1]
        source = f"{', '.join(what)}; {number['paper']}, {number['table']}"
        lines.append(f"FID {number['value']:g} ({source}) | {found}")
    return lines + [f"- | {text}" for text in fids + others]
