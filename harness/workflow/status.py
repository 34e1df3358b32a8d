"""`harness status`: the progress of every teacher, feature network and run of an experiment."""

import csv
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from harness.config.experiment import Experiment
from harness.config.schema import Limit
from harness.io.artifacts import read_json
from harness.io.locks import is_locked
from harness.workflow.machine import FAILURE


def run_status(experiment: Experiment, student: str, seed: int) -> str:
    """Status of a run without scores: its first failed dependency, or "missing (…)"."""
    run = experiment.student_run(student, seed)
    return _status(experiment, run.teacher, run.features, run.pairs, run.folder)


def teacher_status(experiment: Experiment, teacher: str) -> str:
    """Status of a teacher without scores, likewise."""
    return _status(experiment, experiment.paths.teacher(teacher))


def _status(experiment: Experiment, *folders: Path | None) -> str:
    paths = experiment.paths
    extractors = map(paths.features, experiment.evaluation.extractors)
    for folder in filter(None, (paths.data, *extractors, *folders)):
        if (folder / FAILURE).exists():
            record = read_json(folder / FAILURE)
            return f"failed ({record['stage']}: {record['reason']})"
    return f"missing (not finished; see {paths.logs})"


def _last_row(folder: Path) -> dict[str, str]:
    """The last complete row of the train.csv of the latest run in a folder, or {}."""
    logs = sorted(folder.glob("runs/*/train.csv"), key=lambda path: path.stat().st_mtime)
    rows = csv.DictReader(logs[-1].read_text(encoding="utf-8").splitlines()) if logs else []
    return next((row for row in reversed([*rows]) if None not in row.values()), {})


def _line(
    name: str, folder: Path, record: str, budget: Sequence[Limit], scores: Path | None = None
) -> dict[str, str]:
    row = _last_row(folder)
    if is_locked(folder):
        state = "running"
    elif (folder / FAILURE).exists():
        state = "failed"
    elif (folder / record).exists():
        state = "trained"
        if scores is not None and scores.exists():
            state = "scored"
        elif scores is not None and scores.with_suffix(".parts").exists():
            state = "scoring"
    else:
        state = "interrupted" if row or (folder / "runs").exists() else "waiting"
    line = {"run": name, "state": state, "spent": "", "images/s": "", "ETA": "", "losses": ""}
    if not row:
        return line
    limit = max(budget, key=lambda limit: float(row[limit.unit]) / limit.amount)
    share = float(row[limit.unit]) / limit.amount
    amounts = [float(row[limit.unit]), limit.amount]
    spent, whole = (f"{x:,.0f}" if limit.unit == "images" else f"{x:.4g}" for x in amounts)
    line["spent"] = f"{spent} of {whole} {limit.unit}"
    line["images/s"] = f"{float(row['images_per_second']):.0f}"
    if state == "running" and 0 < share < 1:
        seconds = float(row["seconds"]) / share * (1 - share)
        line["ETA"] = str(timedelta(seconds=round(seconds)))
    losses = {key[5:]: value for key, value in row.items() if key.startswith("loss/") and value}
    line["losses"] = " ".join(f"{name} {float(value):.3g}" for name, value in losses.items())
    return line


def print_status(experiment: Experiment) -> None:
    """Print one row per feature network, teacher and run, then the reasons of failed runs."""
    from tabulate import tabulate

    rows, failed, paths = [], [], experiment.paths
    if not paths.root.is_dir():  # perhaps the command runs in another folder than the workflow
        print(f"{paths.root.resolve()} does not exist yet")
    sections = {"features": experiment.features, "teacher": experiment.teachers}
    for kind, items in sections.items():
        for name, item in items.items():
            amount = getattr(item, "images", 1)  # imported teachers have no budget
            folder, budget = getattr(paths, kind)(name), [Limit(unit="images", amount=amount)]
            scores = paths.reference_scores(name) if kind == "teacher" else None
            rows.append(_line(f"{kind} {name}", folder, f"{kind}.json", budget, scores))
    for student, seed in experiment.runs:
        folder, scores = paths.run(student, seed), paths.scores(student, seed)
        budget = experiment.students[student].budget
        line = _line(f"{student}/seed{seed}", folder, "student.json", budget, scores)
        if student in experiment.released:
            line["state"] = line["state"].replace("trained", "imported")
            line["spent"] = "released weights, not trained here"
        rows.append(line)
        if (folder / FAILURE).exists():
            failed.append(f"{student}/seed{seed} {run_status(experiment, student, seed)}")
    print(tabulate(rows, headers="keys", disable_numparse=True), *failed, sep="\n")
