"""The metrics, by name. Each says what it needs, which direction is better, and gives an error.

A metric is a function of `Views` (what an extractor saw of generated and reference images) that
returns a value, its standard error over the draw of samples (NaN where none is known) and, where it
can, the estimates that leave one group of samples out. Errors are delete-a-group jackknife
estimates (10 groups of consecutive samples), or closed forms for plain means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from harness.evaluation.frechet import (
    BLOCK,
    Moments,
    frechet_distance,
    gaussian_statistics,
    psd_root,
)

GROUPS = 10
# A metric of all pairs takes that many samples at most, of the generated ones and of the reference:
# its memory grows with the square, 800 MB of float64 here.
PAIRWISE_LIMIT = 10_000

# Kinds of extractors, by the `type` of their section.
CLASSIFIERS = ("cnn", "resnet")
TRAINED = (*CLASSIFIERS, "clip")
ALL = (*TRAINED, "inception")


class Reference:
    """What samples are compared with, and what every comparison needs again.

    `features`: `(M, D)`, at most PAIRWISE_LIMIT (None where there are only statistics).
    `statistics`: mean and covariance, if they are of more than `features`.
    """

    def __init__(self, features: Tensor | None, statistics: tuple[Tensor, Tensor] | None = None):
        self.features = features
        self._statistics = statistics
        self._radii: dict[int, Tensor] = {}

    @cached_property
    def _own(self) -> tuple[Tensor, Tensor]:
        return gaussian_statistics(self.features)

    @property
    def statistics(self) -> tuple[Tensor, Tensor]:
        return self._own if self._statistics is None else self._statistics

    @cached_property
    def covariance_root(self) -> Tensor:
        return psd_root(self.statistics[1])

    def standardise(self, x: Tensor) -> Tensor:
        """float64, by the mean and deviation of the reference's features."""
        mean, covariance = self._own
        return (x.double() - mean) / covariance.diagonal().sqrt().clamp_min(1e-6)

    @cached_property
    def standardised(self) -> Tensor:
        return self.standardise(self.features)

    @cached_property
    def kernel_within(self) -> Tensor:
        """Mean kernel value of two different reference samples."""
        k, m = cubic_kernel(self.standardised, self.standardised), len(self.features)
        return (k.sum() - k.diagonal().sum()) / (m * (m - 1))

    def radii(self, k: int) -> Tensor:
        if k not in self._radii:
            self._radii[k] = neighbour_radii(self.features, k)
        return self._radii[k]


