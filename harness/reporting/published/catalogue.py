"""The published numbers (numbers.yaml) and the settings they were trained with (settings.yaml).

The `source` of every number names its original; none was measured here.
"""

import functools
from pathlib import Path

FOLDER = Path(__file__).parent
PAPERS = ("DMD", "SiD", "SIM", "GDD")
# Names of the methods here in the papers; other methods are baselines.
OWN = {"dmd", "sid", "sim", "sim-dit-600m", "gdd", "gdd-i"}
# (paper, method) -> which statistic its number is, and where that is documented. Other papers do
# not document it.
STATISTIC = {
    ("EDM", "edm"): ("the minimum of 3 evaluations", "NVlabs/edm README"),
    ("SiD", "sid"): ("the mean of 10 evaluations", "mingyuanzhou/SiD sid_metrics.py"),
    ("SiDA", "sida family"): ("the mean of 10 evaluations", "mingyuanzhou/SiD sid_metrics.py"),
    ("GDD", "gdd"): ("of the checkpoint with the lowest FID", "Zyriix/GDD training code"),
    ("GDD", "gdd-i"): ("of the checkpoint with the lowest FID", "Zyriix/GDD training code"),
}
KEYS = (
    *("paper", "arxiv", "table", "dataset", "conditioning", "method", "variant", "nfe", "metric"),
    *("value", "std", "train_images", "evidence", "source", "note"),
)


def _read(file: str) -> list[dict]:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast
    return yaml.load((FOLDER / file).read_text(encoding="utf-8"), loader)


@functools.cache
def published() -> tuple[dict, ...]:
    """All entries in the order of the file; each has all of KEYS, None where unknown."""
    return tuple(dict.fromkeys(KEYS) | entry for entry in _read("numbers.yaml"))


@functools.cache
def published_settings() -> list[dict]:
    return _read("settings.yaml")


def base(method: str) -> str:
    """`gdd` for "GDD (abstract does not name the variant)"."""
    return method.split(" (")[0].lower()


def is_teacher(entry: dict) -> bool:
    return base(entry["method"]) == "edm" or "(teacher" in entry["method"]


def is_own(entry: dict) -> bool:
    """Whether a number is of a method of this project or of a teacher."""
    return base(entry["method"]) in OWN or is_teacher(entry)
