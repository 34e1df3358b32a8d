"""Frozen records, resolved from an experiment: what each stage reads."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.config import schema
from harness.method import MethodConfig, Requirements


@dataclass(frozen=True)
class PairSet:
    """Teacher pairs that one or more students need."""

    name: str
    teacher: str
    count: int
    sampler: schema.Sampler  # deterministic: images are a function of the student's noise


@dataclass(frozen=True)
class Student:
    """A student of an experiment with its method's settings, validated and complete. source,
    sha256: of released weights, which have no teacher, budget, snapshots and requirements."""

    name: str
    method: str
    settings: MethodConfig
    requirements: Requirements
    teacher: str | None
    freeze: str
    lora: schema.LoraSection | None
    budget: tuple[schema.Limit, ...]
    snapshots: schema.Snapshots
    pairs: PairSet | None
    switches: Mapping[str, Any] = field(default_factory=dict)  # instead of those of `training`
    adapted: Mapping[str, str] = field(default_factory=dict)  # defaults from the teacher -> why
    source: str | None = None
    sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a job makes in `folder`."""

    name: str
    folder: Path
    data: Path  # the folder of the prepared data set
    training: schema.TrainingSection
    device: str  # resolved: "cpu", "cuda", "cuda:1" or "meta"
    exclusive: bool  # measured jobs need the machine to themselves: a budget is in seconds
    fingerprint: dict  # everything that decides the results, as JSON-like values


@dataclass(frozen=True, kw_only=True)
class StudentRun(Job):
    """One student with one training seed, and the folders of its inputs."""

    experiment: str
    student: Student
    seed: int
    teacher: Path | None
    features: Path | None
    pairs: Path | None
    budget: list[dict]
    method_source: tuple[Path, ...]  # the files that define the method


@dataclass(frozen=True, kw_only=True)
class TeacherJob(Job):
    """A teacher to train or to import. `text_encoder`: folder of the CLIP that reads captions."""

    section: schema.TeacherSection
    data_section: schema.DataSection
    text_encoder: Path | None


@dataclass(frozen=True, kw_only=True)
class FeatureJob(Job):
    """A feature network to train or to fetch. `settings`: an instance of its class's settings."""

    settings: Any


@dataclass(frozen=True, kw_only=True)
class PairJob(Job):
    """A set of teacher pairs to generate, `block` images at a time."""

    pairs: PairSet
    teacher: Path
    block: int
    tf32: bool
    precision: str


@dataclass(frozen=True)
class Scoring:
    """How an experiment scores any set of images."""

    experiment: str
    evaluation: schema.EvaluationSection
    data: Path
    data_section: schema.DataSection
    extractors: Mapping[str, tuple[Any, Path]]  # settings and folder of each feature network
    checkpoint_seconds: float  # between two writes of an unfinished job
    device: str
    fingerprint: dict  # without the metrics, which `harness.evaluation` adds
