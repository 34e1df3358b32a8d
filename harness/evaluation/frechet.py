"""Fréchet distance between Gaussians fitted to features (Heusel et al. 2017)."""

from __future__ import annotations

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


def load_statistics(path: Path, dim: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean `(D,)` and covariance `(D, D)`, float64, from an `.npz` file with `mu` and `sigma`.

    `dim`: the D of the features that they are to be compared with. Any other content is a
    `UserError` that names the file.
    """
    import zipfile

    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as arrays:
            mu, sigma = arrays["mu"].astype("float64"), arrays["sigma"].astype("float64")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except KeyError:
        raise UserError(f"{path}: reference statistics hold mu and sigma") from None
    except (OSError, EOFError, ValueError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no .npz file of numbers ({error})") from None
    if mu.ndim != 1 or sigma.shape != 2 * mu.shape:
        raise UserError(
            f"{path}: mu {mu.shape} and sigma {sigma.shape} are no mean (D,) and covariance (D, D)"
        )
    if dim is not None and len(mu) != dim:
        raise UserError(f"{path}: statistics of {len(mu)} features; the extractor has {dim}")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError(f"{path}: mu and sigma must be finite")
    return torch.from_numpy(mu), torch.from_numpy(sigma)


def psd_root(covariance: Tensor) -> Tensor:
    """The symmetric root of a covariance `(D, D)`, which rounding may have made indefinite."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def frechet_distance(
    mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor, root1: Tensor | None = None
) -> float:
    """`‖m1 - m2‖² + tr(C1 + C2 - 2 (C1 C2)^½)`.

    The trace of the root is the sum of the roots of the eigenvalues of `C1^½ C2 C1^½`, which is
    symmetric: no matrix square root of a non-symmetric product, so nothing complex to discard.
    `root1`: `C1^½`, where one C1 is compared with many.
    """
    root = psd_root(cov1) if root1 is None else root1
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
