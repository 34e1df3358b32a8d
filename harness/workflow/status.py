"""`harness status`: the progress of every teacher, feature network and run of an experiment."""

from __future__ import annotations

import csv
from datetime import timedelta
from pathlib import Path

from harness.config.experiment import Experiment
from harness.workflow import failures


def last_row(path: Path) -> dict[str, str]:
    """The last complete row of a train.csv, or {}."""
    try:
        with open(path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if None not in row.values()]
    except FileNotFoundError:
        return {}
    return rows[-1] if rows else {}


def _newest_log(folder: Path) -> Path:
    """train.csv of the latest run in a folder (a changed setting starts a run of its own)."""
    logs = sorted(folder.glob("runs/*/train.csv"), key=lambda p: p.stat().st_mtime)
    return logs[-1] if logs else folder / "train.csv"


def _locked(folder: Path) -> bool:
    """Whether a process holds the lock of a run's folder."""
    from filelock import FileLock, Timeout

    if not (folder / ".lock").exists():
        return False
    try:
        with FileLock(folder / ".lock", timeout=0):
            return False
    except Timeout:
        return True


def _state(folder: Path, record: str, scores: Path | None, started: bool) -> str:
    if _locked(folder):
        return "running"
    if (folder / failures.FILE).exists():
        return "failed"
    if (folder / record).exists():
        return "scored" if scores is not None and scores.exists() else "trained"
    return "interrupted" if started else "waiting"


def _line(name: str, folder: Path, record: str, budget: list[dict], scores: Path | None) -> dict:
    row = last_row(_newest_log(folder))
    line = {"run": name, "state": _state(folder, record, scores, bool(row))}
    line |= dict.fromkeys(("spent", "images/s", "ETA", "losses"), "")
    if not row:
        return line
    spent = {unit: float(row[unit]) for unit in ("images", "flops", "seconds")}
    nearest = max(budget, key=lambda limit: spent[limit["unit"]] / limit["amount"])
    share = spent[nearest["unit"]] / nearest["amount"]
    line["spent"] = f"{spent[nearest['unit']]:.4g} of {nearest['amount']:.4g} {nearest['unit']}"
    line["images/s"] = f"{float(row['images_per_second']):.0f}"
    if line["state"] == "running" and 0 < share < 1:
        line["ETA"] = str(timedelta(seconds=round(spent["seconds"] / share * (1 - share))))
    losses = {key[5:]: value for key, value in row.items() if key.startswith("loss/") and value}
    line["losses"] = " ".join(f"{name} {float(value):.3g}" for name, value in losses.items())
    return line


def status(experiment: Experiment) -> list[dict]:
    """One row per feature network, teacher and run: state, budget spent, speed, ETA, losses."""
    rows, paths = [], experiment.paths
    for kind, sections, folder, record in (
        ("features", experiment.features, paths.features, "features.json"),
        ("teacher", experiment.teachers, paths.teacher, "teacher.json"),
    ):
        for name, section in sections.items():
            images = getattr(section, "images", 1)  # imported teachers have no budget
            budget = [{"unit": "images", "amount": images}]
            rows.append(_line(f"{kind} {name}", folder(name), record, budget, None))
    for student, seed in experiment.runs:
        folder, scores = paths.run(student, seed), paths.scores(student, seed)
        budget = [limit.model_dump() for limit in experiment.students[student].budget]
        rows.append(_line(f"{student}/seed{seed}", folder, "student.json", budget, scores))
    return rows


def print_status(experiment: Experiment) -> None:
    from tabulate import tabulate

    print(tabulate(status(experiment), headers="keys", disable_numparse=True))
    for student, seed in experiment.runs:
        if (experiment.paths.run(student, seed) / failures.FILE).exists():
            reason = failures.run_status(experiment, student, seed)
            print(f"{student}/seed{seed} {reason}")
