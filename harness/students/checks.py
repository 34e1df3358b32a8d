"""Checks of the section `students`, and the resolution of its entries."""

from collections.abc import Iterator
from contextlib import nullcontext, suppress
from typing import Any

from pydantic import ValidationError

from harness.config import schema
from harness.config.jobs import PairSet, Student
from harness.config.loading import translate
from harness.config.schema import (
    ExperimentFile,
    Names,
    ReleasedStudent,
    StudentSection,
    TrainingSection,
)
from harness.discriminators.class_table import FILE_SHA256
from harness.errors import Problem, UserError, did_you_mean
from harness.features.base import FEATURES
from harness.io.downloads import source_problems
from harness.io.packages import package_problems
from harness.method import METHODS, MethodConfig
from harness.students import released
from harness.students.defaults import unserved
from harness.teachers.facts import teacher_facts, unfrozen


def method_settings(section: StudentSection, shared: dict[str, Any]) -> MethodConfig:
    """The method's settings: shared ones that it has, overridden by the student's own."""
    config_class = METHODS[section.method].Config
    common = {k: v for k, v in shared.items() if k in config_class.model_fields}
    return config_class(**common | section.settings)


def resolve(name: str, section: StudentSection | ReleasedStudent, file: ExperimentFile) -> Student:
    """A student with its validated settings. Raises `ValidationError` or `UserError`."""
    if isinstance(section, ReleasedStudent):
        return released.resolve(name, section)
    settings = method_settings(section, file.training.settings)
    requirements = METHODS[section.method].requirements(settings)
    teacher, pairs = section.teacher or next(iter(file.teachers)), None
    if count := requirements.pairs:
        # The sampler is deterministic: an image is a function of the noise that the student sees.
        steps = requirements.pair_steps
        update = {"steps": steps, "s_churn": 0.0, "s_min": 0.0, "s_max": None, "s_noise": 1.0}
        sampler = file.teachers[teacher].sampler.model_copy(update=update)
        pairs = PairSet(f"{teacher}_n{count}_steps{steps}", teacher, count, sampler)
    return Student(
        name=name,
        method=section.method,
        settings=settings,
        requirements=requirements,
        teacher=teacher,
        freeze=section.freeze,
        lora=section.lora,
        budget=tuple(section.budget or file.training.budget),
        snapshots=file.training.snapshots if section.snapshots is None else section.snapshots,
        pairs=pairs,
        switches=switches_of(section),
        adapted=section.adapted,
    )


def switches_of(section: StudentSection) -> dict[str, Any]:
    """A student's own switches, which replace those of the section `training`."""
    own = {name: getattr(section, name) for name in ("precision", "micro_batch")}
    return {name: value for name, value in own.items() if value is not None}


def check(file: ExperimentFile, names: Names, files: bool) -> Iterator[Problem]:
    """All errors in the section `students` (see `harness.validation.CHECKS`)."""
    # Students are checked without their budgets if `training` is invalid.
    training = file.training or TrainingSection.model_construct(seeds=[], budget=[])
    yield from _check_shared_settings(file, training)
    if not names["teachers"] and not all(
        isinstance(s, ReleasedStudent) for s in file.students.values()
    ):
        message = "missing; only an experiment whose students are all released needs no teacher"
        yield Problem("teachers", "missing-key", message)
    for name, section in file.students.items():
        where = f"students.{name}"
        if isinstance(section, ReleasedStudent):
            yield from released.check(name, section, file.data, files)
            continue
        if name.endswith(released.SUFFIX):
            message = f"names with {released.SUFFIX} are for released weights (with a source)"
            yield Problem(where, "reserved-name", message)
        if section.lora is not None and section.freeze != "none":
            yield Problem(f"{where}.lora", "conflict", "lora and freeze are mutually exclusive")
        if section.lora is not None and files:
            yield from package_problems(f"{where}.lora", "peft")
        if section.teacher is not None and section.teacher not in names["teachers"]:
            message = f"unknown teacher {section.teacher!r}"
            hint = did_you_mean(section.teacher, names["teachers"])
            yield Problem(f"{where}.teacher", "unknown-name", message + hint)
        try:
            settings = method_settings(section, training.settings)
        except UserError as error:
            yield Problem(f"{where}.method", error.code, str(error))
        except ValidationError as error:
            for problem in translate(error, METHODS[section.method].Config):
                own = not problem.key or problem.key.split(".")[0] in section.settings
                # A shared setting is reported once, where it is written.
                place = f"{where}.settings" if own else "training.settings"
                yield Problem(f"{place}.{problem.key}".rstrip("."), problem.code, problem.message)
        else:
            yield from _check_method(where, section, settings, file, names, files)
            yield from _check_batch(where, section, settings, training)


