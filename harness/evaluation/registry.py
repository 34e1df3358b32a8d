"""The registry of metrics.

A metric is a function of a `FeatureSet` that returns an `Estimate`. A new metric is a new file, in
`harness/evaluation/metrics/` or a plug-in, with a function under the decorator `register`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from harness.config.schema import FeatureSettings
from harness.evaluation.estimates import Estimate
from harness.evaluation.feature_set import FeatureSet
from harness.features.base import provides
from harness.registry import Registry

# Names of the Fréchet distance. Each extractor provides one of them: "FID" is reserved for
# Inception, with the name of the protocol.
FRECHET = ("fd", "fid-edm", "fid-clean", "fid-legacy-tensorflow", "fid-coco", "fid-patch")


@dataclass(frozen=True)
class Metric:
    """A registered metric.

    higher_is_better: None for a diagnostic without a preferred direction, which is never used for
    ranking or claims.
    requires: what an extractor must provide for the metric to be defined there.
    needs: outputs or attributes of the `FeatureSet` that the images must have ("labels",
    "reference.features"); otherwise the metric is skipped.
    limit: the most samples that it uses. final_only: skip snapshots before the last.
    samples_per_dim: the fewest samples per feature dimension.
    settings: the part of its definition that belongs to the protocol.
    """

    name: str
    label: str
    higher_is_better: bool | None
    function: Callable[[FeatureSet], Estimate]
    requires: tuple[str, ...]
    needs: tuple[str, ...]
    limit: int | None
    final_only: bool
    samples_per_dim: int
    settings: dict

    @property
    def arrow(self) -> str:
        """Suffix of column headings."""
        return {True: " ↑", False: " ↓", None: ""}[self.higher_is_better]

    @property
    def needs_attributes(self) -> bool:
        """Whether images must be checked for the attributes that their captions name."""
        return "attributes_correct" in self.needs

    @property
    def needs_reference(self) -> bool:
        return any(name.startswith("reference.") for name in self.needs)

    def applies_to(self, provides: Collection[str]) -> bool:
        """Whether the metric is defined for an extractor that provides these outputs."""
        return set(self.requires) <= set(provides)

    def estimate(self, features: FeatureSet) -> Estimate:
        return Estimate(*self.function(features))

    def count(self, num_samples: int) -> int:
        """How many of `num_samples` samples it uses."""
        return num_samples if self.limit is None else min(num_samples, self.limit)


METRICS: Registry[Metric] = Registry("metric", "harness.evaluation.metrics")


def register(
    name: str,
    label: str,
    higher_is_better: bool | None,
    requires: tuple[str, ...] = ("features",),
    needs: tuple[str, ...] = (),
    limit: int | None = None,
    final_only: bool = False,
    samples_per_dim: int = 0,
    **settings,
) -> Callable:
    """Register `function(FeatureSet) -> Estimate` (or the tuple that makes one) as a metric; the
    arguments are the fields of `Metric`. A duplicate name is a `ValueError`."""

    def decorate(function: Callable) -> Callable:
        facts = requires, needs, limit, final_only, samples_per_dim, settings
        metric = Metric(name, label, higher_is_better, function, *facts)
        METRICS.add(name, metric, Path(inspect.getsourcefile(function)).resolve())
        return function

    return decorate


def metric_names(extractors: Iterable[FeatureSettings]) -> list[str]:
    """Names of the metrics that are defined for at least one of these extractors, sorted: a new
    metric makes scores outdated."""
    provided = [provides(settings) for settings in extractors]
    return [name for name in METRICS.names() if any(map(METRICS[name].applies_to, provided))]


def main_metric(chosen: str, provides: Collection[str]) -> Metric:
    """The metric that ranks students in an extractor's features: the experiment's choice, or the
    extractor's Fréchet distance where that is not defined."""
    return next(METRICS[name] for name in (chosen, *FRECHET) if METRICS[name].applies_to(provides))
