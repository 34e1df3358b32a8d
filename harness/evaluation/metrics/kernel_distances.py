"""Kernel distances: squared maximum mean discrepancies on all samples, without bias."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from harness.evaluation.feature_set import GROUPS, Estimate, FeatureSet, jackknife
from harness.evaluation.references import PAIRWISE_LIMIT
from harness.evaluation.registry import register

SIGMA = 10.0  # bandwidth of the Gaussian kernel (Jayasumana et al. 2024)

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
        block = k[:, start : start + len(group)].fill_diagonal_(0)
        totals.append(k.sum())
        own.append(block.sum())
        start += len(group)
    return torch.stack(totals), torch.stack(own)


def _mean_within(kernel: Kernel, x: Tensor) -> Tensor:
    """Mean kernel value over pairs of distinct samples."""
    return _group_sums(kernel, x)[0].sum() / (len(x) * (len(x) - 1))


def _squared_mmd(x: Tensor, y: Tensor, kernel: Kernel, within_y: Tensor) -> Estimate:
    """Unbiased squared maximum mean discrepancy, times 1000 (Gretton et al. 2012, eq. 3), of
    float64 `x` `(N, D)` and `y` `(M, D)`. within_y: the mean kernel value in y."""
    groups, m = x.chunk(GROUPS), len(y)
    totals, own = _group_sums(kernel, x)
    cross = torch.stack([kernel(group, y).sum() for group in groups])

    def estimate(total_xx: Tensor, total_xy: Tensor, count: int) -> float:
        within_x = total_xx / (count * (count - 1))
        return 1000 * (within_x + within_y - 2 * total_xy / (count * m)).item()

    value = estimate(totals.sum(), cross.sum(), len(x))
    without = tuple(
        estimate(totals.sum() - 2 * t + o, cross.sum() - c, len(x) - len(group))
        for t, o, c, group in zip(totals, own, cross, groups, strict=True)
    )
    return Estimate(value, jackknife(without), without)


_register = partial(
    register,
    higher_is_better=False,
    needs=("reference.features",),
    limit=PAIRWISE_LIMIT,
    estimate="unbiased",
    scale=1000,
)


@_register("kd", "Kernel distance", kernel="(x·y/D + 1)³")
def kernel_distance(features: FeatureSet) -> Estimate:
    """Bińkowski et al. 2018, on features standardised by the reference: on raw features a few large
    coordinates dominate the cube, and the estimate is noise."""
    reference = features.reference
    y = reference.cached("standardised", lambda: reference.standardise(reference.features))
    within = reference.cached("cubic kernel", lambda: _mean_within(_cubic, y))
    return _squared_mmd(reference.standardise(features.features), y, _cubic, within)


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
    reference = features.reference
    x, y = (normalize(t.double(), dim=1) for t in (features.features, reference.features))
    within = reference.cached("Gaussian kernel", lambda: _mean_within(_gaussian, y))
    return _squared_mmd(x, y, _gaussian, within)
