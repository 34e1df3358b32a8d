"""The metrics, by name. Each says what it needs, which direction is better, and gives an error.

A metric is a function of `Views` (what an extractor saw of generated and reference images) that
returns a value and its standard error over the draw of samples (NaN where none is known). Errors
are delete-a-group jackknife estimates (10 groups), or closed forms for plain means.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from harness.evaluation.frechet import Moments, frechet_distance, gaussian_statistics

GROUPS = 10


class Reference:
    """The reference's features `(M, D)`, and what every comparison with them needs again."""

    def __init__(self, features: Tensor):
        self.features = features
        self._radii: dict[int, Tensor] = {}

    @cached_property
    def statistics(self) -> tuple[Tensor, Tensor]:
        return gaussian_statistics(self.features)

    def standardise(self, x: Tensor) -> Tensor:
        """float64, by the reference's own mean and deviation."""
        mean, covariance = self.statistics
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

    def disjoint(self, count: int) -> list[Views]:
        """All disjoint subsets of `count` consecutive samples (a remainder is left out)."""
        per_sample = {
            name: value for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return [
            replace(self, **{name: v[start : start + count] for name, v in per_sample.items()})
            for start in range(0, len(self.features) - count + 1, count)
        ]


@dataclass(frozen=True)
class Metric:
    """A registered metric. `needs`: attributes of `Views` that must be there. `settings`: what of
    its definition a reader must know (part of the protocol)."""

    name: str
    label: str
    higher_is_better: bool
    needs: tuple[str, ...]
    compute: Callable[[Views], tuple[float, float]]
    settings: dict


METRICS: dict[str, Metric] = {}


def register(
    name: str, label: str, higher_is_better: bool, needs: tuple[str, ...] = (), **settings
) -> Callable:
    """Register `compute(views) -> (value, stderr)` under `name`; a name may be taken once."""

    def decorate(compute):
        if name in METRICS:
            raise ValueError(f"metric {name!r} is registered already")
        METRICS[name] = Metric(name, label, higher_is_better, needs, compute, settings)
        return compute

    return decorate


def _mean(values: Tensor) -> tuple[float, float]:
    values = values.double()
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item()


def jackknife(estimates: list[float]) -> float:
    """Standard error from the estimates that each leave one of the groups out."""
    t = torch.tensor(estimates, dtype=torch.float64)
    return math.sqrt((len(t) - 1) * t.var(correction=0).item())


@register("fd", "Fréchet distance", False, covariance="N-1")
def frechet(views: Views) -> tuple[float, float]:
    reference = views.reference.statistics
    everything = Moments.of(views.features)
    value = frechet_distance(*everything.statistics(), *reference)
    without = [everything - Moments.of(group) for group in views.features.chunk(GROUPS)]
    return value, jackknife([frechet_distance(*m.statistics(), *reference) for m in without])


def cubic_kernel(a: Tensor, b: Tensor) -> Tensor:
    """`(x·y / D + 1)³` of all pairs."""
    return (a @ b.T / a.shape[1] + 1) ** 3


@register("kd", "Kernel distance", False, kernel="(x·y/D + 1)³", estimate="unbiased", scale=1000)
def kernel_distance(views: Views) -> tuple[float, float]:
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
    return estimate(rows.sum(), cross.sum(), n), jackknife(without)


def neighbour_radii(points: Tensor, k: int) -> Tensor:
    """Distance of each point to its k-th neighbour, itself not counted."""
    return torch.cdist(points, points).topk(k + 1, dim=1, largest=False).values[:, -1]


def _covered(points: Tensor, centres: Tensor, radii: Tensor) -> Tensor:
    """Whether each point lies in some centre's ball."""
    return (torch.cdist(points, centres) <= radii).any(dim=1)


@register("precision", "Precision", True)
def precision(views: Views) -> tuple[float, float]:
    """Share of generated samples within the reference's manifold (Kynkäänniemi et al. 2019)."""
    reference = views.reference
    radii = reference.radii(views.neighbours)
    return _mean(_covered(views.features, reference.features, radii))


@register("recall", "Recall", True)
def recall(views: Views) -> tuple[float, float]:
    """Share of reference samples within the generated samples' manifold."""
    radii = neighbour_radii(views.features, views.neighbours)
    covered = _covered(views.reference.features, views.features, radii)
    return covered.double().mean().item(), math.nan


@register("accuracy", "Class accuracy (%)", True, ("probabilities", "labels"))
def accuracy(views: Views) -> tuple[float, float]:
    """Share of samples that the classifier takes for the class asked for, in percent."""
    return _mean(100.0 * (views.probabilities.argmax(dim=1) == views.labels))


@register("clip-score", "CLIP score", True, ("text_similarity",), scale=100)
def clip_score(views: Views) -> tuple[float, float]:
    """100 cos(image, caption asked for), at least 0 (Hessel et al. 2021, without their 2.5)."""
    return _mean(100.0 * views.text_similarity.clamp_min(0))


@register("aesthetic", "Aesthetic (legibility)", True, ("aesthetic",), scale="0-10")
def aesthetic(views: Views) -> tuple[float, float]:
    """Mean of the head's rating of each image."""
    return _mean(views.aesthetic)
