"""The published numbers, and which of them an experiment's runs reproduce.

numbers.yaml: the numbers; the `source` of each names its original, and none was measured here.
settings.yaml: the settings that they were trained with.
"""

import functools
import re
from pathlib import Path

from harness.config.experiment import Experiment
from harness.config.jobs import Student
from harness.config.schema import ImportedTeacher, PaperSection
from harness.io.artifacts import read_json

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
# Settings that distinguish DMD from its ablations.
DMD = {"regression": "lpips", "distribution_matching": True, "weighting": "eq8"}
# Names of students in the published tables: method, the freeze and settings it must have, the
# published method and its variants. The first line that fits counts. None: a row without a variant,
# by which a table means the paper's own configuration.
NAMES = (
    ("dmd", DMD | {"teacher_guidance": 3.0}, "dmd", ("SDv1.5, guidance 3",)),
    ("dmd", DMD | {"teacher_guidance": 8.0}, "dmd", ("guidance 8, LAION-Aesthetic 6+",)),
    ("dmd", DMD, "dmd", (None, "full", "sample weighting Eq. 8 (ours)")),
    ("dmd", DMD | {"regression": "none"}, "dmd", ("w/o regression loss",)),
    ("dmd", DMD | {"regression": "l2"}, "dmd", ("L2 instead of LPIPS in the regression loss",)),
    (
        *("dmd", DMD | {"distribution_matching": False}, "dmd"),
        ("w/o distribution matching (regression only)",),
    ),
    ("dmd", DMD | {"weighting": "sigma/alpha"}, "dmd", ("sample weighting sigma_t/alpha_t",)),
    ("dmd", DMD | {"weighting": "sigma^3/alpha"}, "dmd", ("sample weighting sigma_t^3/alpha_t",)),
    ("sid", {"alpha": 1.2}, "sid", (None, "alpha=1.2")),
    ("sid", {"alpha": 1.0}, "sid", ("alpha=1.0",)),
    ("sim", {}, "sim", (None,)),
    ("gdd", {"freeze": "innate"}, "gdd-i", (None,)),
    ("gdd", {}, "gdd", (None,)),
)
# (method, data set) whose own configuration is a variant: SiD's script for AFHQv2 uses alpha 1.0.
UNNAMED = {("sid", "AFHQv2-64"): "alpha=1.0"}
# (paper, dataset) of teachers with a stochastic sampler whose name does not say so (NVlabs/edm).
STOCHASTIC = {("EDM", "ImageNet-64")}


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


def same_data(paper: PaperSection, entry: dict) -> bool:
    same_conditioning = paper.conditioning in (None, entry["conditioning"])
    return entry["dataset"] == paper.dataset and same_conditioning


def concerning(paper: PaperSection) -> list[dict]:
    """The published numbers on an experiment's data: all one-step and teacher numbers, and every
    other row of PAPERS' tables."""
    entries = [entry for entry in published() if same_data(paper, entry)]
    return [e for e in entries if e["nfe"] == 1 or is_teacher(e) or e["paper"] in PAPERS]


def _conditions(student: Student, entry: dict) -> dict | None:
    """The settings by which NAMES names a student, if an entry has this name."""
    settings = student.settings.model_dump() | {"freeze": student.freeze, "lora": student.lora}
    entry_name = base(entry["method"])
    variant = entry["variant"] or UNNAMED.get((entry_name, entry["dataset"]))
    for method, conditions, name, variants in NAMES:
        required = {"method": method, "freeze": "none", "lora": None} | conditions
        if required.items() <= (settings | {"method": student.method}).items():
            return conditions if entry_name == name and variant in variants else None
    return None


def _is_student(experiment: Experiment, student: Student, entry: dict) -> bool:
    if entry["nfe"] not in (1, None):
        return False
    if student.name in experiment.paper.methods:
        name = experiment.paper.methods[student.name]
        return (entry["method"], entry["variant"]) == (name.method, name.variant)
    return _conditions(student, entry) is not None


