"""The metrics, by name. Each says what it needs, which direction is better, and gives an error.

A metric is a function of `Views` (what an extractor saw of generated and reference images) that
returns a value, its standard error over the draw of samples (NaN where none is known) and, where it
can, the estimates that leave one group of samples out. Errors are delete-a-group jackknife
estimates (10 groups of consecutive samples), or closed forms for means, medians and means over
pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from harness.data.captioned_digits import CHECKED
from harness.evaluation.frechet import (
    BLOCK,
    Moments,
    factor,
    frechet_distance,
    frechet_of_few,
    gaussian_statistics,
)
from harness.evaluation.neighbours import Neighbourhood, nearest, neighbour_radii, neighbourhood
from harness.streams import Stream

GROUPS = 10
SPLITS = 10  # of the Inception Score
# A metric of all pairs takes that many samples at most, of the generated ones and of the reference:
# its memory grows with the square, 800 MB of float64 here.
PAIRWISE_LIMIT = 10_000

# Kinds of extractors, by the `type` of their section.
CLASSIFIERS = ("cnn", "resnet")
TRAINED = (*CLASSIFIERS, "clip")
INCEPTION = (
    *("inception", "inception-clean", "inception-legacy-tensorflow"),
    *("inception-coco", "inception-patch"),
)
CLIPS = ("clip", "open-clip")
NO_FID = (*TRAINED, "open-clip", "dinov2", "efficientnet-lite")
ALL = (*NO_FID, *INCEPTION)

RATINGS = ("aesthetic", "aesthetic_v1", "aesthetic_v2")
WIDE = 5  # neighbours of density and coverage, as their authors have it


def fewest(neighbours: int) -> tuple[int, int]:
    """How many images of the reference and how many samples every metric can be computed on:
    each needs as many neighbours, and each of ten groups (or splits) a sample."""
    return max(neighbours, WIDE) + 1, max(neighbours + 1, GROUPS, SPLITS)


def few_samples(extractor: str, dim: int, count: int, floor: int | None) -> str:
    """What is to be said where there are no more samples than features: their covariance is
    singular. `floor`: the number of real images that the floor is of, if there is one."""
    return (
        f"{count:,} samples are no more than the {dim:,} features of {extractor}; their Fréchet "
        "distance is mostly bias; "
        + (f"compare with the floor, n {floor:,}" if floor else "there is no floor")
    )


class Reference:
    """What samples are compared with, and what every comparison needs again.

    `features`: `(M, D)`, at most PAIRWISE_LIMIT (None where there are only statistics); `index`:
    which images they are of, `(M,)` (None: unknown).
    `statistics`: mean and covariance, if they are of more than `features`.
    `held_out`: features of real images that are not among the reference, if there are any.
    """

    def __init__(
        self,
        features: Tensor | None,
        statistics: tuple[Tensor, Tensor] | None = None,
        held_out: Tensor | None = None,
        index: Tensor | None = None,
    ):
        self.features, self.held_out, self.index = features, held_out, index
        self._statistics = statistics
        self._radii: dict[int, Tensor] = {}

    @cached_property
    def _own(self) -> tuple[Tensor, Tensor] | None:
        return None if self.features is None else gaussian_statistics(self.features)

    @property
    def statistics(self) -> tuple[Tensor, Tensor] | None:
        return self._own if self._statistics is None else self._statistics

    @cached_property
    def _factor(self) -> Tensor:
        return factor(self.statistics[1])

    def frechet(self, features: Tensor) -> float:
        """Fréchet distance of samples `(N, D)`."""
        if len(features) <= features.shape[1]:
            return frechet_of_few(features, *self.statistics)
        return self.frechet_of(Moments.over(features.split(BLOCK)))

    def frechet_of(self, moments: Moments) -> float:
        return frechet_distance(*self.statistics, *moments.statistics(), self._factor)

    def standardise(self, x: Tensor) -> Tensor:
        """float64, by the mean and deviation of the reference's features."""
        mean, covariance = self._own
        return (x.double() - mean) / covariance.diagonal().sqrt().clamp_min(1e-6)

    @cached_property
    def standardised(self) -> Tensor:
        return self.standardise(self.features)

    @cached_property
    def cubic_within(self) -> Tensor:
        return _mean_within(cubic_kernel, self.standardised)

    @cached_property
    def gaussian_within(self) -> Tensor:
        return _mean_within(gaussian_kernel, normalize(self.features.double(), dim=1))

    @cached_property
    def held_out_nearest(self) -> Tensor:
        """Distance of each held-out image to the nearest of the reference."""
        return nearest(self.held_out, self.features)[0]

    @cached_property
    def typical_nearest(self) -> float | None:
        """The median of these: the unit in which nearness to the training images is told. None
        where there is none: nothing is held out, or half of it are copies of training images."""
        if self.held_out is None:
            return None
        return self.held_out_nearest.double().quantile(0.5).item() or None

    def radii(self, k: int) -> Tensor:
        if k not in self._radii:
            self._radii[k] = neighbour_radii(self.features, k)
        return self._radii[k]


