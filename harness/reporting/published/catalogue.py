"""The published numbers (published.yaml), which of them an experiment's runs reproduce, and how far
the runs' settings are the published ones (published_settings.yaml).

The original of every number is named in its `source`; none was measured here.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from harness.config.experiment import Experiment
from harness.config.schema import ImportedTeacher, PaperSection
from harness.errors import did_you_mean
from harness.io.artifacts import read_json

FOLDER = Path(__file__).parent
PAPERS = ("DMD", "SiD", "SIM", "GDD")

# What tells DMD from its ablations.
DMD = {"regression": "lpips", "distribution_matching": True, "weighting": "eq8"}
# How the published tables call a student: method, what its freeze and settings must be, and the
# published method with its variants. The first line that fits counts. `None`: a row that names no
# variant, by which a table means the paper's own configuration.
NAMES = (
    ("dmd", DMD | {"teacher_guidance": 3.0}, "DMD", ("SDv1.5, guidance 3",)),
    (
        *("dmd", DMD | {"teacher_guidance": 8.0}, "DMD"),
        ("guidance 8, LAION-Aesthetic 6+",),
    ),
    ("dmd", DMD, "DMD", (None, "full", "sample weighting Eq. 8 (ours)")),
    ("dmd", DMD | {"regression": "none"}, "DMD", ("w/o regression loss",)),
    ("dmd", DMD | {"regression": "l2"}, "DMD", ("L2 instead of LPIPS in the regression loss",)),
    (
        *("dmd", DMD | {"distribution_matching": False}, "DMD"),
        ("w/o distribution matching (regression only)",),
    ),
    ("dmd", DMD | {"weighting": "sigma/alpha"}, "DMD", ("sample weighting sigma_t/alpha_t",)),
    ("dmd", DMD | {"weighting": "sigma^3/alpha"}, "DMD", ("sample weighting sigma_t^3/alpha_t",)),
    ("sid", {"alpha": 1.2}, "SiD", (None, "alpha=1.2")),
    ("sid", {"alpha": 1.0}, "SiD", ("alpha=1.0",)),
    ("sim", {}, "SIM", (None,)),
    ("gdd", {"freeze": "innate"}, "GDD-I", (None,)),
    ("gdd", {}, "GDD", (None,)),
)
# (method, data set) whose own configuration is a variant: SiD's script for AFHQv2 has alpha 1.0.
UNNAMED = {("sid", "AFHQv2-64"): "alpha=1.0"}
# What these methods are called in PAPERS, for telling a cell to fill from a baseline.
OWN = {"dmd", "sid", "sim", "sim-dit-600m", "gdd", "gdd-i"}

# (paper, method) -> what its number is, and where that is said. Others do not say.
STATISTIC = {
    ("EDM", "edm"): ("the minimum of 3 evaluations", "NVlabs/edm README"),
    ("SiD", "sid"): ("the mean of 10 evaluations", "mingyuanzhou/SiD sid_metrics.py"),
    ("SiDA", "sida family"): ("the mean of 10 evaluations", "mingyuanzhou/SiD sid_metrics.py"),
    ("GDD", "gdd"): ("of the checkpoint with the lowest FID", "Zyriix/GDD training code"),
    ("GDD", "gdd-i"): ("of the checkpoint with the lowest FID", "Zyriix/GDD training code"),
}
# (paper, dataset) of teachers sampled stochastically whose name does not say so: NVlabs/edm README.
STOCHASTIC = {("EDM", "ImageNet-64")}

KEYS = (
    *("paper", "arxiv", "table", "dataset", "conditioning", "method", "variant", "nfe", "metric"),
    *("value", "std", "train_images", "evidence", "source", "note"),
)


def _read(file: str) -> list[dict]:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a tenth of a second instead of one
    return yaml.load((FOLDER / file).read_text(encoding="utf-8"), loader)


@functools.cache
def published() -> tuple[dict, ...]:
    """All entries in the file's order; every one of KEYS is there, None where unknown."""
    return tuple(dict.fromkeys(KEYS) | entry for entry in _read("numbers.yaml"))


