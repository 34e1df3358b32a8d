"""`python -m harness status`: how far every run of an experiment is."""

from __future__ import annotations

import csv
from pathlib import Path

from harness.config.experiment import Experiment
from harness.workflow import failures


def last_row(path: Path) -> dict[str, str]:
    """The last whole row of a train.csv, or {}."""
    try:
        with open(path, newline="") as file:
            rows = [row for row in csv.DictReader(file) if None not in row.values()]
    except FileNotFoundError:
        return {}
    return rows[-1] if rows else {}


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _newest_log(folder: Path) -> Path:
    """train.csv of the run that was touched last (a changed setting starts another beside it)."""
    logs = sorted(folder.glob("runs/*/train.csv"), key=lambda p: p.stat().st_mtime)
    return logs[-1] if logs else folder / "train.csv"


def _locked(folder: Path) -> bool:
    """Whether a process works on the run."""
    from filelock import FileLock, Timeout

    if not (folder / ".lock").exists():
        return False
    try:
        with FileLock(folder / ".lock", timeout=0):
            return False
    except Timeout:
        return True


def _line(name: str, folder: Path, done_file: str, budget: list[dict], scored: Path | None) -> dict:
    row = last_row(_newest_log(folder))
    running = _locked(folder)
    if running:
        state = "running"
    elif (folder / failures.FILE).exists():
        state = "failed"
    elif (folder / done_file).exists():
        state = "scored" if scored is not None and scored.exists() else "trained"
    else:
        state = "interrupted" if row else "waiting"
    line = {"run": name, "state": state, "spent": "", "images/s": "", "ETA": "", "losses": ""}
    if not row:
        return line
    spent = {unit: float(row[unit]) for unit in ("images", "flops", "seconds")}
    nearest = max(budget, key=lambda limit: spent[limit["unit"]] / limit["amount"])
    share = spent[nearest["unit"]] / nearest["amount"]
    line["spent"] = f"{spent[nearest['unit']]:.4g} of {nearest['amount']:.4g} {nearest['unit']}"
    line["images/s"] = f"{float(row['images_per_second']):.0f}"
    if running and 0 < share < 1:
        line["ETA"] = _duration(spent["seconds"] / share * (1 - share))
    line["losses"] = " ".join(
        f"{key[5:]} {float(value):.3g}"
        for key, value in row.items()
        if key.startswith("loss/") and value
    )
    return line


def status(experiment: Experiment) -> list[dict]:
    """One line per teacher, feature network and run: state, budget spent, speed, ETA, losses."""
    lines = []
    for kind, sections, folder, done in (
        ("features", experiment.features, experiment.features_dir, "features.json"),
        ("teacher", experiment.teachers, experiment.teacher_dir, "teacher.json"),
    ):
        for name, section in sections.items():
            images = getattr(section, "images", 1)  # an imported teacher is there or not
            budget = [{"unit": "images", "amount": images}]
            lines.append(_line(f"{kind} {name}", folder(name), done, budget, None))
    for student, seed in experiment.runs:
        lines.append(
            _line(
                f"{student}/seed{seed}",
                experiment.run_dir(student, seed),
                "student.json",
                experiment.budget_spec(student),
                experiment.score_path(student, seed),
            )
        )
    return lines


def print_status(experiment: Experiment) -> None:
    from tabulate import tabulate

    print(tabulate(status(experiment), headers="keys", disable_numparse=True))
    for student, seed in experiment.runs:
        if (experiment.run_dir(student, seed) / failures.FILE).exists():
            print(f"{student}/seed{seed} failed: {failures.reason(experiment, student, seed)}")
