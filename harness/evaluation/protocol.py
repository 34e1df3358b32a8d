"""The record that identifies a number (its protocol), and the fingerprint of a score file."""

from typing import Any

from harness import __version__
from harness.config.jobs import Scoring
from harness.config.schema import Sampler
from harness.data.datasets import Dataset
from harness.evaluation.references import PublishedStatistics
from harness.evaluation.registry import METRICS, Metric
from harness.features.base import FeatureExtractor, provides


def fingerprint(scoring: Scoring) -> dict[str, Any]:
    """What decides the scores of a run, as a JSON-like value. It lists the metrics that are defined
    for at least one extractor, so that a new metric makes scores outdated."""
    provided = [provides(settings) for settings, _ in scoring.extractors.values()]
    names = [name for name in sorted(METRICS) if any(map(METRICS[name].applies_to, provided))]
    return scoring.fingerprint | {"metrics": {name: METRICS.plugin_sha256(name) for name in names}}


def reference_fingerprint(scoring: Scoring, sampler: Sampler) -> dict[str, Any]:
    """The same for a teacher with this sampler and the floor."""
    return fingerprint(scoring) | {"sampler": sampler.model_dump()}


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
    numbers of two protocols never share a column. `published`: the extractor's statistics."""
    from importlib.metadata import version

    library, settings = f"harness {__version__}", dict(metric.settings)
    if "inception" in extractor.provided:
        library += f", torch-fidelity {version('torch-fidelity')}"
    if metric.name in ("precision", "recall"):
        settings["k"] = scoring.evaluation.neighbours
    count = len(dataset.train)
    reference, sha256, draw = f"train{count}", dataset.images_sha256, {}
    if published and "reference.statistics" in metric.needs:
        reference, sha256 = "statistics", published.sha256
    elif metric.limit and count > metric.limit:
        draw["reference_draw"] = f"a fixed draw of {metric.limit} images"
    prompts = dataset.evaluation_prompts
    return {
        "metric": metric.name,
        "settings": settings,
        "extractor": extractor.name,
        "extractor_sha256": extractor.hashes,
        "num_samples": num_samples,
        "subsets": "mean over all disjoint subsets of this size",
        "reference": f"{dataset.name}-{reference}",
        "reference_sha256": sha256,
        **draw,
        **({"prompts_sha256": prompts.sha256} if prompts else {}),
        "quantisation": "uint8: x * 127.5 + 128, clipped",
        "resize": extractor.resize,
        **extractor.details,
        "sampling": "image i from (sampling seed, i), balanced labels",
        "sampling_seeds": scoring.evaluation.sampling_seeds,
        "library": library,
    }
