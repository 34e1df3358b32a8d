"""manifest.json: what made the results."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import joblib

from harness.config.experiment import Experiment
from harness.errors import UserError
from harness.io.artifacts import read_json, sha256_file

PACKAGES = (
    *("torch", "torchvision", "diffusers", "safetensors", "open_clip_torch", "torch-fidelity"),
    *("clean-fid", "scipy", "numpy", "pandas", "matplotlib", "snakemake", "pydantic"),
    "scikit-learn",
)

FEATURE_FACTS = ("sha256", "held_out_accuracy", "aesthetic", "unavailable")


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(
                line.split(":")[1].strip() for line in file if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def read_manifest(path: Path) -> dict:
    """The manifest of some results, from here or elsewhere. Of a damaged one the results beside it
    are no less worth: the way out names the file alone."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        why = "" if isinstance(value, dict) else "it holds no keys"
    except (OSError, ValueError) as error:  # JSON's and UTF-8's own errors are ValueErrors
        why = str(error)
    if why:
        raise UserError(
            f"{path} is damaged ({why}); delete this one file: `python -m harness report "
            "--configfile …` makes it again from the scores"
        )
    return value


def manifest(experiment: Experiment, protocols: dict[str, dict], outputs: list) -> dict:
    """Commit, configuration, versions, device, protocols, and hashes of weights and outputs."""
    root, status = experiment.root, _git("status", "--porcelain")
    runs = {}
    for student, seed in experiment.runs:
        path = experiment.run_dir(student, seed) / "student.json"
        if path.exists():
            record = read_json(path)
            runs[f"{student}/seed{seed}"] = {
                k: record[k] for k in ("key", "sha256", "stop", "device")
            }
    # What the runs had: on a cluster reports are written where there may be no GPU.
    used = ", ".join(sorted({run["device"] for run in runs.values()}))
    return {
        "schema": 1,
        "experiment": experiment.name,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m harness", *sys.argv[1:]]),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": None if status is None else bool(status),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": {
            "setting": experiment.device_setting,
            "used": used or experiment.device_setting,
            "processor": _processor(),
            "usable_cpus": joblib.cpu_count(),
        },
        "config": experiment.raw,
        "runs": runs,
        "features": {
            name: {k: record[k] for k in FEATURE_FACTS if k in record}
            for name in experiment.features
            if (path := experiment.features_dir(name) / "features.json").exists()
            and (record := read_json(path))
        },
        "protocols": protocols,
        "outputs": {str(path.relative_to(root)): sha256_file(path) for path in outputs},
    }
