"""Memorisation of training images, and diversity within a class."""

from __future__ import annotations

import math

import torch

from harness.evaluation.estimates import Estimate, median_estimate
from harness.evaluation.feature_set import PAIRWISE_LIMIT, FeatureSet
from harness.evaluation.neighbours import nearest
from harness.evaluation.registry import register


@register(
    "memorisation",
    "Distance from the training images",
    None,
    needs=("reference.features", "reference.held_out"),
    limit=PAIRWISE_LIMIT,
    final_only=True,
    ratio="median distance to the nearest training image: generated over held-out images",
)
def memorisation(features: FeatureSet) -> Estimate:
    """About 1 for new images of the same distribution, 0 for copies of training images. Values
    above 1 are not better: bad images are far from all others. NaN if half of the held-out images
    duplicate training images."""
    reference = features.reference
    typical = reference.typical_nearest
    if typical is None:
        return Estimate(math.nan)
    value, error, _ = median_estimate(nearest(features.features, reference.features)[0])
    return Estimate(value / typical, error / typical)


@register(
    "diversity",
    "Diversity within a class or caption",
    None,
    needs=("labels",),
    limit=PAIRWISE_LIMIT,
    final_only=True,
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
