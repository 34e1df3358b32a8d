"""Distances between samples: what the metrics of neighbours need of all pairs, in two passes.

A pass takes the matrix of distances a few rows at a time and keeps vectors, so that 10,000 samples
need no 400 MB, and precision, recall, density, coverage and memorisation share its cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

ROWS = 1024  # of a matrix of distances at a time


def _distances(points: Tensor, others: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows `(<= ROWS, M)` of the matrix of Euclidean distances, and which rows they are."""
    for start in range(0, len(points), ROWS):
        rows = slice(start, start + ROWS)
        yield rows, torch.cdist(points[rows], others)


def neighbour_radii(points: Tensor, k: int) -> Tensor:
    """Distance of each point `(N, D)` to its k-th neighbour, itself not counted: `(N,)`."""
    smallest = [d.topk(k + 1, dim=1, largest=False).values for _, d in _distances(points, points)]
    return torch.cat(smallest)[:, -1]


def nearest(points: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Distance of each point `(N, D)` to the nearest of the others `(M, D)`, `(N,)`, and which one
    that is, `(N,)`.

    The distance is taken again from the difference of the two: in `torch.cdist` that of a copy is
    what rounding leaves of two large squares, and copies are what this looks for.
    """
    index = torch.cat([d.argmin(dim=1) for _, d in _distances(points, others)])
    return (points - others[index]).norm(dim=1), index


@dataclass(frozen=True)
class Neighbourhood:
    """Generated samples `(N,)` and reference samples `(M,)` as each other's neighbours.

    `precise`: which generated samples lie in some ball of the reference; `recalled`: which
    reference samples lie in some ball of the generated ones; `balls`: how many balls of the
    reference (of `wide` neighbours) hold each generated sample; `covered`: which of these balls
    hold some.
    """

    precise: Tensor
    recalled: Tensor
    balls: Tensor
    covered: Tensor


def neighbourhood(
    features: Tensor, reference: Tensor, k: int, radii: Tensor, wide_radii: Tensor
) -> Neighbourhood:
    """`radii`: of the reference's balls, to the k-th neighbour; `wide_radii`: to another's."""
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
