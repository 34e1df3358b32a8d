"""One frozen record per job, resolved from an experiment: what each stage reads.

`fingerprint` is a JSON-like value of everything that decides the job's results; `device` is
resolved ("cpu", "cuda", "cuda:1" or "meta").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.config.schema import (
    DataSection,
    EvaluationSection,
    Limit,
    LoraSection,
    Sampler,
    TeacherSection,
    TrainingSection,
)

if TYPE_CHECKING:
    from harness.method import MethodConfig, Requirements


@dataclass(frozen=True)
class PairSet:
    """Teacher pairs that one or more students need."""

    name: str
    teacher: str
    count: int
    sampler: Sampler  # deterministic: images are a function of the student's noise


@dataclass(frozen=True)
class Student:
    """A student of an experiment with its method's settings, validated and complete."""

    name: str
    method: str
    settings: MethodConfig
    requirements: Requirements
    teacher: str
    freeze: str
    lora: LoraSection | None
    budget: tuple[Limit, ...]
    pairs: PairSet | None


@dataclass(frozen=True)
class StudentRun:
    """One student with one training seed, and the folders of its inputs. `exclusive`: a budget of
    the experiment is in seconds, so that the run needs the machine to itself."""

    experiment: str
    student: Student
    seed: int
    folder: Path
    data: Path
    teacher: Path
    features: Path | None
    pairs: Path | None
    training: TrainingSection
    device: str
    exclusive: bool
    fingerprint: dict
    method_source: tuple[Path, ...]  # the files that define the method

    @property
    def name(self) -> str:
        return f"{self.student.name}/seed{self.seed}"

    @property
    def budget(self) -> list[dict]:
        return [limit.model_dump() for limit in self.student.budget]


@dataclass(frozen=True)
class TeacherJob:
    """A teacher to train or to import. `text_encoder`: folder of the CLIP that reads captions."""

    name: str
    section: TeacherSection
    folder: Path
    data: Path
    data_section: DataSection
    text_encoder: Path | None
    training: TrainingSection  # of the experiment: checkpoint_seconds, max_nonfinite
    device: str
    fingerprint: dict


@dataclass(frozen=True)
class FeatureJob:
    """A feature network to train or to fetch. `settings`: an instance of its class's settings."""

    name: str
    settings: Any
    folder: Path
    data: Path
    training: TrainingSection
    device: str
    fingerprint: dict


@dataclass(frozen=True)
class PairJob:
    """A set of teacher pairs to generate, `block` images at a time."""

    pairs: PairSet
    folder: Path
    teacher: Path
    data: Path
    block: int
    device: str
    exclusive: bool
    fingerprint: dict


@dataclass(frozen=True)
class Scoring:
    """How an experiment scores any set of images.

    extractors: name -> (settings, folder) of each feature network, in order. fingerprint: without
    the metrics, which `harness.evaluation` adds.
    """

    experiment: str
    evaluation: EvaluationSection
    data: Path
    data_section: DataSection
    extractors: Mapping[str, tuple[Any, Path]]
    checkpoint_seconds: float  # between two writes of an unfinished job
    device: str
    fingerprint: dict


@dataclass(frozen=True)
class RunScoring:
    """All snapshots of one run to score. `run`: the student's folder; `output`: the score file."""

    scoring: Scoring
    student: str
    seed: int
    run: Path
    teacher: Path
    output: Path


@dataclass(frozen=True)
class ReferenceScoring:
    """A teacher (with its sampler and with one step) and the floor to score."""

    scoring: Scoring
    name: str
    section: TeacherSection
    teacher: Path
    output: Path
