"""A check that an imported network denoises. With a preconditioning, schedule or labels that do not
belong to its weights, everything runs, but images are wrong.

The network must beat the best prediction that knows only the mean m and the standard deviation s of
the pixels, `m + s² / (s² + σ²) (x - m)`, whose mean squared error is `s² σ² / (s² + σ²)`. This also
is better than the noisy image itself (σ²) and than the mean (s²). A sample must have about the mean
and the standard deviation of the images.
"""

from pathlib import Path

import torch
from torch import Tensor

from harness.config.schema import Sampler
from harness.data.datasets import Dataset, first_images
from harness.data.registry import Images
from harness.denoiser import Condition, Denoiser, map_condition, to_model_space
from harness.sampling import heun
from harness.streams import Stream

LEVELS = (0.2, 1.0, 5.0)  # noise levels, if the network was trained at them
PIXELS = 16_384  # of the images in all: 16 images of 32 x 32 pixels, 4 of 64 x 64
MARGIN = 1.05  # pixels that are independent of each other are denoised no better than linearly
STEPS = 6  # of Heun's method, for one sample
LATENT_STD = 1.0  # of latents, which are scaled to it


@torch.no_grad()
def denoising_errors(
    denoiser: Denoiser, clean: Tensor, condition: Condition, sigma: float
) -> tuple[float, float]:
    """Mean squared error per element at a level of noise, for clean images `(B, C, H, W)`: of the
    denoiser, and of the best linear prediction from the same noisy images."""
    index = torch.arange(len(clean), device=clean.device)
    noise = Stream(0, "denoising check").normal(index, clean.shape[1:])
    noisy, levels = clean + sigma * noise, torch.full((len(clean),), sigma, device=clean.device)
    mean, variance = clean.mean(), clean.var(correction=0)
    linear = mean + variance / (variance + sigma**2) * (noisy - mean)
    predictions = denoiser(noisy, levels, condition), linear
    return tuple(float((x0 - clean).square().mean()) for x0 in predictions)


def image_warnings(denoiser: Denoiser, images: Images, device: str) -> tuple[list[str], tuple]:
    """Warnings about denoising some of these images, evenly spaced; and the mean and the standard
    deviation of their pixels in [-1, 1]."""
    shape = images.pixels.shape[1:]
    count = min(len(images), max(2, min(16, PIXELS // (shape[1] * shape[2]))))
    rows = torch.arange(count) * len(images) // count
    clean = to_model_space(images.pixels[rows]).to(device)
    mean, std = float(clean.mean()), float(clean.std(correction=0))
    condition = images.labels[rows].to(device) if denoiser.num_classes else None
    within = denoiser.within(torch.tensor(LEVELS, device=device)).tolist()
    # A clipped level is another one. Levels differ from themselves by rounding only.
    levels = [a for a, b in zip(LEVELS, within, strict=True) if abs(a - b) < 1e-3 * a]
    worse = []
    for sigma in levels:
        error, linear = denoising_errors(denoiser, clean, condition, sigma)
        if not error < MARGIN * linear:  # also for NaN
            worse.append(f"{error:.3g} at sigma {sigma:g} (linear: {linear:.3g})")
    warnings = []
    if worse:
        warnings.append(
            f"it denoises {count} real images no better than a linear function of the noisy image: "
            f"mean squared error {', '.join(worse)}; does its preconditioning fit its weights?"
        )
    return warnings, (mean, std)


@torch.no_grad()
def sample_warnings(
    denoiser: Denoiser, sampler: Sampler, mean: float, std: float, device: str
) -> list[str]:
    """Warnings about one sample of a few steps, whose pixels (or latents) should have about this
    mean and standard deviation."""
    index = torch.zeros(1, dtype=torch.long)
    z = Stream(0, "sample check").normal(index, denoiser.image_shape)
    condition = None
    if denoiser.num_classes:
        condition = torch.zeros(1, dtype=torch.long, device=device)
    elif denoiser.text_width:
        condition = denoiser.null_condition(1)
        condition = map_condition(lambda part: part.to(device), condition)
    levels = {"sigma_min": sampler.sigma_min, "sigma_max": sampler.sigma_max}
    x = heun(denoiser, z.to(device), condition, steps=min(STEPS, sampler.steps), **levels)
    found, spread = float(x.mean()), float(x.std())
    if abs(found - mean) < 2 * std and std / 4 < spread < 4 * std:
        return []
    return [
        f"a sample has mean {found:.3g} and standard deviation {spread:.3g}, but real images have "
        f"{mean:.3g} and {std:.3g}"
    ]


def check_denoiser(
    denoiser: Denoiser, sampler: Sampler, dataset: Dataset, folder: Path, device: str
) -> list[str]:
    """Warnings about an imported teacher, each in one line. folder: of the prepared data set.

    Latents of text-to-image pipelines are compared with unit variance, because encoders are not
    imported.
    """
    denoiser.to(device)
    warnings, (mean, std) = [], (0.0, LATENT_STD)
    if not denoiser.text_width:
        mean, std = 0.0, 0.5  # of natural images in [-1, 1]
        if len(images := first_images(folder)):
            warnings, (mean, std) = image_warnings(denoiser, images, device)
    try:
        warnings += sample_warnings(denoiser, sampler, mean, std, device)
    finally:
        denoiser.to("cpu")
    return warnings
