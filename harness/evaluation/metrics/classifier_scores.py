"""Inception Score, and accuracies by a classifier of the data set's own classes."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from harness.data.registry import attribute_names
from harness.evaluation.feature_set import (
    Estimate,
    FeatureSet,
    jackknife,
    mean_estimate,
    without_each_group,
)
from harness.evaluation.registry import register

SPLITS = 10  # of all published Inception Scores; the number of splits biases the score


def _score(probabilities: Tensor) -> float:
    """`exp(E KL(p(y|x) ‖ p(y)))` (Salimans et al. 2016)."""
    p = probabilities.double()
    entropy = torch.special.entr(p).sum(dim=1).mean()
    return (torch.special.entr(p.mean(dim=0)).sum() - entropy).exp().item()


@register(
    "inception-score",
    "Inception Score",
    True,
    ("probabilities", "inception"),
    final_only=True,
    splits="mean over 10, in the order of the samples",
)
def inception_score(features: FeatureSet) -> Estimate:
    probabilities = features.outputs["probabilities"]
    n = len(probabilities)
    ends = [i * n // SPLITS for i in range(SPLITS + 1)]
    values = torch.tensor([_score(probabilities[a:b]) for a, b in pairwise(ends)])
    return Estimate(values.mean().item(), (values.std() / math.sqrt(SPLITS)).item())


# "fd": not for Inception, as its distance is called FID.
@register(
    "class-score", "Class score", True, ("probabilities", "fd"), final_only=True, splits="none"
)
def class_score(features: FeatureSet) -> Estimate:
    """The Inception Score's formula with another classifier: the effective number of classes."""
    probabilities = features.outputs["probabilities"]
    value = _score(probabilities)
    if features.is_subset:
        return Estimate(value)
    without = without_each_group(probabilities, _score)
    return Estimate(value, jackknife(without), without)


@register("accuracy", "Class accuracy (%)", True, ("data-classes",), ("labels",))
def accuracy(features: FeatureSet) -> Estimate:
    """Percentage of samples that the classifier assigns to the requested class."""
    return mean_estimate(100.0 * features.class_correct)


@register(
    "attribute-accuracy",
    "Attribute accuracy (%)",
    True,
    ("data-classes",),
    ("attributes_correct",),
    attributes="the class by the classifier, the others by a program",
)
def attribute_accuracy(features: FeatureSet) -> Estimate:
    """Percentage of samples that show everything that their caption names."""
    return mean_estimate(100.0 * (features.class_correct & features.outputs["attributes_correct"]))


for _name in attribute_names():
    register(
        f"{_name}-accuracy",
        f"{_name.capitalize()} accuracy (%)",
        True,
        ("data-classes",),
        ("attributes_correct", f"{_name}_correct"),
        final_only=True,
    )(lambda features, key=f"{_name}_correct": mean_estimate(100.0 * features.outputs[key]))
