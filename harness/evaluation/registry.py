"""The registry of metrics, functions of a `FeatureSet` that return an `Estimate`, or of a batch of
images that return a number per image. A new metric is a new file, in `harness/evaluation/metrics/`
or a plug-in, with a function under `@register` or `@register_per_image`."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from harness.evaluation.feature_set import Estimate, FeatureSet, mean_estimate
from harness.features.pixels import ImageBatch
from harness.registry import Registry, plugin_errors

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
    per_image: the function whose values are averaged, of a metric of single images.
    settings: the part of its definition that belongs to the protocol.
    """

    function: Callable[[FeatureSet], Estimate]  # or its value, or a tuple of its fields
    name: str
    label: str
    higher_is_better: bool | None
    requires: tuple[str, ...] = ("features",)
    needs: tuple[str, ...] = ()
    limit: int | None = None
    final_only: bool = False
    samples_per_dim: int = 0
    per_image: Callable[[ImageBatch], Tensor] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def arrow(self) -> str:
        """Suffix of column headings."""
        return {True: " ↑", False: " ↓", None: ""}[self.higher_is_better]

    def applies_to(self, provides: Collection[str]) -> bool:
        """Whether the metric is defined for an extractor that provides these outputs."""
        return set(self.requires) <= set(provides)

    @property
    def stores_pixels(self) -> bool:
        """Whether it needs the pixels of all samples at once."""
        return "pixels" in self.requires and self.per_image is None

    def estimate(self, features: FeatureSet) -> Estimate:
        """The estimate; an error in a plug-in is a `UserError` that names its file."""
        with plugin_errors(METRICS.plugin(self.name), f"metric {self.name!r}"):
            found = self.function(features)
            value, *rest = found if isinstance(found, tuple) else (found,)
            try:
                number = float(value)
            except (TypeError, ValueError, RuntimeError):
                message = f"returned {value!r}; expected a number or an Estimate"
                raise TypeError(message) from None
            return Estimate(number, *rest)

    def count(self, num_samples: int) -> int:
        """How many of `num_samples` samples it uses."""
        return num_samples if self.limit is None else min(num_samples, self.limit)


REFERENCE = ("features", "statistics", "held_out")  # of `Reference`, which metrics may need


def _lacks(name: str, metric: Metric) -> str | None:
    if metric.higher_is_better not in (True, False, None):
        return f"has higher_is_better {metric.higher_is_better!r}; use True, False or None"
    for key in ("requires", "needs"):
        if isinstance(getattr(metric, key), str):
            return f"has {key} {getattr(metric, key)!r}; use a tuple of names"
    for need in metric.needs:
        name = need.removeprefix("reference.")
        if need != name and name not in REFERENCE:
            return f"needs {need!r}; known: {', '.join(f'reference.{n}' for n in REFERENCE)}"
    return None


METRICS: Registry[Metric] = Registry("metric", "harness.evaluation.metrics", check=_lacks)


def _add(function: Callable, source: Callable, name: str, arguments: tuple, options: dict) -> None:
    """Register a metric that the file of `source` defines."""
    facts = {key: value for key, value in options.items() if key in Metric.__dataclass_fields__}
    settings = {key: value for key, value in options.items() if key not in facts}
    metric = Metric(function, name, *arguments, **facts, settings=settings)
    if "texts" in metric.requires:  # an extractor provides them, but some images have none
        metric = replace(metric, needs=(*metric.needs, "texts"))
    METRICS.register(name, source=source)(metric)


def register(name: str, *arguments: Any, **options: Any) -> Callable:
    """Decorator that registers a function as a metric. The arguments are the fields of `Metric`, in
    order or by name; all others are its `settings`."""

    def decorate(function: Callable) -> Callable:
        _add(function, function, name, arguments, options)
        return function

    return decorate


def register_per_image(name: str, *arguments: Any, texts: bool = False, **options: Any) -> Callable:
    """Decorator that registers a function of an `ImageBatch`, which returns a number for each of
    its images, `(B,)`, as a metric: the mean. It is defined for extractors of type `pixels`. texts:
    the function reads `ImageBatch.texts`. The other arguments are those of `register`."""
    facts = {"requires": ("pixels", "texts") if texts else ("pixels",), "needs": (name,)}

    def decorate(function: Callable[[ImageBatch], Tensor]) -> Callable:
        def mean(features: FeatureSet) -> Estimate:
            return mean_estimate(features.outputs[name])

        own = facts | {"per_image": function, "average": "mean over images"}
        _add(mean, function, name, arguments, own | options)
        return function

    return decorate


def defined_for(
    extractors: Iterable[Collection[str]], selection: Collection[str] | None = None
) -> list[Metric]:
    """The metrics that are defined for at least one extractor, given what each provides. selection:
    names of metrics (`evaluation.metrics`); None: all."""
    sets = list(extractors)
    metrics = [METRICS[name] for name in METRICS if selection is None or name in selection]
    return [metric for metric in metrics if any(map(metric.applies_to, sets))]


def main_metric(
    chosen: str, provides: Collection[str], selection: Collection[str] | None = None
) -> Metric | None:
    """The metric that ranks students in an extractor's features: the experiment's choice, or the
    extractor's Fréchet distance where that is not defined. None if `selection` contains neither, or
    if the extractor has no features."""
    known = defined_for([provides], selection)
    return next((METRICS[n] for n in (chosen, *FRECHET) if METRICS[n] in known), None)


def column_name(metric: str, num_samples: int, extractor: str) -> str:
    """The column of a metric in comparison tables, such as fd_n2000_digits-cnn."""
    return f"{metric}_n{num_samples}_{extractor}"
