"""The published numbers, and which of them an experiment's runs reproduce.

numbers.yaml: the numbers; the `source` of each names its original, and none was measured here.
"""

import functools
import re
from pathlib import Path

from harness.config.experiment import Experiment
from harness.config.jobs import Student
from harness.config.schema import PaperSection
from harness.io.artifacts import read_json

PAPERS = ("DMD", "SiD", "SIM", "GDD")
# Names of the methods here in the papers; other methods are baselines.
OWN = {"dmd", "sid", "sim", "sim-dit-600m", "gdd", "gdd-i"}
# Settings that distinguish DMD from its ablations.
DMD = {"regression": "lpips", "distribution_matching": True, "weighting": "eq8"}
# Names of students in the published tables: method, the settings and freeze that the student must
# have (and its method here, if its name differs), and variants. The first line that fits counts.
# None: a row without a variant, by which a table means the paper's own configuration.
NAMES = (
    ("dmd", DMD | {"teacher_guidance": 3.0}, "SDv1.5, guidance 3"),
    ("dmd", DMD | {"teacher_guidance": 8.0}, "guidance 8, LAION-Aesthetic 6+"),
    ("dmd", DMD, None, "full", "sample weighting Eq. 8 (ours)"),
    ("dmd", DMD | {"regression": "none"}, "w/o regression loss"),
    ("dmd", DMD | {"regression": "l2"}, "L2 instead of LPIPS in the regression loss"),
    ("dmd", DMD | {"distribution_matching": False}, "w/o distribution matching (regression only)"),
    ("dmd", DMD | {"weighting": "sigma/alpha"}, "sample weighting sigma_t/alpha_t"),
    ("dmd", DMD | {"weighting": "sigma^3/alpha"}, "sample weighting sigma_t^3/alpha_t"),
    ("sid", {"alpha": 1.2}, None, "alpha=1.2"),
    ("sid", {"alpha": 1.0}, "alpha=1.0"),
    ("sim", {}, None),
    ("gdd-i", {"method": "gdd", "freeze": "innate"}, None),
    ("gdd", {}, None),
)
# (method, data set) whose own configuration is a variant: SiD's script for AFHQv2 uses alpha 1.0.
UNNAMED = {("sid", "AFHQv2-64"): "alpha=1.0"}
# (paper, dataset) of teachers with a stochastic sampler whose name does not say so (NVlabs/edm).
STOCHASTIC = {("EDM", "ImageNet-64")}


@functools.cache
def read_lines(file: str) -> list[dict]:
    """The entries of a file; each has all keys of the file, None where unknown."""
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast
    entries = yaml.load((Path(__file__).parent / file).read_text(encoding="utf-8"), loader)
    keys = dict.fromkeys(key for entry in entries for key in entry)
    return [keys | entry for entry in entries]


def published() -> list[dict]:
    """All published numbers."""
    return read_lines("numbers.yaml")


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


def name_conditions(student: Student, entry: dict) -> dict | None:
    """The settings by which NAMES names a student, if an entry has this name."""
    facts = student.settings.model_dump()
    facts |= {"method": student.method, "freeze": student.freeze, "lora": student.lora}
    published_name = base(entry["method"])
    variant = entry["variant"] or UNNAMED.get((published_name, entry["dataset"]))
    for name, conditions, *variants in NAMES:
        required = {"method": name, "freeze": "none", "lora": None} | conditions
        if required.items() <= facts.items():
            return conditions if published_name == name and variant in variants else None
    return None


def network_config(experiment: Experiment, teacher: str) -> dict:
    """The class of a teacher's network, `type`, and its arguments: all from the teacher's
    config.json or, before it exists, those that the experiment names."""
    path = experiment.paths.teacher(teacher) / "config.json"
    if not path.exists():
        return experiment.teachers[teacher].network or {}
    config = read_json(path)
    return {"type": config.get("_class_name")} | config


def network(experiment: Experiment, teacher: str) -> str | None:
    """A teacher's network in EDM's terms: `vp` (DDPM++), `ve` (NCSN++) or `adm`; or `sd` (Stable
    Diffusion 1), `pixart`. None for another network, or if `network_config` has none."""
    config = network_config(experiment, teacher)
    kind = config.get("type")
    if kind == "SongUNet":
        return "ve" if config.get("embedding_type") == "fourier" else "vp"
    if kind == "UNet2DConditionModel":
        return "sd" if config.get("cross_attention_dim") == 768 else None
    return {"DhariwalUNet": "adm", "PixArtTransformer2DModel": "pixart"}.get(kind)


def same_network(experiment: Experiment, teacher: str, entry: dict) -> bool:
    """Whether an entry can be of this teacher's network: VE if its note says so, else another."""
    is_ve = re.search(r"\bVE\b", entry["note"] or "") is not None
    return is_ve == (network(experiment, teacher) == "ve")


def _has_name(experiment: Experiment, row: str, entry: dict, default: bool) -> bool:
    """Whether an entry has the published name that the experiment sets for a row."""
    name = experiment.paper.methods.get(row)
    return (entry["method"], entry["variant"]) == (name.method, name.variant) if name else default


def is_stochastic(entry: dict) -> bool:
    """Whether a teacher's number is of the stochastic sampler."""
    return "SDE" in entry["method"] or (entry["paper"], entry["dataset"]) in STOCHASTIC


def is_number_of(experiment: Experiment, teacher: str, entry: dict) -> bool:
    """Whether an entry is EDM's teacher with this teacher's network and sampler: the same number of
    evaluations (DMD counts 512 for 511) and both stochastic or both deterministic."""
    sampler, row = experiment.teachers[teacher].sampler, experiment.teacher_row(teacher)
    is_edm = base(entry["method"]) == "edm" and same_network(experiment, teacher, entry)
    nfe = 2 * sampler.steps - 1  # guidance is not counted
    same = [e for e in published() if e["dataset"] == entry["dataset"] and is_teacher(e)]
    # An unknown count is one of those of other teacher numbers on this data.
    counts = {e["nfe"] for e in ([entry] if entry["nfe"] else same)}
    same_sampler = is_stochastic(entry) == (sampler.s_churn > 0) and bool({nfe, nfe + 1} & counts)
    return _has_name(experiment, row, entry, is_edm) and same_sampler


def runs_of(experiment: Experiment, entry: dict) -> list[str]:
    """The table rows (students and teachers) of an experiment that measure the same as an entry."""
    students = [
        name
        for name, student in experiment.students.items()
        if entry["nfe"] in (1, None)
        and _has_name(experiment, name, entry, name_conditions(student, entry) is not None)
    ]
    teachers = [t for t in experiment.teachers if is_number_of(experiment, t, entry)]
    return [*students, *map(experiment.teacher_row, teachers)]
