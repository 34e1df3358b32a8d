"""Inputs of the metrics: features of generated images (`FeatureSet`) and of real ones
(`Reference`)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor
from torch.nn.functional import normalize

from harness.evaluation.estimates import GROUPS, Estimate, jackknife, without_each_group
from harness.evaluation.frechet import (
    BLOCK,
    Moments,
    factor,
    frechet_distance,
    frechet_of_few,
    gaussian_statistics,
)
from harness.evaluation.kernels import cubic_kernel, gaussian_kernel, mean_within
from harness.evaluation.neighbours import Neighbourhood, nearest, neighbour_radii, neighbourhood

# Samples that metrics over all pairs use at most, generated and reference: memory grows with the
# square, to 800 MB of float64 here.
PAIRWISE_LIMIT = 10_000
DENSITY_NEIGHBOURS = 5  # of density and coverage, as in the authors' code


class Reference:
    """Real images to compare with. Quantities that several comparisons share are computed once.

    features: `(M, D)`, at most PAIRWISE_LIMIT; None if only statistics are known.
    statistics: mean `(D,)` and covariance `(D, D)`; None: those of `features`.
    held_out: features of real images outside the reference, if there are any.
    index: positions of `features` in the training part, `(M,)`, if known.
    """

    def __init__(
        self,
        features: Tensor | None,
        statistics: tuple[Tensor, Tensor] | None = None,
        held_out: Tensor | None = None,
        index: Tensor | None = None,
    ):
        self.features, self.held_out, self.index = features, held_out, index
        self._given_statistics = statistics
        self._radii: dict[int, Tensor] = {}

    @cached_property
    def _own_statistics(self) -> tuple[Tensor, Tensor] | None:
        return None if self.features is None else gaussian_statistics(self.features)

    @property
    def statistics(self) -> tuple[Tensor, Tensor] | None:
        return self._own_statistics if self._given_statistics is None else self._given_statistics

    @cached_property
    def _factor(self) -> Tensor:
        return factor(self.statistics[1])

    def frechet(self, features: Tensor) -> float:
        """Fréchet distance of samples `(N, D)`."""
        if len(features) <= features.shape[1]:
            return frechet_of_few(features, *self.statistics)
        return self.frechet_of_moments(Moments.over(features.split(BLOCK)))

    def frechet_of_moments(self, moments: Moments) -> float:
        return frechet_distance(*self.statistics, *moments.statistics(), self._factor)

    def standardise(self, x: Tensor) -> Tensor:
        """Features in float64, scaled by the mean and standard deviation of `features`."""
        mean, covariance = self._own_statistics
        return (x.double() - mean) / covariance.diagonal().sqrt().clamp_min(1e-6)

    @cached_property
    def standardised(self) -> Tensor:
        return self.standardise(self.features)

    @cached_property
    def cubic_within(self) -> Tensor:
        return mean_within(cubic_kernel, self.standardised)

    @cached_property
    def gaussian_within(self) -> Tensor:
        return mean_within(gaussian_kernel, normalize(self.features.double(), dim=1))

    @cached_property
    def held_out_nearest(self) -> Tensor:
        """Distance of each held-out image to the nearest reference image."""
        return nearest(self.held_out, self.features)[0]

    @cached_property
    def typical_nearest(self) -> float | None:
        """Median of `held_out_nearest`: the unit for distances to the training images. None if
        nothing is held out, or if half of the held-out images duplicate training images."""
        if self.held_out is None:
            return None
        return self.held_out_nearest.double().quantile(0.5).item() or None

    def radii(self, k: int) -> Tensor:
        if k not in self._radii:
            self._radii[k] = neighbour_radii(self.features, k)
        return self._radii[k]


@dataclass
class FeatureSet:
    """What one feature extractor computed of a set of images.

    outputs: per-image tensors by name, `(N, ...)`: "features" `(N, D)`, and what else the extractor
    provides (class "probabilities", "text_similarity", ...). If a program can check the images for
    attributes that their captions name, also "attributes_correct" (all of them) and
    "<attribute>_correct", bool.
    labels: requested class or prompt of each image; classes: the classes that the prompts name
    (default: `labels`). neighbours: k of precision and recall. is_subset: one of several subsets,
    whose spread gives the standard error, so metrics may omit it.
    """

    outputs: dict[str, Tensor]
    reference: Reference
    labels: Tensor | None = None
    classes: Tensor | None = None
    neighbours: int = 3
    is_subset: bool = False
    _subsets: dict[int, list[FeatureSet]] = field(default_factory=dict, init=False, repr=False)

    @property
    def features(self) -> Tensor:
        return self.outputs["features"]

    def has(self, name: str) -> bool:
        """Whether there is an output, or an attribute such as "reference.held_out"."""
        value = self
        for part in name.split("."):
            value = getattr(value, part, None)
        return name in self.outputs or value is not None

    @cached_property
    def frechet(self) -> Estimate:
        """Fréchet distance to the reference with its jackknife error."""
        features, reference = self.features, self.reference
        if self.is_subset:
            return Estimate(reference.frechet(features))
        if len(features) <= features.shape[1]:
            value = reference.frechet(features)
            without = without_each_group(features, reference.frechet)
        else:
            total = Moments.over(features.split(BLOCK))
            value = reference.frechet_of_moments(total)
            without = tuple(
                reference.frechet_of_moments(total - Moments.of(group))
                for group in features.chunk(GROUPS)
            )
        return Estimate(value, jackknife(without), without)

    @cached_property
    def neighbourhood(self) -> Neighbourhood:
        return neighbourhood(
            self.features,
            self.reference.features,
            self.neighbours,
            self.reference.radii(self.neighbours),
            self.reference.radii(DENSITY_NEIGHBOURS),
        )

    @property
    def class_correct(self) -> Tensor:
        """Whether the classifier predicts the requested class, bool `(N,)`."""
        requested = self.labels if self.classes is None else self.classes
        return self.outputs["probabilities"].argmax(dim=1) == requested

    def per_image(self) -> dict[str, Tensor]:
        """All scalar outputs, `(N,)` each: what metrics average over the images."""
        values = {
            name: output
            for name, output in self.outputs.items()
            if output.ndim == 1 and output.is_floating_point()
        }
        if "attributes_correct" in self.outputs and "probabilities" in self.outputs:
            values["attributes_correct"] = self.class_correct & self.outputs["attributes_correct"]
        return values

    def subsets(self, count: int) -> list[FeatureSet]:
        """All disjoint subsets of `count` consecutive images, without the remainder. The same
        objects at every call, so that metrics share cached quantities."""
        if count not in self._subsets:
            starts = range(0, len(self.features) - count + 1, count)

            def part(tensor: Tensor | None, start: int) -> Tensor | None:
                return None if tensor is None else tensor[start : start + count]

            self._subsets[count] = [
                replace(
                    self,
                    outputs={name: part(t, start) for name, t in self.outputs.items()},
                    labels=part(self.labels, start),
                    classes=part(self.classes, start),
                    is_subset=len(starts) > 1,
                )
                for start in starts
            ]
        return self._subsets[count]
