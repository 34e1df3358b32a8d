"""Fréchet distance between Gaussians fitted to features (Heusel et al. 2017)."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path

import torch
from torch import Tensor

from harness.errors import UserError

BLOCK = 8192  # rows converted to float64 at a time: 128 MB of Inception's features


def gaussian_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `(D,)` and covariance `(D, D)` (divided by N - 1) of features `(N, D)`, in float64."""
    features = features.double()
    mean = features.mean(dim=0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def load_statistics(path: Path, dim: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean `(D,)` and covariance `(D, D)`, float64, from an `.npz` file with `mu` and `sigma`, the
    usual format of published reference statistics. dim: the extractor's number of features."""
    import numpy as np

    path, names = Path(path), []
    if not path.exists():
        raise UserError(f"{path} does not exist", "missing-file")
    try:
        if not zipfile.is_zipfile(path):  # numpy would recommend to unpickle it
            raise ValueError("save them with numpy.savez(path, mu=mu, sigma=sigma)")
        with np.load(path, allow_pickle=False) as archive:
            names = archive.files
            mu, sigma = archive["mu"], archive["sigma"]
    except Exception as error:  # a foreign file may fail in any way
        reason = (str(error) or repr(error)).splitlines()[0]
        if isinstance(error, KeyError):
            reason = f"it contains {', '.join(names)}"
        elif "pickle" in reason:
            reason = "it contains Python objects"
        message = f"{path} is not an .npz file with mu and sigma ({reason})"
        raise UserError(message, "damaged") from None
    if mu.ndim != 1 or not len(mu) or sigma.shape != 2 * mu.shape or dim not in (None, len(mu)):
        expected = f"expected mu (D,) and sigma (D, D), D = {dim or 'any'}"
        raise UserError(f"{path}: {expected}; got {mu.shape} and {sigma.shape}", "shape")
    for key, array in (("mu", mu), ("sigma", sigma)):
        if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
            raise UserError(f"{path}: {key} contains NaN or infinity", "not-finite")
    mean, covariance = (torch.from_numpy(a.astype(np.float64)) for a in (mu, sigma))
    # Sums in single precision leave some asymmetry and slightly negative eigenvalues; a wrong
    # matrix has far more. Cholesky's factors reveal lower eigenvalues.
    if (covariance - covariance.T).abs().max() > 1e-5 * covariance.abs().max():
        raise UserError(f"{path}: sigma is not symmetric", "not-a-covariance")
    rounding = 1e-5 * covariance.diagonal().abs().sum() + torch.finfo(torch.float64).tiny
    lifted = covariance + rounding * torch.eye(len(mean), dtype=torch.float64)
    if torch.linalg.cholesky_ex(lifted).info:
        raise UserError(f"{path}: sigma has negative eigenvalues", "not-a-covariance")
    return mean, covariance


def factor(covariance: Tensor) -> Tensor:
    """F `(D, r)` with F Fᵀ = C, for a covariance C `(D, D)` of rank r, in float64.

    Cholesky's if C is positive definite, at 2 % of the cost of eigenvectors; otherwise (fewer
    samples than dimensions, dead features) from the eigenvectors with nonzero eigenvalues.
    """
    lower, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        return lower
    values, vectors = torch.linalg.eigh(covariance)
    nonzero = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, nonzero] * values[nonzero].sqrt()


def distance_of_factor(mean1: Tensor, factor1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """`frechet_distance`, given F of C1: to compare one C1 with many."""
    values = torch.linalg.eigvalsh(factor1.T @ cov2 @ factor1)
    trace = factor1.square().sum() + torch.trace(cov2) - 2 * values.clamp_min(0).sqrt().sum()
    return ((mean1 - mean2).square().sum() + trace).item()


def frechet_distance(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """`‖m1 - m2‖² + tr(C1 + C2 - 2 (C1 C2)^½)`.

    With C1 = F Fᵀ, the nonzero eigenvalues of C1 C2 are those of the symmetric Fᵀ C2 F, and the
    trace of the square root is the sum of their roots. This needs neither the matrix square root of
    a non-symmetric product (and its complex rounding errors) nor eigenvectors.
    """
    return distance_of_factor(mean1, factor(cov1), mean2, cov2)


def frechet_of_few(features: Tensor, mean: Tensor, covariance: Tensor) -> float:
    """Distance of features `(N, D)`, N <= D, from a Gaussian. The centred features are a factor of
    their covariance, so the eigenvalues are those of an N x N matrix."""
    features = features.double()
    own = (features - features.mean(dim=0)).T / (len(features) - 1) ** 0.5
    return distance_of_factor(features.mean(dim=0), own, mean, covariance)


@dataclass(frozen=True)
class Moments:
    """Sums of features and of their products; subtract those of a group for the jackknife."""

    count: int
    total: Tensor
    outer: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        features = features.double()
        return cls(len(features), features.sum(dim=0), features.T @ features)

    @classmethod
    def over(cls, blocks: Iterable[Tensor]) -> Moments:
        """Sums over blocks, of which one at a time is in float64."""
        return reduce(add, map(cls.of, blocks))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    def __sub__(self, other: Moments) -> Moments:
        return Moments(self.count - other.count, self.total - other.total, self.outer - other.outer)

    def statistics(self) -> tuple[Tensor, Tensor]:
        mean = self.total / self.count
        covariance = (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return mean, covariance
