"""Overlap of the manifolds of two sets, memorisation of training images, diversity of a class."""

import math
from functools import partial

import torch
from torch import Tensor

from harness.evaluation.feature_set import DENSITY_NEIGHBOURS, Estimate, FeatureSet, mean_estimate
from harness.evaluation.neighbours import nearest
from harness.evaluation.references import PAIRWISE_LIMIT
from harness.evaluation.registry import register

_register = partial(register, limit=PAIRWISE_LIMIT)
_overlap = partial(_register, higher_is_better=True, needs=("reference.features",))
_diagnostic = partial(_register, higher_is_better=None, final_only=True)


@_overlap("precision", "Precision")
def precision(features: FeatureSet) -> Estimate:
    """Fraction of generated samples within the reference's manifold (Kynkäänniemi et al. 2019)."""
    return mean_estimate(features.neighbourhood.precise)


@_overlap("recall", "Recall")
def recall(features: FeatureSet) -> Estimate:
    """Fraction of reference samples within the generated samples' manifold."""
    return Estimate(features.neighbourhood.recalled.double().mean().item())


@_overlap("density", "Density", final_only=True, k=DENSITY_NEIGHBOURS)
def density(features: FeatureSet) -> Estimate:
    """Reference balls that contain a generated sample, over k (Naeem et al. 2020, eq. 4)."""
    return mean_estimate(features.neighbourhood.balls / DENSITY_NEIGHBOURS)


@_overlap("coverage", "Coverage", final_only=True, k=DENSITY_NEIGHBOURS)
def coverage(features: FeatureSet) -> Estimate:
    """Fraction of reference balls that contain a generated sample (Naeem et al. 2020, eq. 5)."""
    return Estimate(features.neighbourhood.covered.double().mean().item())


def _median(values: Tensor) -> tuple[float, float]:
    """The median, and half the distance between the order statistics one standard error around."""
    ordered, n = values.double().sort().values, len(values)
    low, high = (round((n - 1) / 2 + sign * math.sqrt(n) / 2) for sign in (-1, 1))
    error = (ordered[min(high, n - 1)] - ordered[max(low, 0)]).item() / 2
    return ordered.quantile(0.5).item(), error


@_diagnostic(
    "memorisation",
    "Distance from the training images",
    needs=("reference.features", "reference.held_out"),
    ratio="median distance to the nearest training image: generated over held-out images",
)
def memorisation(features: FeatureSet) -> Estimate:
    """About 1 for new images of the same distribution, 0 for copies of training images. Values
    above 1 are not better: bad images are far from all others. NaN if half of the held-out images
    duplicate training images."""
    typical = features.reference.typical_nearest
    if typical is None:
        return Estimate(math.nan)
    value, error = _median(nearest(features.features, features.reference.features)[0])
    return Estimate(value / typical, error / typical)


@_diagnostic(
    "diversity",
    "Diversity within a class or caption",
    needs=("labels",),
    distance="mean Euclidean distance of two samples of a class or caption, mean over these",
)
def diversity(features: FeatureSet) -> Estimate:
    """Compare with the floor, the diversity of real images. The error is Hoeffding's for a mean
    over pairs."""
    means, variances = [], []
    for label in features.labels.unique():
        own = features.features[features.labels == label].double()
        if len(own) < 2:
            continue
        mean_distance = torch.cdist(own, own).sum(dim=1) / (len(own) - 1)
        means.append(mean_distance.mean())
        variances.append(4 * mean_distance.var() / len(own))
    if not means:
        return Estimate(math.nan)
    error = torch.stack(variances).sum().sqrt() / len(means)
    return Estimate(torch.stack(means).mean().item(), error.item())
