"""The format of denoiser.json (docs/teachers.md), checked when it is read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.denoiser import Denoiser
from harness.errors import UserError, did_you_mean
from harness.io.artifacts import read_json
from harness.networks.registry import BACKBONES
from harness.networks.vp import PREDICTIONS, SCHEDULE_KEYS

FILE = "denoiser.json"
OPTIONAL = ("sigma_init", "null_sha256", "imported")  # beside the preconditioning's own fields


def _number(value: Any) -> bool:
    return type(value) in (int, float)


# Field -> whether a value is valid, and what is expected.
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_classes": (lambda v: type(v) is int and v >= 0, "an integer, 0 without classes"),
    "sigma_data": (lambda v: _number(v) and v > 0, "a positive number"),
    "epsilon": (lambda v: _number(v) and v >= 0, "a number, 0 for EDM"),
    "prediction": (lambda v: v in PREDICTIONS, f"one of {', '.join(PREDICTIONS)}"),
    "schedule": (
        lambda v: isinstance(v, dict) and v.keys() <= {*SCHEDULE_KEYS},
        f"an object with keys of {', '.join(SCHEDULE_KEYS)}",
    ),
    "sigma_init": (lambda v: _number(v) and v > 0, "a positive number"),
    "null_sha256": (lambda v: isinstance(v, str), "the sha256 of null.safetensors"),
    "imported": (lambda v: isinstance(v, dict), "an object"),
}


def denoiser_record(folder: Path) -> dict:
    """The content of `denoiser.json`: the preconditioning and, for students, `sigma_init`."""
    record = read_json(Path(folder) / FILE)
    if not isinstance(record, dict):
        raise UserError(f"{Path(folder) / FILE}: expected an object", "invalid-value")
    return record


def read_record(folder: Path) -> tuple[dict, dict, type[Denoiser]]:
    """The checked content of `denoiser.json`, that of `config.json`, and the denoiser's class."""
    path, record = Path(folder) / FILE, denoiser_record(folder)
    config = read_json(Path(folder) / "config.json")
    kind = config.get("_class_name") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        message = "_class_name is missing, the class of the network"
        raise UserError(f"{Path(folder) / 'config.json'}: {message}", "missing-key")
    backbone = BACKBONES[kind]
    known = {c.preconditioning: c for c in backbone.denoisers}
    name = record.get("preconditioning")
    if name not in known:
        message = f"unknown preconditioning {name!r} of {kind}; known: {', '.join(known)}"
        raise UserError(f"{path}: {message}", "unknown-name")
    required = known[name].settings
    fields = ("preconditioning", *required, *OPTIONAL)
    for key in record:
        if key not in fields:
            message = f"unknown field {key!r} of preconditioning {name!r}"
            raise UserError(f"{path}: {message}{did_you_mean(key, fields)}", "unknown-key")
    for key in required:
        if key not in record:
            expected = f": {FIELDS[key][1]}" if key in FIELDS else ""
            message = f"field {key!r} is missing{expected}"
            raise UserError(f"{path}: {message}", "missing-key")
    for key, value in record.items():
        valid, expected = FIELDS.get(key, (lambda _: True, ""))
        if not valid(value):
            message = f"{key}: expected {expected}, not {value!r}"
            raise UserError(f"{path}: {message}", "invalid-value")
    return record, config, known[name]
