"""Fingerprints of scores: what decides them, as JSON-like values; and whether scores have them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.config.jobs import Scoring, StudentRun, TeacherJob
from harness.config.schema import Sampler
from harness.evaluation.registry import METRICS, defined_for
from harness.features.base import provides
from harness.io.artifacts import digest
from harness.io.records import ScoreRecord, StudentRecord, TeacherRecord


def fingerprint(scoring: Scoring) -> dict[str, Any]:
    """What decides the scores of a run. It lists the selected metrics that are defined for at least
    one extractor, so that a new metric makes scores outdated."""
    provided = (provides(settings) for settings, _ in scoring.extractors.values())
    metrics = defined_for(provided, scoring.evaluation.metrics)
    plugins = {metric.name: METRICS.plugin_sha256(metric.name) for metric in metrics}
    return scoring.fingerprint | {"metrics": plugins}


def reference_fingerprint(scoring: Scoring, sampler: Sampler) -> dict[str, Any]:
    """The same for a teacher with this sampler and the floor."""
    return fingerprint(scoring) | {"sampler": sampler.model_dump()}


def number_fingerprint(scoring: Scoring, protocol: Mapping[str, Any]) -> str:
    """What decides a number of given samples: its protocol, without the list of sampling seeds,
    which decides only which numbers there are; the settings of its network; and plug-ins."""
    facts = {key: value for key, value in protocol.items() if key != "sampling_seeds"}
    network = scoring.fingerprint["features"].get(protocol["extractor"])
    return digest([facts, network, METRICS.plugin_sha256(protocol["metric"])])


def run_scores(scoring: Scoring, job: StudentRun, path: Path) -> ScoreRecord | None:
    """The scores of a run, if they are of its current weights and settings."""
    run = StudentRecord.read_optional(job.folder / "student.json")
    if run is None or run.fingerprint != digest([job.fingerprint, job.budget]):
        return None
    scores = ScoreRecord.read_optional(path)
    expected = digest(fingerprint(scoring)), run.sha256
    current = scores is not None and (scores.fingerprint, scores.weights) == expected
    return scores if current else None


def teacher_scores(scoring: Scoring, job: TeacherJob, path: Path) -> ScoreRecord | None:
    """The same of a teacher and the floor."""
    teacher = TeacherRecord.read_optional(job.folder / "teacher.json")
    if teacher is None or teacher.fingerprint != digest(job.fingerprint):
        return None
    scores = ScoreRecord.read_optional(path)
    expected = digest(reference_fingerprint(scoring, job.section.sampler)), teacher.sha256
    current = scores is not None and (scores.fingerprint, scores.weights) == expected
    return scores if current else None


def agreement_fingerprint(scoring: Scoring) -> dict[str, Any]:
    """What decides the comparison with other libraries, besides the samples."""
    neighbours = scoring.evaluation.neighbours
    return {"neighbours": neighbours, "features": scoring.fingerprint["features"]}