def _check_method(
    where: str,
    section: StudentSection,
    settings: MethodConfig,
    file: ExperimentFile,
    names: Names,
    files: bool,
) -> Iterator[Problem]:
    """Errors in what a method needs: a feature network, data and a teacher."""
    method, data = METHODS[section.method], file.data
    needs = method.requirements(settings)
    if (network := needs.features) is not None and network not in names["features"]:
        message = f"unknown feature network {network!r}{did_you_mean(network, names['features'])}"
        yield Problem(f"{where}.settings", "unknown-name", message)
    elif network in (own := file.features) and not FEATURES[own[network].type].has_feature_maps:
        message = f"feature network {network!r} has no feature maps"
        yield Problem(f"{where}.settings", "unsupported", message)
    if needs.class_table:
        key = f"{where}.settings.class_table"
        # An address must have the authors' file, so it needs no sha256.
        yield from source_problems(key, needs.class_table, FILE_SHA256, required=files)
    if needs.real_images and data is not None:
        if not data.has_images:
            message = f"method {section.method} needs images; this data set has none"
            yield Problem(where, "needs-images", message)
        elif data.prompts is not None and not data.labels:
            message = "needs the prompt of each image; data.labels is false"
            yield Problem(where, "needs-images", f"method {section.method} {message}")
    teacher = file.teachers.get(section.teacher or next(iter(names["teachers"]), None))
    facts = teacher_facts(teacher, data)
    for setting, code, message in method.check(settings, facts):
        yield Problem(f"{where}.settings.{setting}", code, message)
    for setting, reason in unserved(type(settings), facts):
        if getattr(settings, setting):
            own = setting in section.settings
            place = f"{where}.settings" if own else "training.settings"
            remedy = "remove this setting, or set it to 0"
            message = f"the teacher cannot serve it: {reason}; {remedy}"
            yield Problem(f"{place}.{setting}", "unsupported", message)
    if section.freeze != "none" and (reason := unfrozen(teacher, data, section.freeze)):
        yield Problem(f"{where}.freeze", "unsupported", reason)


def _check_batch(
    where: str, section: StudentSection, settings: MethodConfig, training: TrainingSection
) -> Iterator[Problem]:
    """A batch must have micro-batches, and divide the images of a budget."""
    batch, largest = settings.batch, section.micro_batch or training.micro_batch
    limiting = where if section.micro_batch else "training"
    ghost = METHODS[section.method].requirements(settings).ghost_batch
    if batch % ghost:
        message = f"batch {batch} is not a multiple of ghost_batch {ghost}"
        yield Problem(f"{where}.settings", "batch", message)
    elif largest is not None and largest < ghost:
        message = f"must be at least ghost_batch, {ghost}, for {where}, not {largest}"
        yield Problem(f"{limiting}.micro_batch", "batch", message)
    elif 1 == schema.micro_batch(batch, largest) < min(batch, largest or 1):
        message = f"batch {batch} has no divisor above 1 up to {limiting}.micro_batch {largest}"
        yield Problem(where, "batch", message)
    budget = f"{where}.budget" if section.budget else "training.budget"
    for i, limit in enumerate(section.budget or training.budget):
        if limit.unit == "images" and limit.amount % batch:
            low = int(limit.amount // batch) * batch
            multiples = f"the nearest multiples are {low} and {low + batch}"
            message = f"{limit.amount:g} images is not a multiple of the batch {batch} of {where}"
            yield Problem(f"{budget}.{i}.amount", "batch", f"{message}; {multiples}")


def _check_shared_settings(file: ExperimentFile, training: TrainingSection) -> Iterator[Problem]:
    """A shared setting must exist in some method, of this experiment or another."""
    used = {section.method for section in file.students.values()}
    known: set[str] = set()
    for name in sorted(METHODS, key=lambda name: name not in used):
        # Do not import other methods without need: a file may be unfinished.
        if name in used or not known >= training.settings.keys():
            with nullcontext() if name in used else suppress(Exception):
                known |= METHODS[name].Config.model_fields.keys()
    for key in training.settings:
        if key not in known:
            message = f"no method has this setting{did_you_mean(key, known)}"
            yield Problem(f"training.settings.{key}", "unknown-key", message)