@dataclass
class Views:
    """What one extractor saw. `features`: `(N, D)`; `labels`: the classes asked for;
    `probabilities`: `(N, classes)`; `text_similarity`: cosine with the caption asked for, `(N,)`;
    `aesthetic`: `(N,)`."""

    features: Tensor
    reference: Reference
    labels: Tensor | None = None
    probabilities: Tensor | None = None
    text_similarity: Tensor | None = None
    aesthetic: Tensor | None = None
    neighbours: int = 3
    alone: bool = True  # False: one of several subsets, whose spread is the error

    @property
    def reference_features(self) -> Tensor | None:
        return self.reference.features

    def disjoint(self, count: int) -> list[Views]:
        """All disjoint subsets of `count` consecutive samples (a remainder is left out)."""
        per_sample = {
            name: value for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        starts = range(0, len(self.features) - count + 1, count)
        return [
            replace(
                self,
                **{name: v[start : start + count] for name, v in per_sample.items()},
                alone=len(starts) == 1,
            )
            for start in starts
        ]


class Estimate(NamedTuple):
    """A number and its error. `leave_out[g]`: the number without the samples of group g. Which
    group a sample is in depends on its position alone, so that two generators with the same noise
    can be compared group by group (`harness.reporting.statistics`)."""

    value: float
    stderr: float = math.nan
    leave_out: tuple[float, ...] = ()


@dataclass(frozen=True)
class Metric:
    """A registered metric. `needs`: attributes of `Views` that must be there. `function`: views ->
    what `Estimate` is made of, the first two at least. `extractors`: the types of those it is
    defined on. `limit`: the most samples that it takes. `settings`: what of its definition a reader
    must know (part of the protocol)."""

    name: str
    label: str
    higher_is_better: bool
    needs: tuple[str, ...]
    function: Callable[[Views], tuple]
    settings: dict
    extractors: tuple[str, ...] = ALL
    limit: int | None = None

    def estimate(self, views: Views) -> Estimate:
        return Estimate(*self.function(views))

    def compute(self, views: Views) -> tuple[float, float]:
        """The value and its standard error."""
        return self.estimate(views)[:2]

    def count(self, num_samples: int) -> int:
        """How many samples it is computed on where there are `num_samples`."""
        return num_samples if self.limit is None else min(num_samples, self.limit)


METRICS: dict[str, Metric] = {}


def register(
    name: str,
    label: str,
    higher_is_better: bool,
    needs: tuple[str, ...] = (),
    extractors: tuple[str, ...] = ALL,
    limit: int | None = None,
    **settings,
) -> Callable:
    """Register `function(views) -> (value, stderr)`, or an `Estimate`, under `name`; a name may be
    taken once."""

    def decorate(function):
        if name in METRICS:
            raise ValueError(f"metric {name!r} is registered already")
        METRICS[name] = Metric(
            name, label, higher_is_better, needs, function, settings, extractors, limit
        )
        return function

    return decorate


def _mean(values: Tensor) -> Estimate:
    values = values.double()
    left = [(values.sum() - g.sum()) / (len(values) - len(g)) for g in values.chunk(GROUPS)]
    error = (values.std() / math.sqrt(len(values))).item()
    return Estimate(values.mean().item(), error, tuple(x.item() for x in left))


def jackknife(estimates: Sequence[float]) -> float:
    """Standard error from the estimates that each leave one of the groups out."""
    t = torch.tensor(estimates, dtype=torch.float64)
    return math.sqrt((len(t) - 1) * t.var(correction=0).item())


def _frechet(views: Views, distance: Callable) -> Estimate:
    everything = Moments.over(views.features.split(BLOCK))
    value = distance(*everything.statistics())
    if not views.alone:
        return Estimate(value)
    without = [everything - Moments.of(group) for group in views.features.chunk(GROUPS)]
    left = tuple(distance(*moments.statistics()) for moments in without)
    return Estimate(value, jackknife(left), left)


@register("fd", "Fréchet distance", False, extractors=TRAINED, covariance="N-1")
def frechet(views: Views) -> Estimate:
    """In the features of a network trained here: no FID."""
    reference = views.reference.statistics
    return _frechet(views, lambda *generated: frechet_distance(*generated, *reference))


@register("fid-edm", "FID, EDM's protocol", False, extractors=("inception",), covariance="N-1")
def fid_edm(views: Views) -> Estimate:
    """Fréchet Inception distance (Heusel et al. 2017), with the quantisation, the network and the
    covariance of EDM's evaluation (Karras et al. 2022).

    The reference comes first here: of 2048 features its root takes as long as all the rest."""
    mean, covariance = views.reference.statistics
    root = views.reference.covariance_root
    return _frechet(views, lambda *generated: frechet_distance(mean, covariance, *generated, root))


def cubic_kernel(a: Tensor, b: Tensor) -> Tensor:
    """`(x·y / D + 1)³` of all pairs."""
    return (a @ b.T / a.shape[1] + 1) ** 3


@register(
    "kd",
    "Kernel distance",
    False,
    needs=("reference_features",),
    limit=PAIRWISE_LIMIT,
    kernel="(x·y/D + 1)³",
    estimate="unbiased",
    scale=1000,
)
def kernel_distance(views: Views) -> Estimate:
    """Squared maximum mean discrepancy, unbiased, on all samples, times 1000 (Bińkowski et al.
    2018). Features are standardised by the reference: on raw ones the cube is dominated by a few
    large coordinates and the estimate is noise."""
    x, y = views.reference.standardise(views.features), views.reference.standardised
    xx, cross = cubic_kernel(x, x).fill_diagonal_(0), cubic_kernel(x, y).sum(dim=1)
    rows, n, m = xx.sum(dim=1), len(x), len(y)

    def estimate(total_xx: Tensor, total_xy: Tensor, count: int) -> float:
        within = total_xx / (count * (count - 1)) + views.reference.kernel_within
        return 1000 * (within - 2 * total_xy / (count * m)).item()

    without, start = [], 0
    for group in x.chunk(GROUPS):
        g = slice(start, start + len(group))
        start += len(group)
        left = rows.sum() - 2 * rows[g].sum() + xx[g, g].sum()
        without.append(estimate(left, cross.sum() - cross[g].sum(), n - len(group)))
    return Estimate(estimate(rows.sum(), cross.sum(), n), jackknife(without), tuple(without))


def neighbour_radii(points: Tensor, k: int) -> Tensor:
    """Distance of each point to its k-th neighbour, itself not counted."""
    return torch.cdist(points, points).topk(k + 1, dim=1, largest=False).values[:, -1]


def _covered(points: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """Whether each point lies in some centre's ball."""
    return (torch.cdist(points, centres) <= radii).any(dim=1)


@register("precision", "Precision", True, ("reference_features",), limit=PAIRWISE_LIMIT)
def precision(views: Views) -> Estimate:
    """Share of generated samples within the reference's manifold (Kynkäänniemi et al. 2019)."""
    reference = views.reference
    radii = reference.radii(views.neighbours)
    return _mean(_covered(views.features, reference.features, radii))


@register("recall", "Recall", True, ("reference_features",), limit=PAIRWISE_LIMIT)
def recall(views: Views) -> Estimate:
    """Share of reference samples within the generated samples' manifold."""
    radii = neighbour_radii(views.features, views.neighbours)
    covered = _covered(views.reference.features, views.features, radii)
    return Estimate(covered.double().mean().item())


@register(
    "accuracy", "Class accuracy (%)", True, ("probabilities", "labels"), extractors=CLASSIFIERS
)
def accuracy(views: Views) -> Estimate:
    """Share of samples that the classifier takes for the class asked for, in percent. Inception's
    classes are not those of the data set."""
    return _mean(100.0 * (views.probabilities.argmax(dim=1) == views.labels))


@register("clip-score", "CLIP score", True, ("text_similarity",), extractors=("clip",), scale=100)
def clip_score(views: Views) -> Estimate:
    """100 cos(image, caption asked for), at least 0 (Hessel et al. 2021, without their 2.5)."""
    return _mean(100.0 * views.text_similarity.clamp_min(0))


@register(
    "aesthetic", "Aesthetic (legibility)", True, ("aesthetic",), extractors=("clip",), scale="0-10"
)
def aesthetic(views: Views) -> Estimate:
    """Mean of the head's rating of each image."""
    return _mean(views.aesthetic)
