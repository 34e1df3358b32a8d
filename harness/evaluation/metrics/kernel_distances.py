"""Kernel distances: squared maximum mean discrepancies on all samples, without bias."""

from __future__ import annotations

from torch.nn.functional import normalize

from harness.evaluation.estimates import Estimate
from harness.evaluation.feature_set import PAIRWISE_LIMIT, FeatureSet
from harness.evaluation.kernels import SIGMA, cubic_kernel, gaussian_kernel, squared_mmd
from harness.evaluation.registry import register


@register(
    "kd",
    "Kernel distance",
    False,
    needs=("reference.features",),
    limit=PAIRWISE_LIMIT,
    kernel="(x·y/D + 1)³",
    estimate="unbiased",
    scale=1000,
)
def kernel_distance(features: FeatureSet) -> Estimate:
    """Bińkowski et al. 2018, on features standardised by the reference: on raw features a few large
    coordinates dominate the cube, and the estimate is noise."""
    reference = features.reference
    x, y = reference.standardise(features.features), reference.standardised
    return squared_mmd(x, y, cubic_kernel, reference.cubic_within)


@register(
    "cmmd",
    "CLIP maximum mean discrepancy",
    False,
    requires=("image-text",),
    needs=("reference.features",),
    limit=PAIRWISE_LIMIT,
    final_only=True,
    kernel="exp(-‖x - y‖²/2σ²) on embeddings of length 1",
    sigma=SIGMA,
    estimate="unbiased",
    scale=1000,
)
def cmmd(features: FeatureSet) -> Estimate:
    """Jayasumana et al. 2024."""
    reference = features.reference
    x, y = (normalize(t.double(), dim=1) for t in (features.features, reference.features))
    return squared_mmd(x, y, gaussian_kernel, reference.gaussian_within)