@functools.cache
def published_settings() -> tuple[dict, ...]:
    return tuple({"variant": None} | entry for entry in _read("settings.yaml"))


def base(method: str) -> str:
    """`GDD` of "GDD (abstract does not name the variant)", in lower case: SIM is also SiM."""
    return method.split(" (")[0].lower()


def is_teacher(entry: dict) -> bool:
    return base(entry["method"]) == "edm" or "(teacher" in entry["method"]


def is_own(entry: dict) -> bool:
    """A number that a run of this project can stand beside: its methods' and the teachers'."""
    return base(entry["method"]) in OWN or is_teacher(entry)


def same_data(paper: PaperSection, entry: dict) -> bool:
    return entry["dataset"] == paper.dataset and (
        paper.conditioning in (None, entry["conditioning"])
    )


def concerning(paper: PaperSection) -> list[int]:
    """Positions in `published()` of what stands beside an experiment: the one-step and teacher
    numbers on its data, and every other row of the four papers' tables there."""
    return [
        i
        for i, entry in enumerate(published())
        if same_data(paper, entry)
        and (entry["nfe"] == 1 or is_teacher(entry) or entry["paper"] in PAPERS)
    ]


def _line(experiment: Experiment, student: str, entry: dict) -> tuple | None:
    """The line of NAMES that fits a student, if an entry has its name."""
    section, config = experiment.students[student], experiment.method_config(student)
    settings = config.model_dump() | {"freeze": section.freeze, "lora": section.lora}
    called = base(entry["method"])
    variant = entry["variant"] or UNNAMED.get((called, entry["dataset"]))
    for line in NAMES:
        method, conditions, name, variants = line
        conditions = {"freeze": "none", "lora": None} | conditions
        if method == section.method and all(settings.get(k) == v for k, v in conditions.items()):
            return line if called == name.lower() and variant in variants else None
    return None


def _is_student(experiment: Experiment, student: str, entry: dict) -> bool:
    if entry["nfe"] not in (1, None):
        return False
    if student in experiment.paper.methods:
        name = experiment.paper.methods[student]
        return (entry["method"], entry["variant"]) == (name.method, name.variant)
    return _line(experiment, student, entry) is not None


def changed_settings(experiment: Experiment, student: str, entry: dict) -> list[str] | None:
    """What of a student's training is not as that of a published number that it stands beside: keys
    of its settings, `budget`, `teacher`. None if nobody has told how the number was trained."""
    line = _line(experiment, student, entry)
    told = [
        settings
        for settings in published_settings()
        if line
        and settings["method"] == line[0]
        and all(settings[key] == entry[key] for key in ("dataset", "conditioning"))
        and settings["variant"] in (None, entry["variant"])
    ]
    if not told:
        return None
    as_told = max(told, key=lambda settings: settings["variant"] is not None)
    mine = experiment.method_config(student)
    theirs = type(mine)(**as_told["settings"])
    changed = [k for k, v in mine if k not in line[1] and v != getattr(theirs, k)]
    limit, *more = experiment.budget(student)
    # Budgets are whole batches, so up to one more than was published.
    if more or limit.unit != "images" or not 0 <= limit.amount - as_told["images"] < mine.batch:
        changed.append("budget")
    if official_network(experiment, experiment.teacher_of(student)) != as_told["teacher"]:
        changed.append("teacher")
    return changed


def official_network(experiment: Experiment, teacher: str) -> str | None:
    """The network of a teacher from elsewhere; None for one that was trained here."""
    section = experiment.teachers[teacher]
    return network(experiment, teacher) if isinstance(section, ImportedTeacher) else None


