"""Memorisation of training images, and diversity within a class."""

import math
from functools import partial

import torch
from torch import Tensor

from harness.evaluation.feature_set import Estimate, FeatureSet
from harness.evaluation.neighbours import nearest
from harness.evaluation.references import PAIRWISE_LIMIT
from harness.evaluation.registry import register

_register = partial(register, higher_is_better=None, limit=PAIRWISE_LIMIT, final_only=True)


def _median(values: Tensor) -> tuple[float, float]:
    """The median, and half the distance between the order statistics one standard error around."""
    ordered, n = values.double().sort().values, len(values)
    low, high = (round((n - 1) / 2 + sign * math.sqrt(n) / 2) for sign in (-1, 1))
    error = (ordered[min(high, n - 1)] - ordered[max(low, 0)]).item() / 2
    return ordered.quantile(0.5).item(), error


@_register(
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


@_register(
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
