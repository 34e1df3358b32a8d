"""Load an experiment: parse the files, run every package's checks, report all errors together."""

from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from harness.config import schema
from harness.config.experiment import Experiment, Paths
from harness.config.loading import (
    merge,
    read_experiment,
    read_yaml,
    translate,
    value_problems,
)
from harness.config.schema import NAME, ExperimentFile, Names
from harness.data import checks as data_checks
from harness.data.layouts.base import plugin_layouts
from harness.data.registry import DATASETS
from harness.errors import ConfigError, Problem, UserError
from harness.evaluation import checks as evaluation_checks
from harness.features.base import FEATURES, errors_in, new_extractor, settings_class
from harness.io.packages import package_problems
from harness.networks.registry import BACKBONES
from harness.registry import load_plugin
from harness.reporting import checks as reporting_checks
from harness.students import checks as student_checks
from harness.students.defaults import fill_in
from harness.teachers import checks as teacher_checks
from harness.teachers.sources import network_of

RESERVED = {"teacher", "teacher-1step", "floor", "teachers"}  # rows of the tables, and a folder


# -- parsing ------------------------------------------------------------------------------------


def _teacher_class(raw: Any) -> type[schema.TeacherSection]:
    imported = isinstance(raw, dict) and "source" in raw
    return schema.ImportedTeacher if imported else schema.TrainedTeacher


def _student_class(raw: Any) -> type[schema.Section]:
    released = isinstance(raw, dict) and "source" in raw
    return schema.ReleasedStudent if released else schema.StudentSection


SECTIONS = {
    "data": schema.DataSection,
    "training": schema.TrainingSection,
    "evaluation": schema.EvaluationSection,
    "paper": schema.PaperSection,
}
# Of sections with named items: the class of an item, given its content.
ITEMS: dict[str, Callable[[Any], type[schema.Section]]] = {
    "features": settings_class,
    "teachers": _teacher_class,
    "students": _student_class,
}


def _items(raw: dict, key: str) -> dict[str, Any]:
    """The named items of a section, valid or not."""
    return raw[key] if isinstance(raw.get(key), dict) else {}


def _parse(raw: dict) -> tuple[ExperimentFile, list[Problem]]:
    """Parse section by section and item by item, so that one error hides no other. Invalid sections
    are None; invalid items are missing."""
    parsed: dict[str, Any] = dict.fromkeys(SECTIONS) | {key: {} for key in ITEMS}
    values = [(parsed, key, key, raw[key]) for key in SECTIONS if isinstance(raw.get(key), dict)]
    for key in ITEMS:
        values += [(parsed[key], name, f"{key}.{name}", x) for name, x in _items(raw, key).items()]
    problems = []
    for target, name, key, value in values:
        try:
            section_class = SECTIONS.get(key) or ITEMS[key.split(".")[0]](value)
            target[name] = section_class.model_validate(value)
        except ValidationError as error:
            problems += translate(error, section_class, key)
        except UserError as error:
            problems.append(Problem(f"{key}.type", error.code, str(error)))
    rest: dict[str, Any] = {"name": raw.get("name"), "claims": []}
    try:
        rest = dict(ExperimentFile.model_validate(raw))
    except ValidationError as error:
        found = zip(error.errors(), translate(error, ExperimentFile), strict=True)
        # Errors inside the sections above are reported already.
        problems += (p for x, p in found if len(x["loc"]) == 1 or x["loc"][0] not in parsed)
    return ExperimentFile.model_construct(**rest | parsed), problems


# -- checking -----------------------------------------------------------------------------------


def _check_names(file: ExperimentFile, names: Names, files: bool) -> Iterator[Problem]:
    keys = [("name", file.name), ("data.name", file.data and file.data.name)]
    keys += [(f"{key}.{name}", name) for key, items in names.items() for name in items]
    message = "use lower-case letters, digits, '.', '_' and '-' in names, not"
    for key, name in keys:
        if isinstance(name, str) and not NAME.fullmatch(name):
            yield Problem(key, "invalid-name", f"{message} {name!r}")
        if key == f"students.{name}" and name in RESERVED:
            yield Problem(key, "reserved-name", "this name is reserved")


