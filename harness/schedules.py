"""Noise levels: grids of samplers, and distributions and weights of losses."""

import torch
from torch import Tensor

SIGMA_MIN, SIGMA_MAX, RHO = 0.002, 80.0, 7.0


def karras_sigma(
    u: Tensor, sigma_min: float = SIGMA_MIN, sigma_max: float = SIGMA_MAX, rho: float = RHO
) -> Tensor:
    """Karras et al. 2022, eq. 5, increasing: u = 0 gives sigma_min, u = 1 gives sigma_max."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return (low + u * (high - low)) ** rho


def heun_sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """float64 `(num_steps + 1,)`: the sampler's levels from sigma_max down to sigma_min, then 0."""
    u = torch.linspace(1, 0, num_steps, dtype=torch.float64)
    sigmas = karras_sigma(u, sigma_min, sigma_max, rho)
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def lognormal_sigma(normal: Tensor, mean: float = -1.2, std: float = 1.2) -> Tensor:
    """EDM's training distribution (Karras et al. 2022, table 1) of standard normal numbers."""
    return (normal * std + mean).exp()


def edm_weight(sigma: Tensor, sigma_data: float) -> Tensor:
    """λ(σ) = (σ² + σ_data²) / (σ σ_data)² = SNR + 1/σ_data² (Karras et al. 2022, table 1)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
