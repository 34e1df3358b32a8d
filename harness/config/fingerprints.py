"""What the results of each stage depend on, as JSON-like values.

The workflow passes them to jobs as parameters, so that a change reruns what depends on it and
nothing else; a run's folder is named by the digest of its fingerprint. `plugin` is the sha256 of
the plug-in file that defines a class, or None for the repository's own classes.
"""

from __future__ import annotations

from harness import RESULTS_FORMAT, SCORES_FORMAT
from harness.config.jobs import PairSet, Student
from harness.config.schema import (
    PROMPT_KEYS,
    DataSection,
    EvaluationSection,
    FeatureSettings,
    TeacherSection,
    TrainingSection,
)


def _with_plugin(fingerprint: dict, plugin: str | None) -> dict:
    return fingerprint | ({"plugin": plugin} if plugin else {})


def data(section: DataSection, plugin: str | None = None) -> dict:
    """Where files lie is not included: their content counts, by the hashes of what is prepared.
    Prompts count by their embeddings, so that other evaluation prompts retrain nothing."""
    values = section.model_dump(exclude={"source", *PROMPT_KEYS})
    return _with_plugin({"format": RESULTS_FORMAT, **values}, plugin)


def preparation(section: DataSection, plugin: str | None = None) -> dict:
    """What the data stage depends on: the data and the prompt files."""
    return data(section, plugin) | {"prompts": section.prompt_files}


def features(settings: FeatureSettings, data: dict, plugin: str | None = None) -> dict:
    return _with_plugin({"data": data, "features": settings.model_dump()}, plugin)


def teacher(
    section: TeacherSection, data: dict, text_encoder: dict | None, plugin: str | None = None
) -> dict:
    """The sampler is not included: it decides a teacher's scores, not its weights."""
    values = section.model_dump(exclude={"sampler"})
    fingerprint = {"data": data, "teacher": values, "text_encoder": text_encoder}
    return _with_plugin(fingerprint, plugin)


def pairs(pair_set: PairSet, teacher: dict, block: int) -> dict:
    sampler = pair_set.sampler.model_dump()
    return {"teacher": teacher, "pairs": pair_set.count, "sampler": sampler, "block": block}


def run(
    student: Student,
    seed: int,
    training: TrainingSection,
    teacher: dict,
    pairs: dict | None,
    features: dict | None,
) -> dict:
    """Everything that decides a run's weights except its stopping rule. The method's file enters
    a run's key by its hash."""
    switches = ("micro_batch", "precision", "channels_last", "compile", "gradient_checkpointing")
    return {
        "student": student.name,
        "method": student.method,
        "settings": student.settings.model_dump(),
        "freeze": student.freeze,
        "lora": student.lora.model_dump() if student.lora else None,
        "seed": seed,
        "teacher": teacher,
        "pairs": pairs,
        "features": features,
        **training.model_dump(include={"snapshots", *switches}),
    }


def scoring(
    evaluation: EvaluationSection,
    section: DataSection,
    data: dict,
    extractors: dict[str, dict],
) -> dict:
    """How samples are scored; `harness.evaluation` adds the metrics."""
    last_prompts = list(section.prompt_files.values())[-1:]
    return {
        "format": SCORES_FORMAT,
        "data": data,
        "evaluation": evaluation.model_dump(),
        "features": extractors,
        "prompts": last_prompts,
    }
