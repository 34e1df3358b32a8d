"""Fréchet distances between Gaussians fitted to features (Heusel et al. 2017)."""

import torch

from harness.evaluation.feature_set import Estimate, FeatureSet
from harness.evaluation.registry import FRECHET, register
from harness.streams import Stream

SIZES = 10

for _name, _label in FRECHET.items():
    register(_name, _label, False, (_name,), ("reference.statistics",), covariance="N-1")(
        lambda features: features.frechet
    )


@register(
    "fd-inf",
    "Fréchet distance, unlimited samples",
    False,
    needs=("reference.statistics",),
    final_only=True,
    samples_per_dim=SIZES,  # below D samples the distance is not linear in 1/n
    covariance="N-1",
    extrapolation="linear in 1/n over n = N/1 ... N/10, each the mean over n's disjoint subsets of "
    "one seeded order",
    stderr="that of the distance at N",
)
def frechet_infinity(features: FeatureSet) -> Estimate:
    """Fréchet distance extrapolated to infinitely many samples; its bias is linear in 1/n (Chong
    and Forsyth 2020).

    The authors draw one subset per size. Here every size uses all samples in disjoint subsets, so
    to first order the intercept has the same error as the distance at N.
    """
    n = len(features.features)
    order = Stream(0, "fd-inf").uniform(torch.arange(n)).argsort()
    shuffled, line = features.features[order], []
    for parts in range(1, SIZES + 1):
        size = n // parts
        subsets = shuffled[: size * parts].split(size)
        line.append((1 / size, sum(map(features.reference.frechet, subsets)) / parts))
    x, y = torch.tensor(line, dtype=torch.float64).T
    slope = ((x - x.mean()) * y).sum() / (x - x.mean()).square().sum()
    return Estimate((y.mean() - slope * x.mean()).item(), features.frechet.stderr)
