"""Load an experiment: parse the files, run every package's checks, report all errors together."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from harness.config.experiment import Experiment
from harness.config.loading import merge, read_experiment, read_yaml
from harness.config.paths import Paths
from harness.config.schema import (
    NAME,
    ClaimSection,
    DataSection,
    EvaluationSection,
    ExperimentFile,
    FeatureSettings,
    ImportedTeacher,
    PaperSection,
    Section,
    StudentSection,
    TeacherSection,
    TrainedTeacher,
    TrainingSection,
)
from harness.data import checks as data_checks
from harness.data.registry import DATASETS
from harness.errors import ConfigError, Problem, UserError, did_you_mean
from harness.evaluation import checks as evaluation_checks
from harness.features.base import FEATURES, new_extractor, settings_class
from harness.networks.registry import BACKBONES
from harness.registry import load_plugin
from harness.reporting import checks as reporting_checks
from harness.students import checks as student_checks
from harness.teachers import checks as teacher_checks

RESERVED = {"teacher", "teacher-1step", "floor", "teachers"}  # rows of the tables, and a folder
COMPILERS = ("g++", "clang++")  # torch.compile needs one of them


@dataclass
class Sections:
    """The sections of an experiment file that are valid by themselves. An invalid section is None;
    an invalid item is missing from its mapping."""

    raw: dict
    data: DataSection | None = None
    training: TrainingSection | None = None
    evaluation: EvaluationSection | None = None
    paper: PaperSection | None = None
    claims: list[ClaimSection] = field(default_factory=list)
    features: dict[str, FeatureSettings] = field(default_factory=dict)
    teachers: dict[str, TeacherSection] = field(default_factory=dict)
    students: dict[str, StudentSection] = field(default_factory=dict)

    @property
    def names(self) -> dict[str, list[str]]:
        """Names of all items, so that a reference to an invalid one is not reported as unknown."""
        raw = {key: self.raw.get(key) for key in ("features", "teachers", "students")}
        return {key: list(value) if isinstance(value, dict) else [] for key, value in raw.items()}


# -- parsing ------------------------------------------------------------------------------------


def _teacher_class(raw: Any) -> type[TeacherSection]:
    return ImportedTeacher if isinstance(raw, dict) and "source" in raw else TrainedTeacher


# Of sections with named items: the class of an item, given its content.
ITEMS: dict[str, Callable[[Any], type[Section]]] = {
    "features": settings_class,
    "teachers": _teacher_class,
    "students": lambda raw: StudentSection,
}
SECTIONS = {
    "data": DataSection,
    "training": TrainingSection,
    "evaluation": EvaluationSection,
    "paper": PaperSection,
}


def _parse(raw: dict) -> tuple[Sections, list[Problem]]:
    """Parse section by section and item by item, so that one error hides no other."""
    sections, problems = Sections(raw), []

    def attempt(section_class: type[Section], value: Any, key: str) -> Section | None:
        try:
            return section_class.model_validate(value)
        except ValidationError as error:
            problems.extend(translate(error, section_class, key))
        return None

    for key, section_class in SECTIONS.items():
        if isinstance(raw.get(key), dict):
            setattr(sections, key, attempt(section_class, raw[key], key))
    for key, class_of in ITEMS.items():
        for name, value in raw[key].items() if isinstance(raw.get(key), dict) else ():
            try:
                item = attempt(class_of(value), value, f"{key}.{name}")
            except UserError as error:
                problems.append(Problem(f"{key}.{name}.type", error.code, str(error)))
                continue
            if item is not None:
                getattr(sections, key)[name] = item
    try:
        sections.claims = ExperimentFile.model_validate(raw).claims
    except ValidationError as error:
        locations = [item["loc"] for item in error.errors()]
        problems += [
            problem
            for problem, location in zip(translate(error, ExperimentFile), locations, strict=True)
            # Errors inside the sections above are reported already.
            if len(location) == 1 or location[0] not in {*SECTIONS, *ITEMS}
        ]
    return sections, problems


def translate(error: ValidationError, model: type[BaseModel], prefix: str = "") -> list[Problem]:
    """A pydantic error of `model` as problems; `prefix` is the key of the validated section."""
    problems = []
    for item in error.errors():
        key = ".".join(filter(None, (prefix, *map(str, item["loc"]))))
        if item["type"] == "extra_forbidden":
            hint = did_you_mean(str(item["loc"][-1]), _keys_at(model, item["loc"][:-1]))
            problems.append(Problem(key, "unknown-key", f"unknown key{hint}"))
        elif item["type"] == "missing":
            problems.append(Problem(key, "missing-key", "missing"))
        else:
            message = f"{item['msg'][0].lower()}{item['msg'][1:]}, not {item['input']!r}"
            problems.append(Problem(key, "invalid-value", message))
    return problems


def _keys_at(model: type[BaseModel] | None, location: tuple) -> list[str]:
    """The valid keys of the section at a location inside `model`."""
    for part in location:
        field_info = model.model_fields.get(part) if model else None
        if field_info is not None:
            model = _section_in(field_info.annotation)
    return sorted(model.model_fields) if model else []


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """The section class inside an annotation such as dict[str, StudentSection]."""
    if get_origin(annotation) is None and isinstance(annotation, type):
        return annotation if issubclass(annotation, BaseModel) else None
    return next(filter(None, map(_section_in, get_args(annotation))), None)


# -- checking -----------------------------------------------------------------------------------


def _check_names(s: Sections) -> list[Problem]:
    names = [("name", s.raw.get("name")), ("data.name", s.data.name if s.data else None)]
    names += [(f"{key}.{name}", name) for key, items in s.names.items() for name in items]
    message = "use lower-case letters, digits, '.', '_' and '-' in names, not"
    problems = [
        Problem(key, "invalid-name", f"{message} {name!r}")
        for key, name in names
        if isinstance(name, str) and not NAME.fullmatch(name)
    ]
    return problems + [
        Problem(f"students.{name}", "reserved-name", "this name is reserved")
        for name in sorted(RESERVED & set(s.names["students"]))
    ]


def _check_training(s: Sections) -> list[Problem]:
    """Errors in what students, teachers and feature networks share."""
    problems = []
    if s.training and len(set(s.training.seeds)) < len(s.training.seeds):
        problems.append(Problem("training.seeds", "duplicate", "duplicate seed"))
    if s.training and s.training.compile and not any(map(shutil.which, COMPILERS)):
        message = f"needs a C++ compiler ({' or '.join(COMPILERS)})"
        problems.append(Problem("training.compile", "missing-compiler", message))
    for key, items in (("teachers", s.teachers), ("features", s.features)):
        for name, item in items.items():
            images, batch = getattr(item, "images", 0), getattr(item, "batch", 1)
            if images % batch:
                message = f"not a multiple of its batch {batch}"
                problems.append(Problem(f"{key}.{name}.images", "batch", message))
    return problems


def _check(s: Sections, files: bool) -> list[Problem]:
    """Errors that no section shows by itself. `files`: whether the files must exist."""
    names, problems = s.names, _check_names(s) + _check_training(s)
    if s.data is not None:
        problems += data_checks.check(s.data, files)
    problems += evaluation_checks.check(
        s.evaluation, s.claims, s.data, s.features, names["features"], files
    )
    for name, settings in s.features.items():
        problems += new_extractor(name, settings).check(s.data, files)
    problems += teacher_checks.check(s.teachers, s.data, s.features, names["features"], files)
    problems += reporting_checks.check_claims(s.claims, names["students"])
    if s.paper is not None:
        problems += reporting_checks.check_paper(s.paper, names["teachers"], names["students"])
    # Students are checked without their budgets if `training` is invalid.
    training = s.training or TrainingSection.model_construct(seeds=[], budget=[])
    return problems + student_checks.check(
        s.students, training, s.data, s.teachers, s.features, names, translate
    )


# -- resolving ----------------------------------------------------------------------------------


def _plugin_hashes(s: Sections) -> dict[str, dict[str, str]]:
    """Hashes of the plug-in files that define the data set, feature networks and teachers."""
    hashes = {"data": DATASETS.plugin_sha256(s.data.name)}
    for name, settings in s.features.items():
        hashes[f"features.{name}"] = FEATURES.plugin_sha256(settings.type)
    for name, teacher in s.teachers.items():
        kind = (teacher.network or {}).get("type", "")
        hashes[f"teachers.{name}"] = BACKBONES.plugin_sha256(kind)
    return {key: {"plugin": sha256} for key, sha256 in hashes.items() if sha256}


def _resolve(s: Sections, results: Path) -> Experiment:
    file = ExperimentFile.model_validate(s.raw)
    students = {
        name: student_checks.resolve(name, section, s.training, s.teachers)
        for name, section in s.students.items()
    }
    return Experiment(
        **vars(s) | {"students": students},
        name=file.name,
        device_setting=file.device,
        process_setting=file.processes,
        paths=Paths(results / file.name),
        plugin_hashes=_plugin_hashes(s),
    )


def _load_plugins(raw: dict) -> None:
    plugins = raw.get("plugins")
    for path in plugins if isinstance(plugins, list) else ():
        load_plugin(Path(str(path)))


def parse_experiment(
    raw: dict, source: str, results: Path = Path("results"), files: bool = True
) -> Experiment:
    """Validate a resolved configuration; a `ConfigError` reports all its errors. `files`: whether
    the files that it names must exist."""
    _load_plugins(raw)
    sections, problems = _parse(raw)
    problems += _check(sections, files)
    if problems:
        raise ConfigError(source, problems)
    return _resolve(sections, results)


def load_experiment(
    paths: Path | list[Path],
    overrides: dict | None = None,
    results: Path = Path("results"),
    files: bool = True,
) -> Experiment:
    """The experiment in a file (or in several, later ones override earlier ones). `overrides`
    override all of them."""
    paths = [Path(p) for p in (paths if isinstance(paths, list) else [paths])]
    raw: dict = {}
    for path in paths:
        raw = merge(raw, read_experiment(path))
    raw = merge(raw, overrides or {})
    return parse_experiment(raw, " + ".join(map(str, paths)), results, files)


def load_snapshot(path: Path, results: Path = Path("results")) -> Experiment:
    """The experiment in a snapshot of a validated configuration; only the schema is checked."""
    raw = read_yaml(path)
    _load_plugins(raw)
    sections, problems = _parse(raw)
    if problems:
        raise ConfigError(str(path), problems)
    return _resolve(sections, results)