def _check_training(file: ExperimentFile, names: Names, files: bool) -> Iterator[Problem]:
    """Errors in what students, teachers and feature networks share."""
    loggers = file.training.loggers if file.training and files else ()
    for name in set(loggers) - {"csv"}:
        yield from package_problems("training.loggers", name)
    if file.training and len(set(file.training.seeds)) < len(file.training.seeds):
        yield Problem("training.seeds", "duplicate", "duplicate seed")
    for key, items in (("teachers", file.teachers), ("features", file.features)):
        for name, item in items.items():
            images, batch = getattr(item, "images", 0), getattr(item, "batch", 1)
            if images % batch:
                near = sorted({max(batch, images - images % batch), images + -images % batch})
                numbers = " or ".join(map(str, near))
                message = f"must be a multiple of the batch, {batch}, such as {numbers}"
                yield Problem(f"{key}.{name}.images", "batch", message)


def _check_features(file: ExperimentFile, names: Names, files: bool) -> Iterator[Problem]:
    for name, settings in file.features.items():
        extractor = new_extractor(name, settings)
        with errors_in(extractor):
            problems = list(extractor.check(file.data, files))
        yield from problems


# Errors that no section shows by itself. Each check takes the valid parts of the file, all names
# (so that a reference to an invalid item is not reported as unknown), and whether local files
# must exist.
CHECKS: tuple[Callable[[ExperimentFile, Names, bool], Iterable[Problem]], ...] = (
    _check_names,
    _check_training,
    data_checks.check,
    evaluation_checks.check,
    _check_features,
    teacher_checks.check,
    reporting_checks.check,
    student_checks.check,
)


# -- resolving ----------------------------------------------------------------------------------


def _plugin_hashes(file: ExperimentFile) -> dict[str, dict[str, str]]:
    """Hashes of the plug-in files that define the data set, feature networks and teachers."""
    layouts = plugin_layouts() if file.data.source is not None else ()
    hashes = {"data": DATASETS.plugin_sha256(file.data.name) or ",".join(layouts)}
    for name, settings in file.features.items():
        hashes[f"features.{name}"] = FEATURES.plugin_sha256(settings.type)
    for name, teacher in file.teachers.items():
        kind = (teacher.network or {}).get("type", "")
        if isinstance(teacher, schema.ImportedTeacher) and (network := network_of(teacher)):
            kind = network.type
        hashes[f"teachers.{name}"] = BACKBONES.plugin_sha256(kind)
    return {key: {"plugin": sha256} for key, sha256 in hashes.items() if sha256}


def parse_experiment(
    raw: dict, source: str, results: Path = Path("results"), files: bool = True, check: bool = True
) -> Experiment:
    """Validate a resolved configuration; a `ConfigError` reports all its errors. `files`: whether
    the files that it names must exist. `check`: whether to check more than the schema."""
    if problems := list(value_problems(raw)):
        raise ConfigError(source, problems)
    plugins = raw.get("plugins")
    for path in plugins if isinstance(plugins, list) else ():
        load_plugin(Path(str(path)))
    file, problems = _parse(raw)
    if check:
        problems += teacher_checks.fetch_configs(file) if files else ()
        file, raw = fill_in(file, raw)
    names = {key: list(_items(raw, key)) for key in ITEMS}
    for find in CHECKS if check else ():
        problems += find(file, names, files)
    if problems:
        raise ConfigError(source, problems)
    students = {
        name: student_checks.resolve(name, section, file) for name, section in file.students.items()
    }
    return Experiment(
        **{key: getattr(file, key) for key in ("name", *SECTIONS, *ITEMS, "claims")}
        | {"students": students},
        device_setting=file.device,
        process_setting=file.processes,
        raw=raw,
        paths=Paths(results / file.name),
        plugin_hashes=_plugin_hashes(file),
    )


def load_experiment(
    paths: Path | list[Path],
    overrides: dict | None = None,
    results: Path = Path("results"),
    files: bool = True,
) -> Experiment:
    """The experiment in a file or several; later files and `overrides` override earlier ones."""
    paths = [Path(p) for p in (paths if isinstance(paths, list) else [paths])]
    raw = reduce(merge, [*map(read_experiment, paths), overrides or {}], {})
    return parse_experiment(raw, " + ".join(map(str, paths)), results, files)


def load_snapshot(path: Path, results: Path = Path("results")) -> Experiment:
    """The experiment in a snapshot of a validated configuration; only the schema is checked."""
    return parse_experiment(read_yaml(path), str(path), results, check=False)
