"""Nearest neighbours among samples. The matrix of all distances is computed a few rows at a time,
since that of 10,000 samples has 400 MB; precision, recall, density and coverage share the passes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

ROWS = 1024  # of a distance matrix at a time


def _distances(points: Tensor, others: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the points with their Euclidean distances to all others, `(<= ROWS, M)`."""
    for start in range(0, len(points), ROWS):
        rows = slice(start, start + ROWS)
        yield rows, torch.cdist(points[rows], others)


def neighbour_radii(points: Tensor, k: int) -> Tensor:
    """Distance of each point `(N, D)` to its k-th nearest neighbour, itself excluded: `(N,)`."""
    smallest = [d.topk(k + 1, dim=1, largest=False).values for _, d in _distances(points, points)]
    return torch.cat(smallest)[:, -1]


def nearest(points: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Distance of each point `(N, D)` to the nearest of the others `(M, D)`, and its index; both
    `(N,)`. The distance is recomputed from the difference: `torch.cdist` subtracts large squares,
    whose rounding hides exact copies."""
    index = torch.cat([d.argmin(dim=1) for _, d in _distances(points, others)])
    return (points - others[index]).norm(dim=1), index


class Neighbourhood(NamedTuple):
    """Overlap of the balls around generated samples `(N,)` and reference samples `(M,)`."""

    precise: Tensor  # whether a generated sample lies in a reference ball
    recalled: Tensor  # whether a reference sample lies in a generated ball
    balls: Tensor  # number of reference balls of the wide radius that contain a generated sample
    covered: Tensor  # whether the wide ball of a reference sample contains a generated one


def neighbourhood(
    features: Tensor, reference: Tensor, k: int, radii: Tensor, wide_radii: Tensor
) -> Neighbourhood:
    """Compare features `(N, D)` with the reference `(M, D)`. radii: of the reference's balls, to
    the k-th neighbour; wide_radii: those of density and coverage."""
    own = neighbour_radii(features, k)
    precise, balls = [], []
    recalled = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    nearest = torch.full_like(wide_radii, torch.inf)
    for rows, d in _distances(features, reference):
        precise.append((d <= radii).any(dim=1))
        balls.append((d <= wide_radii).sum(dim=1))
        recalled |= (d <= own[rows, None]).any(dim=0)
        nearest = torch.minimum(nearest, d.amin(dim=0))
    return Neighbourhood(torch.cat(precise), recalled, torch.cat(balls), nearest <= wide_radii)
