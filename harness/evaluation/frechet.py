"""Fréchet distance between Gaussians fitted to features (Heusel et al. 2017)."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable
from functools import reduce
from operator import add
from pathlib import Path

import torch
from torch import Tensor

from harness.errors import UserError

BLOCK = 8192  # rows whose sums are taken at once, in float64: 128 MB of Inception's features


def gaussian_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean `(D,)` and covariance `(D, D)` (divided by N - 1) of features `(N, D)`, in float64."""
    features = features.double()
    mean = features.mean(dim=0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


# What numpy and zipfile raise at files that are damaged or of another kind.
UNREADABLE = (
    *(OSError, EOFError, ValueError, RuntimeError, MemoryError),
    *(zlib.error, zipfile.BadZipFile),
)


def load_statistics(path: Path, dim: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean `(D,)` and covariance `(D, D)`, float64, from an `.npz` file with `mu` and `sigma`: the
    form in which reference statistics are published.

    `dim`: the number of features of the extractor that they are to be compared with. A file that
    does not hold such numbers, or those of another D, is a `UserError` that names it.
    """
    import numpy as np

    arrays = {}
    try:
        with open(path, "rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("one array alone")
            for key in ("mu", "sigma"):
                if key not in archive:
                    raise UserError(f"{path}: no {key!r}; reference statistics hold mu and sigma")
                arrays[key] = archive[key]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except UNREADABLE as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} is no .npz file of numbers ({reason})") from None
    mu, sigma = arrays["mu"], arrays["sigma"]
    if mu.ndim != 1 or not len(mu) or sigma.shape != 2 * mu.shape:
        raise UserError(
            f"{path}: mu {mu.shape} and sigma {sigma.shape} are no mean (D,) and covariance (D, D)"
        )
    if dim is not None and len(mu) != dim:
        raise UserError(f"{path}: statistics of {len(mu)} features; the extractor has {dim}")
    for key, array in arrays.items():
        if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
            raise UserError(f"{path}: {key} holds what is no finite number")
    mean, covariance = (torch.from_numpy(a.astype(np.float64)) for a in (mu, sigma))
    # Sums in single precision leave some asymmetry; the wrong matrix leaves far more.
    if (covariance - covariance.T).abs().max() > 1e-5 * covariance.abs().max():
        raise UserError(f"{path}: sigma is not symmetric, so it is no covariance")
    # The same rounding may leave eigenvalues a little below 0. Whether any lies further below is
    # what Cholesky's factors tell in 2 % of the time of eigenvalues.
    rounding = 1e-5 * covariance.diagonal().abs().sum() + torch.finfo(torch.float64).tiny
    lifted = covariance + rounding * torch.eye(len(mean), dtype=torch.float64)
    if torch.linalg.cholesky_ex(lifted).info:
        raise UserError(f"{path}: sigma has negative eigenvalues, so it is no covariance")
    return mean, covariance


def factor(covariance: Tensor) -> Tensor:
    """Some F `(D, r)` with F Fᵀ = C, for a covariance C `(D, D)` of rank r, in float64.

    Cholesky's where C is positive definite: 2 % of the work of eigenvectors. Else (fewer samples
    than dimensions, dead features) from the eigenvectors whose values are more than rounding.
    """
    lower, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        return lower
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


def _distance(mean1: Tensor, factor1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    values = torch.linalg.eigvalsh(factor1.T @ cov2 @ factor1)
    trace = factor1.square().sum() + torch.trace(cov2) - 2 * values.clamp_min(0).sqrt().sum()
    return ((mean1 - mean2).square().sum() + trace).item()


def frechet_distance(
    mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor, factor1: Tensor | None = None
) -> float:
    """`‖m1 - m2‖² + tr(C1 + C2 - 2 (C1 C2)^½)`.

    With C1 = F Fᵀ, the eigenvalues of C1 C2 that are not 0 are those of Fᵀ C2 F, which is
    symmetric, and the trace of the root is the sum of their roots: no matrix square root of a
    non-symmetric product, so nothing complex to discard, and no eigenvectors.
    `factor1`: F, where one C1 is compared with many.
    """
    return _distance(mean1, factor(cov1) if factor1 is None else factor1, mean2, cov2)


def frechet_of_few(features: Tensor, mean: Tensor, covariance: Tensor) -> float:
    """The distance of features `(N, D)`, N <= D, from a Gaussian: they are a factor of their own
    covariance, and the eigenvalues are those of an N x N matrix."""
    features = features.double()
    centred = features - features.mean(dim=0)
    own = centred.T / (len(features) - 1) ** 0.5
    return _distance(features.mean(dim=0), own, mean, covariance)


class Moments:
    """Running sums of features, from which groups can be taken out again (for the jackknife)."""

    def __init__(self, count: int, total: Tensor, outer: Tensor):
        self.count, self.total, self.outer = count, total, outer

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        features = features.double()
        return cls(len(features), features.sum(dim=0), features.T @ features)

    @classmethod
    def over(cls, blocks: Iterable[Tensor]) -> Moments:
        """The sums over a stream of features, of which one block at a time is in float64."""
        return reduce(add, map(cls.of, blocks))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.count + other.count, self.total + other.total, self.outer + other.outer)

    def __sub__(self, other: Moments) -> Moments:
        return Moments(self.count - other.count, self.total - other.total, self.outer - other.outer)

    def statistics(self) -> tuple[Tensor, Tensor]:
        mean = self.total / self.count
        covariance = (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return mean, covariance