class Estimate(NamedTuple):
    """A number and its error. `leave_out[g]`: the number without the samples of group g. Which
    group a sample is in depends on its position alone, so that two generators with the same noise
    can be compared group by group (`harness.reporting.intervals`)."""

    value: float
    stderr: float = math.nan
    leave_out: tuple[float, ...] = ()


@dataclass
class Views:
    """What one extractor saw. `features`: `(N, D)`; `labels`: the classes or captions asked for;
    `classes`: those that the captions name; `shown`: bool `(N, 3)`, whether ink, ground and side
    are as the captions say; `probabilities`: `(N, classes)`; `text_similarity`: cosine with the
    caption asked for, `(N,)`; `prefixed_similarity`: the same with Hessel's prefix; `aesthetic` (of
    a head trained here), `aesthetic_v1`, `aesthetic_v2` (LAION's): `(N,)`."""

    features: Tensor
    reference: Reference
    labels: Tensor | None = None
    probabilities: Tensor | None = None
    text_similarity: Tensor | None = None
    prefixed_similarity: Tensor | None = None
    aesthetic: Tensor | None = None
    aesthetic_v1: Tensor | None = None
    aesthetic_v2: Tensor | None = None
    classes: Tensor | None = None
    shown: Tensor | None = None
    neighbours: int = 3
    alone: bool = True  # False: one of several subsets, whose spread is the error
    _parts: dict[int, list[Views]] = field(default_factory=dict, init=False, repr=False)

    @property
    def reference_features(self) -> Tensor | None:
        return self.reference.features

    @property
    def held_out_features(self) -> Tensor | None:
        return self.reference.held_out

    @property
    def statistics(self) -> tuple[Tensor, Tensor] | None:
        return self.reference.statistics

    @cached_property
    def frechet(self) -> Estimate:
        """Distance and error, which several metrics start from."""
        features, reference = self.features, self.reference
        if not self.alone:
            return Estimate(reference.frechet(features))
        groups = features.chunk(GROUPS)
        if len(features) <= features.shape[1]:
            value = reference.frechet(features)
            without = tuple(
                reference.frechet(torch.cat([*groups[:i], *groups[i + 1 :]]))
                for i in range(len(groups))
            )
        else:
            everything = Moments.over(features.split(BLOCK))
            value = reference.frechet_of(everything)
            without = tuple(reference.frechet_of(everything - Moments.of(g)) for g in groups)
        return Estimate(value, jackknife(without), without)

    @cached_property
    def neighbourhood(self) -> Neighbourhood:
        reference = self.reference
        radii, wide = reference.radii(self.neighbours), reference.radii(WIDE)
        return neighbourhood(self.features, reference.features, self.neighbours, radii, wide)

    def per_image(self) -> dict[str, Tensor]:
        """What metrics are means of, `(N,)` each, of images that were asked for by texts."""
        found = {
            name: getattr(self, name)
            for name in ("text_similarity", "prefixed_similarity", *RATINGS)
            if getattr(self, name) is not None
        }
        if self.shown is not None and self.probabilities is not None:
            found["attributes_right"] = _class_is_right(self) & self.shown.all(dim=1)
        return found

    def disjoint(self, count: int) -> list[Views]:
        """All disjoint subsets of `count` consecutive samples (a remainder is left out), always
        the same objects: metrics share what they keep."""
        if count not in self._parts:
            per_sample = {
                name: value for name, value in vars(self).items() if isinstance(value, Tensor)
            }
            starts = range(0, len(self.features) - count + 1, count)
            self._parts[count] = [
                replace(
                    self,
                    **{name: v[start : start + count] for name, v in per_sample.items()},
                    alone=len(starts) == 1,
                )
                for start in starts
            ]
        return self._parts[count]


