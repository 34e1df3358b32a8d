"""The published numbers (published.yaml), and which of them an experiment's runs reproduce.

The original of every number is named in its `source`; none was measured here.
"""

from __future__ import annotations

import functools
from pathlib import Path

from harness.config import Experiment, ExperimentModel, PaperSection
from harness.errors import did_you_mean

FILE = Path(__file__).with_name("published.yaml")
PAPERS = ("DMD", "SiD", "SIM", "GDD")

# How the published tables call a student: method, what its freeze and settings must be, and the
# published method with its variants. The first line that fits counts. `None`: a row that names no
# variant, by which a table means the paper's own configuration.
NAMES = (
    ("dmd", {"regression": "none"}, "DMD", ("w/o regression loss",)),
    ("dmd", {"regression": "l2"}, "DMD", ("L2 instead of LPIPS in the regression loss",)),
    ("dmd", {}, "DMD", (None, "full", "sample weighting Eq. 8 (ours)")),
    ("sid", {"alpha": 1.2}, "SiD", (None, "alpha=1.2")),
    ("sid", {"alpha": 1.0}, "SiD", ("alpha=1.0",)),
    ("sim", {}, "SIM", (None,)),
    ("gdd", {"freeze": "innate"}, "GDD-I", (None,)),
    ("gdd", {}, "GDD", (None,)),
)
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


@functools.cache
def published() -> tuple[dict, ...]:
    """All entries in the file's order; every one of KEYS is there, None where unknown."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a tenth of a second instead of one
    entries = yaml.load(FILE.read_text(encoding="utf-8"), loader)
    return tuple(dict.fromkeys(KEYS) | entry for entry in entries)


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


def _is_student(experiment: Experiment, student: str, entry: dict) -> bool:
    if entry["nfe"] not in (1, None):
        return False
    if student in experiment.paper.methods:
        name = experiment.paper.methods[student]
        return (entry["method"], entry["variant"]) == (name.method, name.variant)
    section, config = experiment.students[student], experiment.method_config(student)
    settings = config.model_dump() | {"freeze": section.freeze}
    for method, conditions, name, variants in NAMES:
        conditions = {"freeze": "none"} | conditions
        if method == section.method and all(settings.get(k) == v for k, v in conditions.items()):
            return base(entry["method"]) == name.lower() and entry["variant"] in variants
    return False


def is_number_of(experiment: Experiment, teacher: str, entry: dict) -> bool:
    """Whether an entry is EDM's teacher with this teacher's sampler: the same number of network
    evaluations (DMD counts 512 for 511) and noise added on the way or not."""
    sampler = experiment.teachers[teacher].sampler
    name = experiment.paper.methods.get(experiment.teacher_row(teacher))
    if name:
        if (entry["method"], entry["variant"]) != (name.method, name.variant):
            return False
    elif base(entry["method"]) != "edm":
        return False
    stochastic = "SDE" in entry["method"] or (entry["paper"], entry["dataset"]) in STOCHASTIC
    nfe = 2 * sampler.steps - 1
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


def mistakes(model: ExperimentModel) -> list[str]:
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
