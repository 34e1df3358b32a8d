"""verify-teacher: a teacher's published FIDs and what its own sampler measures here."""

import math
import shlex
from pathlib import Path

from harness.config.experiment import Experiment
from harness.errors import UserError
from harness.evaluation.registry import column_name
from harness.io.artifacts import digest
from harness.io.records import ScoreRow, TeacherRecord
from harness.reporting.collect import reference_scores
from harness.reporting.formatting import MISSING, spread_text
from harness.reporting.published.match import (
    STATISTIC,
    base,
    concerning,
    is_number_of,
    is_teacher,
    same_network,
)
from harness.reporting.published.tables import is_fid


def check_inputs(experiment: Experiment, teacher: str, configfile: Path) -> None:
    """Check that everything that a teacher's scores need exists and is up to date.

    Otherwise a `UserError` (code "missing-inputs") names the workflow target that makes it without
    training a student.
    """
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


def _mean_text(rows: list[ScoreRow]) -> str:
    """Mean ± standard error over the sampling seeds, whose samples are independent."""
    if any(row.value is None for row in rows):
        return MISSING
    value = sum(row.value for row in rows) / len(rows)
    return spread_text(value, math.hypot(*(row.stderr for row in rows)) / len(rows))


def teacher_lines(experiment: Experiment, teacher: str) -> list[str]:
    """Lines `reported | measured`, one per number, from up-to-date scores. A measured value is the
    mean over sampling seeds with its standard error over the draw of samples."""
    entries = reference_scores(experiment, teacher).entries
    entry = next(entry for entry in entries if entry.student == "teacher")
    rows: dict[tuple, list[ScoreRow]] = {}
    for row in entry.rows:
        if row.num_samples == experiment.evaluation.num_samples:
            rows.setdefault((row.metric, row.num_samples, row.extractor), []).append(row)
    texts = {key: f"{column_name(*key)} {_mean_text(group)}" for key, group in rows.items()}
    fids = [text for (metric, *_), text in texts.items() if is_fid(metric)]
    others = [text for text in texts.values() if text not in fids]
    sampler = experiment.teachers[teacher].sampler
    lines = [
        f"teacher {teacher}: {sampler.steps} Heun steps, {entry.nfe} network evaluations, "
        f"S_churn {sampler.s_churn:g}",
        "reported | measured",
    ]
    for number in concerning(experiment.paper) if experiment.paper else []:
        if not is_teacher(number) or number["metric"] != "FID":
            continue
        if not fids:
            measured = "no FID extractor in this experiment"
        elif is_number_of(experiment, teacher, number):
            measured = ", ".join(fids)
        else:
            same = same_network(experiment, teacher, number)
            measured = "another sampler" if same else "another network"
        facts = [number["method"], f"{number['nfe']} NFE" if number["nfe"] else "NFE not given"]
        facts += STATISTIC.get((number["paper"], base(number["method"])), ())[:1]
        source = f"{', '.join(facts)}; {number['paper']}, {number['table']}"
        lines.append(f"FID {number['value']:g} ({source}) | {measured}")
    return lines + [f"- | {text}" for text in fids + others]