@dataclass(frozen=True)
class Metric:
    """A registered metric. `higher_is_better`: None for a diagnostic, of which neither is: nothing
    is ranked or claimed by it. `needs`: attributes of `Views` that must be there. `function`:
    views -> what `Estimate` is made of, the first two at least. `extractors`: the types of those it
    is defined on. `limit`: the most samples that it takes. `final_only`: whether it is left out of
    snapshots before the last. `samples_per_dim`: the fewest samples per feature that it takes.
    `settings`: what of its definition a reader must know (part of the protocol)."""

    name: str
    label: str
    higher_is_better: bool | None
    needs: tuple[str, ...]
    function: Callable[[Views], tuple]
    settings: dict
    extractors: tuple[str, ...] = ALL
    limit: int | None = None
    final_only: bool = False
    samples_per_dim: int = 0

    @property
    def arrow(self) -> str:
        """What stands in the heading of its columns."""
        return {True: " ↑", False: " ↓", None: ""}[self.higher_is_better]

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
    higher_is_better: bool | None,
    needs: tuple[str, ...] = (),
    extractors: tuple[str, ...] = ALL,
    limit: int | None = None,
    final_only: bool = False,
    samples_per_dim: int = 0,
    **settings,
) -> Callable:
    """Register `function(views) -> (value, stderr)`, or an `Estimate`, under `name`; a name may be
    taken once."""

    def decorate(function):
        if name in METRICS:
            raise ValueError(f"metric {name!r} is registered already")
        METRICS[name] = Metric(
            name,
            label,
            higher_is_better,
            needs,
            function,
            settings,
            extractors,
            limit,
            final_only,
            samples_per_dim,
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


# In the features of Inception it is an FID (Heusel et al. 2017), and only there: with EDM's
# protocol (Karras et al. 2022), clean-fid's resize (Parmar et al. 2022), the resize by which
# clean-fid repeats the first FIDs, the network's own, that of text-to-image papers on COCO (Kang et
# al. 2023, GigaGAN), or of the middle of large images as they are (Chai et al. 2022).
@register("fd", "Fréchet distance", False, ("statistics",), NO_FID, covariance="N-1")
@register(
    "fid-edm", "FID, EDM's protocol", False, ("statistics",), ("inception",), covariance="N-1"
)
@register(
    "fid-clean", "FID, clean-fid", False, ("statistics",), ("inception-clean",), covariance="N-1"
)
@register(
    "fid-legacy-tensorflow",
    "FID, clean-fid's legacy_tensorflow",
    False,
    ("statistics",),
    ("inception-legacy-tensorflow",),
    covariance="N-1",
)
@register(
    "fid-coco", "FID, COCO at 256 px", False, ("statistics",), ("inception-coco",), covariance="N-1"
)
@register("fid-patch", "Patch FID", False, ("statistics",), ("inception-patch",), covariance="N-1")
def frechet(views: Views) -> Estimate:
    """Between Gaussians fitted to generated and reference samples."""
    return views.frechet


SIZES = 10


@register(
    "fd-inf",
    "Fréchet distance, unlimited samples",
    False,
    ("statistics",),
    final_only=True,
    samples_per_dim=SIZES,  # with fewer than D samples the distance is no line in 1/n
    covariance="N-1",
    extrapolation="linear in 1/n over n = N/1 ... N/10, each the mean over n's disjoint subsets of "
    "one seeded order",
    stderr="that of the distance at N",
)
def frechet_infinity(views: Views) -> Estimate:
    """The Fréchet distance without its bias, which is linear in 1/n (Chong and Forsyth 2020).

    Theirs draws one subset of each size. Here every size uses all samples, in disjoint subsets, so
    that the line is the bias alone: to first order the intercept errs as the distance at N does.
    """
    n = len(views.features)
    order = Stream(0, "fd-inf").uniform(torch.arange(n)).argsort()
    shuffled, line = views.features[order], []
    for parts in range(1, SIZES + 1):
        size = n // parts
        values = [
            views.reference.frechet(shuffled[start : start + size])
            for start in range(0, size * parts, size)
        ]
        line.append((1 / size, sum(values) / parts))
    x, y = torch.tensor(line, dtype=torch.float64).T
    slope = ((x - x.mean()) * y).sum() / (x - x.mean()).square().sum()
    return Estimate((y.mean() - slope * x.mean()).item(), views.frechet.stderr)


def cubic_kernel(a: Tensor, b: Tensor) -> Tensor:
    """`(x·y / D + 1)³` of all pairs."""
    return (a @ b.T).div_(a.shape[1]).add_(1).pow_(3)


SIGMA = 10.0


def gaussian_kernel(a: Tensor, b: Tensor) -> Tensor:
    """`exp(-‖x - y‖² / 2σ²)` of all pairs of vectors of length 1."""
    return (a @ b.T).sub_(1).div_(SIGMA**2).exp_()


def _within(kernel: Callable, x: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of kernel values of two different samples: `(GROUPS,)` of each group with all samples,
    and of each group with itself. A group at a time, so that the matrix need not be held."""
    totals, own, start = [], [], 0
    for group in x.chunk(GROUPS):
        k = kernel(group, x)
        block = k[:, start : start + len(group)].fill_diagonal_(0)
        totals.append(k.sum())
        own.append(block.sum())
        start += len(group)
    return torch.stack(totals), torch.stack(own)


def _mean_within(kernel: Callable, x: Tensor) -> Tensor:
    return _within(kernel, x)[0].sum() / (len(x) * (len(x) - 1))


def _discrepancy(x: Tensor, y: Tensor, kernel: Callable, within: Tensor) -> Estimate:
    """Squared maximum mean discrepancy, unbiased, times 1000 (Gretton et al. 2012, eq. 3).
    `within`: the mean kernel value of two different samples of y."""
    groups, m = x.chunk(GROUPS), len(y)
    totals, own = _within(kernel, x)
    cross = torch.stack([kernel(group, y).sum() for group in groups])

    def estimate(total_xx: Tensor, total_xy: Tensor, count: int) -> float:
        mine = total_xx / (count * (count - 1))
        return 1000 * (mine + within - 2 * total_xy / (count * m)).item()

    everything = estimate(totals.sum(), cross.sum(), len(x))
    without = tuple(
        estimate(totals.sum() - 2 * t + o, cross.sum() - c, len(x) - len(group))
        for t, o, c, group in zip(totals, own, cross, groups, strict=True)
    )
    return Estimate(everything, jackknife(without), without)


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
    """Squared maximum mean discrepancy on all samples (Bińkowski et al. 2018). Features are
    standardised by the reference: on raw ones the cube is dominated by a few large coordinates and
    the estimate is noise."""
    reference = views.reference
    x, y = reference.standardise(views.features), reference.standardised
    return _discrepancy(x, y, cubic_kernel, reference.cubic_within)


@register(
    "cmmd",
    "CLIP maximum mean discrepancy",
    False,
    needs=("reference_features",),
    extractors=CLIPS,
    limit=PAIRWISE_LIMIT,
    final_only=True,
    kernel="exp(-‖x - y‖²/2σ²) on embeddings of length 1",
    sigma=SIGMA,
    estimate="unbiased",
    scale=1000,
)
def cmmd(views: Views) -> Estimate:
    """Jayasumana et al. 2024."""
    x, y = (normalize(t.double(), dim=1) for t in (views.features, views.reference.features))
    return _discrepancy(x, y, gaussian_kernel, views.reference.gaussian_within)


@register("precision", "Precision", True, ("reference_features",), limit=PAIRWISE_LIMIT)
def precision(views: Views) -> Estimate:
    """Share of generated samples within the reference's manifold (Kynkäänniemi et al. 2019)."""
    return _mean(views.neighbourhood.precise)


@register("recall", "Recall", True, ("reference_features",), limit=PAIRWISE_LIMIT)
def recall(views: Views) -> Estimate:
    """Share of reference samples within the generated samples' manifold."""
    return Estimate(views.neighbourhood.recalled.double().mean().item())


@register(
    "density",
    "Density",
    True,
    ("reference_features",),
    limit=PAIRWISE_LIMIT,
    final_only=True,
    k=WIDE,
)
def density(views: Views) -> Estimate:
    """Balls of the reference that hold a generated sample, over k (Naeem et al. 2020, eq. 4)."""
    return _mean(views.neighbourhood.balls / WIDE)


@register(
    "coverage",
    "Coverage",
    True,
    ("reference_features",),
    limit=PAIRWISE_LIMIT,
    final_only=True,
    k=WIDE,
)
def coverage(views: Views) -> Estimate:
    """Share of reference samples whose ball holds a generated one (Naeem et al. 2020, eq. 5)."""
    return Estimate(views.neighbourhood.covered.double().mean().item())


def _median(values: Tensor) -> tuple[float, float]:
    """The median, and half the width of the order statistics one standard error around it."""
    ordered, n = values.double().sort().values, len(values)
    low, high = (round((n - 1) / 2 + sign * math.sqrt(n) / 2) for sign in (-1, 1))
    error = (ordered[min(high, n - 1)] - ordered[max(low, 0)]).item() / 2
    return ordered.quantile(0.5).item(), error


@register(
    "memorisation",
    "Distance from the training images",
    None,
    ("reference_features", "held_out_features"),
    limit=PAIRWISE_LIMIT,
    final_only=True,
    ratio="median distance to the nearest training image: generated over held-out images",
)
def memorisation(views: Views) -> Estimate:
    """About 1 for new images of the same kind, as the held-out ones are; 0 for copies of training
    images. Bad images are far from all others, so above 1 it is no praise. NaN where half of the
    held-out images are copies of training images themselves."""
    typical = views.reference.typical_nearest
    if typical is None:
        return Estimate(math.nan)
    value, error = _median(nearest(views.features, views.reference.features)[0])
    return Estimate(value / typical, error / typical)


@register(
    "diversity",
    "Diversity within a class or caption",
    None,
    ("labels",),
    limit=PAIRWISE_LIMIT,
    final_only=True,
    distance="mean Euclidean distance of two samples of a class or caption, mean over these",
)
def diversity(views: Views) -> Estimate:
    """The floor's is that of real images. Its error is Hoeffding's for a mean over pairs."""
    means, variances = [], []
    for label in views.labels.unique():
        own = views.features[views.labels == label].double()
        if len(own) < 2:
            continue
        each = torch.cdist(own, own).sum(dim=1) / (len(own) - 1)
        means.append(each.mean())
        variances.append(4 * each.var() / len(own))
    if not means:
        return Estimate(math.nan)
    error = torch.stack(variances).sum().sqrt() / len(means)
    return Estimate(torch.stack(means).mean().item(), error.item())


def _score(probabilities: Tensor) -> float:
    """`exp(E KL(p(y|x) ‖ p(y)))` (Salimans et al. 2016)."""
    p = probabilities.double()
    entropy = torch.special.entr(p).sum(dim=1).mean()
    return (torch.special.entr(p.mean(dim=0)).sum() - entropy).exp().item()


@register(
    "inception-score",
    "Inception Score",
    True,
    ("probabilities",),
    INCEPTION,
    final_only=True,
    splits="mean over 10, in the order of the samples",
)
def inception_score(views: Views) -> Estimate:
    """With the 10 splits of all published scores, which are biased by their size."""
    n = len(views.probabilities)
    values = torch.tensor(
        [
            _score(views.probabilities[i * n // SPLITS : (i + 1) * n // SPLITS])
            for i in range(SPLITS)
        ]
    )
    return Estimate(values.mean().item(), (values.std() / math.sqrt(SPLITS)).item())


@register(
    "class-score",
    "Class score",
    True,
    ("probabilities",),
    (*CLASSIFIERS, "efficientnet-lite"),
    final_only=True,
    splits="none",
)
def class_score(views: Views) -> Estimate:
    """The Inception Score's formula with another classifier: the number of classes that samples
    are surely and evenly spread over."""
    value, groups = _score(views.probabilities), views.probabilities.chunk(GROUPS)
    if not views.alone:
        return Estimate(value)
    left = [torch.cat([*groups[:i], *groups[i + 1 :]]) for i in range(len(groups))]
    without = tuple(map(_score, left))
    return Estimate(value, jackknife(without), without)


@register(
    "accuracy", "Class accuracy (%)", True, ("probabilities", "labels"), extractors=CLASSIFIERS
)
def accuracy(views: Views) -> Estimate:
    """Share of samples that the classifier takes for the class asked for, in percent. Inception's
    classes are not those of the data set."""
    return _mean(100.0 * _class_is_right(views))


def _class_is_right(views: Views) -> Tensor:
    asked = views.labels if views.classes is None else views.classes
    return views.probabilities.argmax(dim=1) == asked


@register(
    "attribute-accuracy",
    "Attribute accuracy (%)",
    True,
    ("probabilities", "shown"),
    extractors=CLASSIFIERS,
    attributes="the class by the classifier; ink, ground and side as a program measures them",
)
def attribute_accuracy(views: Views) -> Estimate:
    """Share of samples that show everything that their caption names, in percent."""
    return _mean(100.0 * (_class_is_right(views) & views.shown.all(dim=1)))


for _column, _name in enumerate(CHECKED):
    register(
        f"{_name}-accuracy",
        f"{_name.capitalize()} accuracy (%)",
        True,
        ("shown",),
        extractors=CLASSIFIERS,
        final_only=True,
    )(lambda views, column=_column: _mean(100.0 * views.shown[:, column]))


@register("clip-score", "CLIP score", True, ("text_similarity",), extractors=("clip",), scale=100)
@register(
    "clip-score-100-plain",
    "CLIP score",
    True,
    ("text_similarity",),
    ("open-clip",),
    scale="100 max(cos, 0)",
    prefix="none",
)
def clip_score(views: Views) -> Estimate:
    """100 cos(image, caption asked for), at least 0: Hessel et al. 2021 without their 2.5 and
    prefix, as most text-to-image papers have it."""
    return _mean(100.0 * views.text_similarity.clamp_min(0))


@register(
    "clip-score-2.5-depicts",
    "CLIPScore (Hessel et al.)",
    True,
    ("prefixed_similarity",),
    ("open-clip",),
    final_only=True,
    scale="2.5 max(cos, 0)",
    prefix="A photo depicts",
)
def clip_score_depicts(views: Views) -> Estimate:
    """As Hessel et al. 2021 define it."""
    return _mean(2.5 * views.prefixed_similarity.clamp_min(0))


@register("aesthetic-v1", "Aesthetic, LAION v1", True, ("aesthetic_v1",), ("open-clip",))
def aesthetic_v1(views: Views) -> Estimate:
    return _mean(views.aesthetic_v1)


@register("aesthetic-v2", "Aesthetic, LAION v2", True, ("aesthetic_v2",), ("open-clip",))
def aesthetic_v2(views: Views) -> Estimate:
    return _mean(views.aesthetic_v2)


@register(
    "aesthetic", "Aesthetic (legibility)", True, ("aesthetic",), extractors=("clip",), scale="0-10"
)
def aesthetic(views: Views) -> Estimate:
    """Mean of the head's rating of each image."""
    return _mean(views.aesthetic)


# One for each kind of extractor.
FRECHET = tuple(name for name, metric in METRICS.items() if metric.function is frechet)


def main_metric(chosen: str, kind: str) -> Metric:
    """What students are ranked and drawn by in the features of a kind of extractor: the metric that
    an experiment has chosen, and where it is not defined there the Fréchet distance, which has
    another name in each Inception."""
    return next(METRICS[name] for name in (chosen, *FRECHET) if kind in METRICS[name].extractors)
