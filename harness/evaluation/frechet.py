"""Fréchet distance between Gaussians fitted to features (Heusel et al. 2017)."""

from __future__ import annotations

import torch
from torch import Tensor


def gaussian_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `(D,)` and covariance `(D, D)` (divided by N - 1) of features `(N, D)`, in float64."""
    features = features.double()
    mean = features.mean(dim=0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def _psd_root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """`‖m1 - m2‖² + tr(C1 + C2 - 2 (C1 C2)^½)`.

    The trace of the root is the sum of the roots of the eigenvalues of `C1^½ C2 C1^½`, which is
    symmetric: no matrix square root of a non-symmetric product, so nothing complex to discard.
    """
    root = _psd_root(cov1)
    values = torch.linalg.eigvalsh(root @ cov2 @ root)
    trace = torch.trace(cov1) + torch.trace(cov2) - 2 * values.clamp_min(0).sqrt().sum()
    return ((mean1 - mean2).square().sum() + trace).item()


class Moments:
    """Running sums of features, from which groups can be taken out again (for the jackknife)."""

    def __init__(self, count: int, total: Tensor, outer: Tensor):
        self.count, self.total, self.outer = count, total, outer

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        features = features.double()
        return cls(len(features), features.sum(dim=0), features.T @ features)

    def __sub__(self, other: Moments) -> Moments:
        return Moments(self.count - other.count, self.total - other.total, self.outer - other.outer)

    def statistics(self) -> tuple[Tensor, Tensor]:
        mean = self.total / self.count
        covariance = (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return mean, covariance