def changed_settings(experiment: Experiment, name: str, entry: dict) -> list[str] | None:
    """Settings in which a student differs from the published run of an entry: keys of its settings,
    `budget`, `teacher`. None if the published settings are unknown."""
    student = experiment.students[name]
    conditions, keys = _conditions(student, entry), ("dataset", "conditioning")
    wanted = {"method": student.method} | {key: entry[key] for key in keys}
    lines = [line for line in published_settings() if wanted.items() <= line.items()]
    by_variant = {line.get("variant"): line for line in lines}
    original = by_variant.get(entry["variant"]) or by_variant.get(None)
    if conditions is None or original is None:
        return None
    settings = student.settings
    expected = type(settings)(**original["settings"])
    changed = [k for k, v in settings if k not in conditions and v != getattr(expected, k)]
    limit, *more = student.budget
    excess = limit.amount - original["images"]
    # Budgets are whole batches, so up to one batch more than published.
    if more or limit.unit != "images" or not 0 <= excess < settings.batch:
        changed.append("budget")
    if official_network(experiment, student.teacher) != original["teacher"]:
        changed.append("teacher")
    return changed


def official_network(experiment: Experiment, teacher: str) -> str | None:
    """The network of an imported teacher; None for one that was trained here."""
    section = experiment.teachers[teacher]
    return network(experiment, teacher) if isinstance(section, ImportedTeacher) else None


def network(experiment: Experiment, teacher: str) -> str | None:
    """A teacher's network in EDM's terms: `vp` (DDPM++), `ve` (NCSN++) or `adm`; or `sd` (Stable
    Diffusion 1), `pixart`. None for another network, or if neither the experiment nor the teacher's
    config.json defines it."""
    path = experiment.paths.teacher(teacher) / "config.json"
    config = experiment.teachers[teacher].network or (read_json(path) if path.exists() else {})
    kind = config.get("type", config.get("_class_name"))
    if kind == "SongUNet":
        return "ve" if config.get("embedding_type") == "fourier" else "vp"
    if kind == "UNet2DConditionModel":
        return "sd" if config.get("cross_attention_dim") == 768 else None
    return {"DhariwalUNet": "adm", "PixArtTransformer2DModel": "pixart"}.get(kind)


def same_network(experiment: Experiment, teacher: str, entry: dict) -> bool:
    """Whether an entry can be of this teacher's network: VE if its note says so, else another."""
    is_ve = re.search(r"\bVE\b", entry["note"] or "") is not None
    return is_ve == (network(experiment, teacher) == "ve")


def is_number_of(experiment: Experiment, teacher: str, entry: dict) -> bool:
    """Whether an entry is EDM's teacher with this teacher's network and sampler: the same number of
    evaluations (DMD counts 512 for 511) and both stochastic or both deterministic."""
    sampler = experiment.teachers[teacher].sampler
    name = experiment.paper.methods.get(experiment.teacher_row(teacher))
    if name:
        if (entry["method"], entry["variant"]) != (name.method, name.variant):
            return False
    elif base(entry["method"]) != "edm" or not same_network(experiment, teacher, entry):
        return False
    stochastic = "SDE" in entry["method"] or (entry["paper"], entry["dataset"]) in STOCHASTIC
    nfe = 2 * sampler.steps - 1  # guidance is not counted
    counts = [entry["nfe"]]
    if counts == [None]:  # then one of the counts of other teacher numbers on this data
        same = [e for e in published() if e["dataset"] == entry["dataset"] and is_teacher(e)]
        counts = [e["nfe"] for e in same]
    return stochastic == (sampler.s_churn > 0) and bool({nfe, nfe + 1} & set(counts))


def runs_of(experiment: Experiment, entry: dict) -> list[str]:
    """The table rows (students and teachers) of an experiment that measure the same as an entry."""
    students = experiment.students.values()
    names = [student.name for student in students if _is_student(experiment, student, entry)]
    return names + [
        experiment.teacher_row(teacher)
        for teacher in experiment.teachers
        if is_number_of(experiment, teacher, entry)
    ]
