"""Values with standard errors: jackknife, means, medians, averages over subsets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

GROUPS = 10  # of the delete-a-group jackknife: consecutive samples


class Estimate(NamedTuple):
    """A value and its standard error over the draw of samples (NaN where unknown).

    `leave_out[g]` is the value without the samples of group g. The group of a sample depends on its
    position only, so two generators with the same noise can be compared group by group
    (`harness.reporting.intervals`).
    """

    value: float
    stderr: float = math.nan
    leave_out: tuple[float, ...] = ()


def jackknife(estimates: Sequence[float]) -> float:
    """Standard error from estimates that each leave out one of the groups."""
    t = torch.tensor(estimates, dtype=torch.float64)
    return math.sqrt((len(t) - 1) * t.var(correction=0).item())


def without_each_group(x: Tensor, function: Callable[[Tensor], float]) -> tuple[float, ...]:
    """`function` of the rows of x without each of the groups."""
    groups = x.chunk(GROUPS)
    return tuple(function(torch.cat([*groups[:i], *groups[i + 1 :]])) for i in range(len(groups)))


def mean_estimate(values: Tensor) -> Estimate:
    """Mean of per-image values `(N,)`."""
    values = values.double()
    left = [(values.sum() - g.sum()) / (len(values) - len(g)) for g in values.chunk(GROUPS)]
    error = (values.std() / math.sqrt(len(values))).item()
    return Estimate(values.mean().item(), error, tuple(x.item() for x in left))


def median_estimate(values: Tensor) -> Estimate:
    """Median, with half the distance between the order statistics one standard error around it."""
    ordered, n = values.double().sort().values, len(values)
    low, high = (round((n - 1) / 2 + sign * math.sqrt(n) / 2) for sign in (-1, 1))
    error = (ordered[min(high, n - 1)] - ordered[max(low, 0)]).item() / 2
    return Estimate(ordered.quantile(0.5).item(), error)


def mean_over_subsets(estimates: Sequence[Estimate]) -> Estimate:
    """Average over disjoint subsets, with the standard error from their spread.

    A single subset keeps its own error. At the held-out size a single subset would be as noisy as
    the floor that it is compared with. The subsets are the groups of `leave_out`.
    """
    if len(estimates) == 1:
        return estimates[0]
    t = torch.tensor([e.value for e in estimates], dtype=torch.float64)
    left = (t.sum() - t) / (len(t) - 1)
    return Estimate(t.mean().item(), (t.std() / len(t) ** 0.5).item(), tuple(left.tolist()))
