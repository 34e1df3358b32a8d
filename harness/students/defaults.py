"""Defaults that follow from the teacher: of settings that it cannot serve, and of its sampler.

They are filled in when an experiment is loaded, before it is checked, so that snapshots of the
configuration contain them.
"""

from collections.abc import Iterator
from typing import Any

from harness.config import schema
from harness.config.loading import merge
from harness.config.schema import ExperimentFile, ImportedTeacher, StudentSection
from harness.errors import UserError
from harness.method import METHODS, MethodConfig, TeacherFacts
from harness.teachers.facts import teacher_facts
from harness.teachers.sources import network_of

REASONS = {
    "augment_labels": "{network} has no augmentation labels",
    "dropout": "{network} has no layers with dropout",
    "null_condition": "{network} has no label for an unconditional score",
}


def teacher_of(section: StudentSection, file: ExperimentFile) -> schema.TeacherSection | None:
    """A student's teacher, if it is valid."""
    return file.teachers.get(section.teacher or next(iter(file.teachers), None))


def unserved(config: type[MethodConfig], facts: TeacherFacts) -> Iterator[tuple[str, str]]:
    """Settings of a method that the teacher cannot serve: (name, reason)."""
    for name, fact in config.needs.items():
        if name in config.model_fields and not getattr(facts, fact):
            yield name, REASONS[fact].format(network=facts.network)


def adapted(section: StudentSection, shared: dict, facts: TeacherFacts) -> dict[str, tuple]:
    """Settings whose default the teacher replaces: name -> (value, reason)."""
    config = METHODS[section.method].Config
    found = {name: (0.0, reason) for name, reason in unserved(config, facts)}
    if facts.own_dropout is not None:
        reason = "the dropout of the teacher's network"
        for name, fact in config.needs.items():
            if fact == "dropout" and name in config.model_fields:
                found.setdefault(name, (facts.own_dropout, reason))
    fields = config.model_fields
    return {
        name: (value, reason)
        for name, (value, reason) in found.items()
        if name not in section.settings and name not in shared and fields[name].default != value
    }


def fill_in(file: ExperimentFile, raw: dict[str, Any]) -> tuple[ExperimentFile, dict[str, Any]]:
    """An experiment, and its configuration, with the defaults that follow from its teachers."""
    teachers, students = dict(file.teachers), dict(file.students)
    changes: dict[str, dict[str, Any]] = {"teachers": {}, "students": {}}
    for name, teacher in file.teachers.items():
        if isinstance(teacher, ImportedTeacher) and (sampler := _sampler(teacher)):
            update = {"sampler": teacher.sampler.model_copy(update=sampler)}
            teachers[name] = teacher.model_copy(update=update)
            changes["teachers"][name] = {"sampler": sampler}
    shared = file.training.settings if file.training else {}
    for name, section in file.students.items():
        if not isinstance(section, StudentSection):
            continue
        try:
            facts = teacher_facts(teacher_of(section, file), file.data)
            found = adapted(section, shared, facts)
        except UserError:  # an unknown method, which is reported by the checks
            continue
        if found:
            settings = {key: value for key, (value, _) in found.items()}
            reasons = {key: reason for key, (_, reason) in found.items()}
            update = {"settings": section.settings | settings, "adapted": reasons}
            students[name] = section.model_copy(update=update)
            changes["students"][name] = {"settings": settings, "adapted": reasons}
    if not any(changes.values()):
        return file, raw
    filled = file.model_copy(update={"teachers": teachers, "students": students})
    return filled, merge(raw, changes)


def _sampler(teacher: ImportedTeacher) -> dict[str, float]:
    """The noise levels of a teacher's sampler that its section does not set, from its schedule."""
    network = network_of(teacher)
    if network is None or network.levels is None:
        return {}
    levels = dict(zip(("sigma_min", "sigma_max"), network.levels, strict=True))
    given = teacher.sampler.model_fields_set
    return {key: level for key, level in levels.items() if key not in given}
