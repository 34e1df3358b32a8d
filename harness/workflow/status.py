"""`harness status`: the progress of every teacher, feature network and run of an experiment."""

import csv
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

from harness.config.experiment import Experiment
from harness.config.schema import Limit
from harness.workflow import failures


def _last_row(folder: Path) -> dict[str, str]:
    """The last complete row of the train.csv of the latest run in a folder, or {}."""
    logs = sorted(folder.glob("runs/*/train.csv"), key=lambda path: path.stat().st_mtime)
    rows = csv.DictReader(logs[-1].read_text().splitlines()) if logs else []
    return next((row for row in reversed([*rows]) if None not in row.values()), {})


def _locked(folder: Path) -> bool:
    """Whether a process holds the lock of a run's folder."""
    from filelock import FileLock, Timeout

    path = folder / ".lock"
    try:
        with FileLock(path, timeout=0) if path.exists() else nullcontext():
            return False
    except Timeout:
        return True


def _line(
    name: str, folder: Path, record: str, budget: Sequence[Limit], scores: Path | None = None
) -> dict[str, str]:
    row = _last_row(folder)
    if _locked(folder):
        state = "running"
    elif (folder / failures.FILE).exists():
        state = "failed"
    elif (folder / record).exists():
        state = "scored" if scores is not None and scores.exists() else "trained"
    else:
        state = "interrupted" if row else "waiting"
    line = {"run": name, "state": state, "spent": "", "images/s": "", "ETA": "", "losses": ""}
    if not row:
        return line
    share, limit = max(
        ((float(row[limit.unit]) / limit.amount, limit) for limit in budget), key=lambda x: x[0]
    )
    line["spent"] = f"{float(row[limit.unit]):.4g} of {limit.amount:.4g} {limit.unit}"
    line["images/s"] = f"{float(row['images_per_second']):.0f}"
    if state == "running" and 0 < share < 1:
        seconds = float(row["seconds"]) / share * (1 - share)
        line["ETA"] = str(timedelta(seconds=round(seconds)))
    losses = {key[5:]: value for key, value in row.items() if key.startswith("loss/") and value}
    line["losses"] = " ".join(f"{name} {float(value):.3g}" for name, value in losses.items())
    return line


def print_status(experiment: Experiment) -> None:
    """Print one row per feature network, teacher and run: state, budget spent, speed, ETA, losses;
    then the reasons of failed runs."""
    from tabulate import tabulate

    rows, failed, paths = [], [], experiment.paths
    for kind, sections, folder in (
        ("features", experiment.features, paths.features),
        ("teacher", experiment.teachers, paths.teacher),
    ):
        for name, section in sections.items():
            images = getattr(section, "images", 1)  # imported teachers have no budget
            budget = [Limit(unit="images", amount=images)]
            rows.append(_line(f"{kind} {name}", folder(name), f"{kind}.json", budget))
    for student, seed in experiment.runs:
        folder, scores = paths.run(student, seed), paths.scores(student, seed)
        budget = experiment.students[student].budget
        rows.append(_line(f"{student}/seed{seed}", folder, "student.json", budget, scores))
        if (folder / failures.FILE).exists():
            reason = failures.run_status(experiment, student, seed)
            failed.append(f"{student}/seed{seed} {reason}")
    print(tabulate(rows, headers="keys", disable_numparse=True), *failed, sep="\n")
