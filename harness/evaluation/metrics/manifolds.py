"""Precision, recall, density and coverage: overlap of the manifolds of two sets of samples."""

from functools import partial

from harness.evaluation.feature_set import DENSITY_NEIGHBOURS, Estimate, FeatureSet, mean_estimate
from harness.evaluation.references import PAIRWISE_LIMIT
from harness.evaluation.registry import register

_register = partial(
    register, higher_is_better=True, needs=("reference.features",), limit=PAIRWISE_LIMIT
)


@_register("precision", "Precision")
def precision(features: FeatureSet) -> Estimate:
    """Fraction of generated samples within the reference's manifold (Kynkäänniemi et al. 2019)."""
    return mean_estimate(features.neighbourhood.precise)


@_register("recall", "Recall")
def recall(features: FeatureSet) -> Estimate:
    """Fraction of reference samples within the generated samples' manifold."""
    return Estimate(features.neighbourhood.recalled.double().mean().item())


@_register("density", "Density", final_only=True, k=DENSITY_NEIGHBOURS)
def density(features: FeatureSet) -> Estimate:
    """Reference balls that contain a generated sample, over k (Naeem et al. 2020, eq. 4)."""
    return mean_estimate(features.neighbourhood.balls / DENSITY_NEIGHBOURS)


@_register("coverage", "Coverage", final_only=True, k=DENSITY_NEIGHBOURS)
def coverage(features: FeatureSet) -> Estimate:
    """Fraction of reference balls that contain a generated sample (Naeem et al. 2020, eq. 5)."""
    return Estimate(features.neighbourhood.covered.double().mean().item())
