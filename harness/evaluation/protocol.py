"""What identifies a number: the protocol of a metric, and the fingerprint of a score file."""

from __future__ import annotations

from typing import Any

from harness import __version__
from harness.config.jobs import ReferenceScoring, Scoring
from harness.data.datasets import Dataset
from harness.evaluation.references import PublishedStatistics
from harness.evaluation.registry import METRICS, Metric, metric_names
from harness.features.base import FeatureExtractor

QUANTISATION = "uint8: x * 127.5 + 128, clipped"


def fingerprint(scoring: Scoring) -> dict[str, Any]:
    """What decides the scores of a run, as a JSON-like value; a new metric changes it."""
    names = metric_names(settings for settings, _ in scoring.extractors.values())
    metrics = {name: METRICS.plugin_sha256(name) for name in names}
    return scoring.fingerprint | {"metrics": metrics}


def reference_fingerprint(job: ReferenceScoring) -> dict[str, Any]:
    """The same for a teacher and the floor."""
    return fingerprint(job.scoring) | {"sampler": job.section.sampler.model_dump()}


def agreement_fingerprint(scoring: Scoring) -> dict[str, Any]:
    """What decides the comparison with other libraries, besides the samples."""
    neighbours = scoring.evaluation.neighbours
    return {"neighbours": neighbours, "features": scoring.fingerprint["features"]}


def protocol(
    metric: Metric,
    extractor: FeatureExtractor,
    num_samples: int,
    dataset: Dataset,
    scoring: Scoring,
    published: PublishedStatistics | None,
) -> dict[str, Any]:
    """The record that identifies a number. Its digest is the key in the score file and the tables;
    numbers of two protocols never share a column."""
    from importlib.metadata import version

    library, settings = f"harness {__version__}", dict(metric.settings)
    if "inception" in extractor.provided:
        library += f", torch-fidelity {version('torch-fidelity')}"
    if metric.name in ("precision", "recall"):
        settings["k"] = scoring.evaluation.neighbours
    prompts = dataset.evaluation_prompts
    return {
        "metric": metric.name,
        "settings": settings,
        "extractor": extractor.name,
        "extractor_sha256": extractor.hashes,
        "num_samples": num_samples,
        "subsets": "mean over all disjoint subsets of this size",
        **_reference(metric, extractor, dataset, published),
        **({"prompts_sha256": prompts.sha256} if prompts else {}),
        "quantisation": QUANTISATION,
        "resize": extractor.resize,
        **extractor.details,
        "sampling": "image i from (sampling seed, i), balanced labels",
        "sampling_seeds": scoring.evaluation.sampling_seeds,
        "library": library,
    }


def _reference(
    metric: Metric,
    extractor: FeatureExtractor,
    dataset: Dataset,
    published: PublishedStatistics | None,
) -> dict[str, str]:
    """What the metric compares with."""
    if (
        published is not None
        and extractor.name == published.extractor
        and "reference.statistics" in metric.needs
    ):
        return {"reference": f"{dataset.name}-statistics", "reference_sha256": published.sha256}
    count = len(dataset.train)
    record = {"reference": f"{dataset.name}-train{count}"}
    if metric.limit and count > metric.limit:
        record["reference_draw"] = f"a fixed draw of {metric.limit} images"
    return record | {"reference_sha256": dataset.images_sha256}