def network(experiment: Experiment, teacher: str) -> str | None:
    """A teacher's network in EDM's words: `vp` (DDPM++), `ve` (NCSN++) or `adm`; or `sd` (Stable
    Diffusion 1), `pixart`. None if it is another, or if neither the experiment nor an imported file
    tells."""
    made = experiment.teacher_dir(teacher) / "config.json"
    told = experiment.teachers[teacher].network or (read_json(made) if made.exists() else {})
    kind = told.get("type", told.get("_class_name"))
    if kind == "SongUNet":
        return "ve" if told.get("embedding_type") == "fourier" else "vp"
    if kind == "UNet2DConditionModel":
        return "sd" if told.get("cross_attention_dim") == 768 else None
    return {"DhariwalUNet": "adm", "PixArtTransformer2DModel": "pixart"}.get(kind)


def same_network(experiment: Experiment, teacher: str, entry: dict) -> bool:
    """Whether an entry can be of this teacher's network: an entry is of the VE one if its note says
    so, else of the other."""
    noted = re.search(r"\bVE\b", entry["note"] or "") is not None
    return noted == (network(experiment, teacher) == "ve")


def is_number_of(experiment: Experiment, teacher: str, entry: dict) -> bool:
    """Whether an entry is EDM's teacher with this teacher's network and sampler: the same number of
    evaluations (DMD counts 512 for 511) and noise added on the way or not."""
    sampler = experiment.teachers[teacher].sampler
    name = experiment.paper.methods.get(experiment.teacher_row(teacher))
    if name:
        if (entry["method"], entry["variant"]) != (name.method, name.variant):
            return False
    elif base(entry["method"]) != "edm" or not same_network(experiment, teacher, entry):
        return False
    stochastic = "SDE" in entry["method"] or (entry["paper"], entry["dataset"]) in STOCHASTIC
    nfe = 2 * sampler.steps - 1  # guidance is not counted
    told = [entry["nfe"]]
    if told == [None]:  # then it is one of those that others give for teachers on this data
        told = [e["nfe"] for e in published() if is_teacher(e) and e["dataset"] == entry["dataset"]]
    return stochastic == (sampler.s_churn > 0) and bool({nfe, nfe + 1} & set(told))


def runs_of(experiment: Experiment, entry: dict) -> list[str]:
    """The students and teachers of an experiment, as its tables name them, that are what an entry
    measured."""
    students = [name for name in experiment.students if _is_student(experiment, name, entry)]
    return students + [
        experiment.teacher_row(teacher)
        for teacher in experiment.teachers
        if is_number_of(experiment, teacher, entry)
    ]


def mistakes(model) -> list[str]:
    """What an experiment's `paper:` names that was never published."""
    paper = model.paper
    entries = [entry for entry in published() if entry["dataset"] == paper.dataset]
    if not entries:
        hint = did_you_mean(paper.dataset, {entry["dataset"] for entry in published()})
        return [f"paper.dataset: no published numbers on {paper.dataset!r}{hint}"]
    kinds = sorted({entry["conditioning"] for entry in entries})
    if paper.conditioning is None and len(kinds) > 1:
        return [f"paper.conditioning: {paper.dataset} has {' and '.join(kinds)} numbers; name one"]
    if paper.conditioning not in (None, *kinds):
        hint = did_you_mean(paper.conditioning, kinds)
        return [f"paper.conditioning: {paper.dataset} has no {paper.conditioning!r} numbers{hint}"]
    lines = []
    teachers = ["teacher"] if len(model.teachers) == 1 else [f"teacher/{t}" for t in model.teachers]
    for student, name in paper.methods.items():
        where, known = f"paper.methods.{student}", [*teachers, *model.students]
        if student not in known:
            lines.append(f"{where}: unknown student{did_you_mean(student, known)}")
        mine = [entry for entry in entries if same_data(paper, entry)]
        variants = [entry["variant"] for entry in mine if entry["method"] == name.method]
        if not variants:
            hint = did_you_mean(name.method, {entry["method"] for entry in mine})
            lines.append(f"{where}.method: no published numbers of {name.method!r}{hint}")
        elif name.variant not in variants:
            hint = did_you_mean(name.variant or "", set(filter(None, variants)))
            lines.append(f"{where}.variant: no published numbers of {name.variant!r}{hint}")
    return lines
