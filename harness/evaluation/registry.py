"""The registry of metrics, functions of a `FeatureSet` that return an `Estimate`. A new metric is a
new file, in `harness/evaluation/metrics/` or a plug-in, with a function under `@register`."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from harness.evaluation.feature_set import Estimate, FeatureSet
from harness.registry import Registry

# Names and labels of the Fréchet distance. Each extractor provides one of the names: "FID" is
# reserved for Inception, with the name of the protocol.
FRECHET = {
    "fd": "Fréchet distance",
    "fid-edm": "FID, EDM's protocol",  # Karras et al. 2022
    "fid-clean": "FID, clean-fid",  # Parmar et al. 2022
    "fid-legacy-tensorflow": "FID, clean-fid's legacy_tensorflow",  # Inception's own resize
    "fid-coco": "FID, COCO at 256 px",  # Kang et al. 2023 (GigaGAN) and text-to-image papers
    "fid-patch": "Patch FID",  # Chai et al. 2022: the centre of large images, not resized
}


@dataclass(frozen=True, eq=False)
class Metric:
    """A registered metric.

    higher_is_better: None for a diagnostic, which is never used for ranking or claims.
    requires: what an extractor must provide for the metric to be defined there.
    needs: outputs or attributes of the `FeatureSet` that the images must have ("labels",
    "reference.features"); otherwise the metric is skipped.
    limit: the most samples that it uses. final_only: skip snapshots before the last.
    samples_per_dim: minimum number of samples per feature dimension.
    settings: the part of its definition that belongs to the protocol.
    """

    function: Callable[[FeatureSet], Estimate]  # or the tuple that makes an estimate
    name: str
    label: str
    higher_is_better: bool | None
    requires: tuple[str, ...] = ("features",)
    needs: tuple[str, ...] = ()
    limit: int | None = None
    final_only: bool = False
    samples_per_dim: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def arrow(self) -> str:
        """Suffix of column headings."""
        return {True: " ↑", False: " ↓", None: ""}[self.higher_is_better]

    def applies_to(self, provides: Collection[str]) -> bool:
        """Whether the metric is defined for an extractor that provides these outputs."""
        return set(self.requires) <= set(provides)

    def estimate(self, features: FeatureSet) -> Estimate:
        return Estimate(*self.function(features))

    def count(self, num_samples: int) -> int:
        """How many of `num_samples` samples it uses."""
        return num_samples if self.limit is None else min(num_samples, self.limit)


METRICS: Registry[Metric] = Registry("metric", "harness.evaluation.metrics")


def register(name: str, *arguments: Any, **options: Any) -> Callable:
    """Decorator that registers a function as a metric. The arguments are the fields of `Metric`, in
    order or by name; all others are its `settings`."""
    facts = {key: value for key, value in options.items() if key in Metric.__dataclass_fields__}
    settings = {key: value for key, value in options.items() if key not in facts}

    def decorate(function: Callable) -> Callable:
        metric = Metric(function, name, *arguments, **facts, settings=settings)
        METRICS.register(name, source=function)(metric)
        return function

    return decorate


def defined_for(extractors: Iterable[Collection[str]]) -> list[Metric]:
    """The metrics that are defined for at least one extractor, given what each provides."""
    sets, metrics = list(extractors), map(METRICS.__getitem__, METRICS)
    return [metric for metric in metrics if any(map(metric.applies_to, sets))]


def main_metric(chosen: str, provides: Collection[str]) -> Metric:
    """The metric that ranks students in an extractor's features: the experiment's choice, or the
    extractor's Fréchet distance where that is not defined."""
    return next(METRICS[name] for name in (chosen, *FRECHET) if METRICS[name].applies_to(provides))


def column_name(metric: str, num_samples: int, extractor: str) -> str:
    """The column of a metric in comparison tables, such as fd_n2000_digits-cnn."""
    return f"{metric}_n{num_samples}_{extractor}"
