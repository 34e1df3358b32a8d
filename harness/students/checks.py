"""Checks of the section `students`, and the resolution of its entries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from harness.config.experiment import resolve_pairs
from harness.config.jobs import Student
from harness.config.schema import (
    DataSection,
    Limit,
    StudentSection,
    TrainedTeacher,
    TrainingSection,
    micro_batch,
)
from harness.errors import Problem, UserError, did_you_mean
from harness.features.base import FEATURES
from harness.method import METHODS, MethodConfig, TeacherFacts

# Turns a pydantic error of a class into problems.
Translate = Callable[[ValidationError, type], list[Problem]]


def method_settings(section: StudentSection, shared: dict[str, Any]) -> MethodConfig:
    """The method's settings: shared ones that it has, overridden by the student's own."""
    config_class = METHODS[section.method].Config
    common = {k: v for k, v in shared.items() if k in config_class.model_fields}
    return config_class(**common | section.settings)


def resolve(
    name: str, section: StudentSection, training: TrainingSection, teachers: Mapping[str, Any]
) -> Student:
    """A student with its validated settings. Raises `ValidationError` or `UserError`."""
    settings = method_settings(section, training.settings)
    requirements = METHODS[section.method].requirements(settings)
    teacher = section.teacher or next(iter(teachers))
    pairs = None
    if requirements.pairs:
        count, steps = requirements.pairs, requirements.pair_steps
        pairs = resolve_pairs(teacher, teachers[teacher], count, steps)
    return Student(
        name=name,
        method=section.method,
        settings=settings,
        requirements=requirements,
        teacher=teacher,
        freeze=section.freeze,
        lora=section.lora,
        budget=tuple(section.budget or training.budget),
        pairs=pairs,
    )


def check(
    students: Mapping[str, StudentSection],
    training: TrainingSection,
    data: DataSection | None,
    teachers: Mapping[str, Any],
    features: Mapping[str, Any],
    names: Mapping[str, Iterable[str]],
    translate: Translate,
) -> list[Problem]:
    """`teachers`, `features`: the valid ones; `names`: section -> all names, valid or not."""
    problems = _check_shared_settings(students, training)
    for name, section in students.items():
        where = f"students.{name}"
        if section.lora is not None and section.freeze != "none":
            problems.append(
                Problem(f"{where}.lora", "conflict", "lora and freeze are mutually exclusive")
            )
        if section.teacher is not None and section.teacher not in names["teachers"]:
            hint = did_you_mean(section.teacher, names["teachers"])
            message = f"unknown teacher {section.teacher!r}{hint}"
            problems.append(Problem(f"{where}.teacher", "unknown-name", message))
        try:
            method = METHODS[section.method]
            settings = method_settings(section, training.settings)
        except UserError as error:
            problems.append(Problem(f"{where}.method", error.code, str(error)))
            continue
        except ValidationError as error:
            for problem in translate(error, method.Config):
                own = problem.key.split(".")[0] in section.settings
                # A shared setting is reported once, where it is written.
                place = f"{where}.settings" if own else "training.settings"
                key = f"{place}.{problem.key}"
                problems.append(Problem(key, problem.code, problem.message))
            continue
        needs = method.requirements(settings)
        if needs.features is not None and needs.features not in names["features"]:
            hint = did_you_mean(needs.features, names["features"])
            message = f"unknown feature network {needs.features!r}{hint}"
            problems.append(Problem(f"{where}.settings", "unknown-name", message))
        elif needs.features in features and not _has_maps(features[needs.features]):
            message = f"feature network {needs.features!r} has no feature maps"
            problems.append(Problem(f"{where}.settings", "unsupported", message))
        if needs.real_images and data is not None:
            message = None
            if not data.has_images:
                message = f"method {section.method} needs images; this data set has none"
            elif data.prompts is not None and not data.labels:
                message = (
                    f"method {section.method} needs the prompt of each image; data.labels is false"
                )
            problems += [Problem(where, "needs-images", message)] if message else []
        teacher = teachers.get(section.teacher or next(iter(names["teachers"]), None))
        trained = isinstance(teacher, TrainedTeacher)
        facts = TeacherFacts(unconditional=not trained or teacher.label_dropout > 0)
        problems += [
            Problem(f"{where}.settings.{setting}", code, message)
            for setting, code, message in method.check(settings, facts)
        ]
        problems += _check_batch(where, settings.batch, section.budget, training)
    return problems


def _has_maps(settings: Any) -> bool:
    """Whether a feature network has feature maps for a discriminator."""
    return FEATURES[settings.type].has_feature_maps


def _check_batch(
    where: str, batch: int, own: list[Limit] | None, training: TrainingSection
) -> list[Problem]:
    problems, place = [], f"{where}.budget" if own else "training.budget"
    if 1 == micro_batch(batch, training.micro_batch) < min(batch, training.micro_batch or 1):
        message = (
            f"batch {batch} has no divisor above 1 up to training.micro_batch "
            f"{training.micro_batch}"
        )
        problems.append(Problem(where, "batch", message))
    for i, limit in enumerate(own or training.budget):
        if limit.unit == "images" and limit.amount % batch:
            low = int(limit.amount // batch) * batch
            message = (
                f"{limit.amount:g} images is not a multiple of the batch {batch} of {where}; the "
                f"nearest multiples are {low} and {low + batch}"
            )
            problems.append(Problem(f"{place}.{i}.amount", "batch", message))
    return problems


def _check_shared_settings(
    students: Mapping[str, StudentSection], training: TrainingSection
) -> list[Problem]:
    """A shared setting must exist in some method, of this experiment or another."""
    used = {section.method for section in students.values()}
    known: set[str] = set()
    for name in sorted(METHODS, key=lambda name: name not in used):
        if name not in used and known >= set(training.settings):
            break  # do not import methods without need: an unused file may be unfinished
        try:
            known |= set(METHODS[name].Config.model_fields)
        except Exception:
            if name in used:
                raise
    return [
        Problem(
            f"training.settings.{key}",
            "unknown-key",
            f"no method has this setting{did_you_mean(key, known)}",
        )
        for key in training.settings
        if key not in known
    ]
