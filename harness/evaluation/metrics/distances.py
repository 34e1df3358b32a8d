"""Distances of distributions: Fréchet distances, and kernel distances without bias."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from harness.evaluation.feature_set import GROUPS, Estimate, FeatureSet, jackknife
from harness.evaluation.references import PAIRWISE_LIMIT, Reference
from harness.evaluation.registry import FRECHET, register
from harness.streams import Stream

SIZES = 10  # of sample sets that the Fréchet distance is extrapolated from
SIGMA = 10.0  # bandwidth of the Gaussian kernel (Jayasumana et al. 2024)

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


# -- kernel distances ------------------------------------------------------------------------------

Kernel = Callable[[Tensor, Tensor], Tensor]


def _cubic(a: Tensor, b: Tensor) -> Tensor:
    """`(x·y / D + 1)³` of all pairs."""
    return (a @ b.T).div_(a.shape[1]).add_(1).pow_(3)


def _gaussian(a: Tensor, b: Tensor) -> Tensor:
    """`exp(-‖x - y‖² / 2σ²)` of all pairs of unit vectors."""
    return (a @ b.T).sub_(1).div_(SIGMA**2).exp_()


def _group_sums(kernel: Kernel, x: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of kernel values over pairs of distinct samples, both `(GROUPS,)`: of each group with
    all samples, and of each group with itself. Only one group's rows are in memory at a time."""
    totals, own, start = [], [], 0
    for group in x.chunk(GROUPS):
        k = kernel(group, x)
        own.append(k[:, start : start + len(group)].fill_diagonal_(0).sum())
        totals.append(k.sum())
        start += len(group)
    return torch.stack(totals), torch.stack(own)


def _squared_mmd(kernel: Kernel, x: Tensor, y: Tensor, reference: Reference) -> Estimate:
    """Unbiased squared maximum mean discrepancy, times 1000 (Gretton et al. 2012, eq. 3), of
    float64 `x` `(N, D)` and the reference's `y` `(M, D)`."""
    m = len(y)
    within_y = reference.cached(
        kernel.__name__, lambda: _group_sums(kernel, y)[0].sum() / (m * (m - 1))
    )

    def estimate(total_xx: Tensor, total_xy: Tensor, count: int) -> float:
        within_x = total_xx / (count * (count - 1))
        return 1000 * (within_x + within_y - 2 * total_xy / (count * m)).item()

    groups, (totals, own) = x.chunk(GROUPS), _group_sums(kernel, x)
    cross = torch.stack([kernel(group, y).sum() for group in groups])
    without = tuple(
        estimate(totals.sum() - 2 * t + o, cross.sum() - c, len(x) - len(group))
        for t, o, c, group in zip(totals, own, cross, groups, strict=True)
    )
    return Estimate(estimate(totals.sum(), cross.sum(), len(x)), jackknife(without), without)


_settings = {"limit": PAIRWISE_LIMIT, "estimate": "unbiased", "scale": 1000}
_register = partial(register, higher_is_better=False, needs=("reference.features",), **_settings)


@_register("kd", "Kernel distance", kernel="(x·y/D + 1)³")
def kernel_distance(features: FeatureSet) -> Estimate:
    """Bińkowski et al. 2018, on features standardised by the reference: on raw features a few large
    coordinates dominate the cube, and the estimate is noise."""
    reference = features.reference
    y = reference.cached("standardised", lambda: reference.standardise(reference.features))
    return _squared_mmd(_cubic, reference.standardise(features.features), y, reference)


@_register(
    "cmmd",
    "CLIP maximum mean discrepancy",
    requires=("image-text",),
    final_only=True,
    kernel="exp(-‖x - y‖²/2σ²) on embeddings of length 1",
    sigma=SIGMA,
)
def cmmd(features: FeatureSet) -> Estimate:
    """Jayasumana et al. 2024."""
    x, y = (normalize(s.features.double(), dim=1) for s in (features, features.reference))
    return _squared_mmd(_gaussian, x, y, features.reference)
