"""manifest.json: the commit, configuration, versions and hashes behind an experiment's results."""

import contextlib
import json
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import joblib

from harness.config.experiment import Experiment
from harness.errors import UserError
from harness.io.artifacts import read_json, sha256_file
from harness.reporting.collect import feature_record, training_record

PACKAGES = (
    *("torch", "torchvision", "diffusers", "safetensors", "open_clip_torch", "torch-fidelity"),
    *("clean-fid", "scipy", "numpy", "pandas", "matplotlib", "altair", "snakemake", "pydantic"),
    "scikit-learn",
)
ORIGINS = "origins.json"  # in the results folder: packs that `tools.pack` unpacked there
RUN_FACTS = {"run_id", "sha256", "stop", "device", "device_name"}
FEATURE_FACTS = {"sha256", "held_out_accuracy", "aesthetic", "unavailable"}


def _git(*arguments: str) -> str | None:
    options = {"capture_output": True, "text": True, "check": True, "timeout": 10}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(["git", *arguments], **options).stdout.strip()
    return None


def commit_and_changes() -> tuple[str | None, bool | None]:
    """The commit of the working directory, and whether files were changed since; None: unknown."""
    status = _git("status", "--porcelain")
    return _git("rev-parse", "HEAD"), None if status is None else bool(status)


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    names = re.findall(r"model name\s*: (.*)", text)
    return names[0] if names else platform.processor() or platform.machine()


def read_manifest(path: Path) -> dict:
    """Read a manifest of any experiment; a damaged one raises a `UserError` (code "damaged")."""
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
        if isinstance(value, dict):
            return value
        reason = "not a JSON object"
    except (OSError, ValueError) as error:  # includes JSON's and UTF-8's own errors
        reason = str(error)
    remedy = "delete this file: `python -m harness report --configfile …` writes it again"
    raise UserError(f"{path} is damaged ({reason}); {remedy} from the scores", "damaged")


def manifest(experiment: Experiment, protocols: dict[str, dict], outputs: list[Path]) -> dict:
    """The contents of manifest.json."""
    root, (commit, dirty) = experiment.paths.root, commit_and_changes()
    origins = root / ORIGINS
    runs = {
        f"{student}/seed{seed}": record.model_dump(include=RUN_FACTS)
        | ({"released": record.released} if record.released else {})
        for student, seed in experiment.runs
        if (record := training_record(experiment, student, seed))
    }
    features = {
        name: record.model_dump(include=FEATURE_FACTS, exclude_none=True)
        for name in experiment.features
        if (record := feature_record(experiment, name))
    }
    # The devices of the runs: a cluster may write the report on a machine without a GPU.
    used = ", ".join(sorted({run["device_name"] or run["device"] for run in runs.values()}))
    return {
        "schema": 1,
        "experiment": experiment.name,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m harness", *sys.argv[1:]]),
        "commit": commit,
        "dirty": dirty,
        # Packs of results from other machines, with the commit of each.
        **({"origins": read_json(origins, owner=origins)} if origins.exists() else {}),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "device": {
            "setting": experiment.device_setting,
            "used": used or experiment.device_setting,
            "processor": _processor(),
            "usable_cpus": joblib.cpu_count(),
        },
        "config": experiment.raw,
        "runs": runs,
        "features": features,
        "protocols": protocols,
        "outputs": {str(path.relative_to(root)): sha256_file(path) for path in outputs},
    }
