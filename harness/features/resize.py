"""Resizes of 8-bit images, with the same bits on every device."""

import logging
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import joblib
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from harness.transfers import is_gpu, to_device

logger = logging.getLogger(__name__)

CHUNK = 64  # images that a GPU resizes at a time, in float64


def bicubic(pixels: Tensor, size: int, device: torch.device) -> Tensor:
    """Images uint8 `(B, C, H, W)` at `size x size` on a device: PyTorch's `interpolate` with
    antialiasing, which equals PIL's bicubic resize up to about one level."""
    shape = pixels.shape[2:]
    if shape == (size, size):
        return to_device(pixels, device)
    if is_gpu(device) and _same_bits(*shape, size, device):
        parts = to_device(pixels, device).split(CHUNK)
        return torch.cat([fixed_point_bicubic(part, size) for part in parts])
    x = interpolate(pixels.cpu(), (size, size), mode="bicubic", antialias=True)
    return to_device(x, device)


def fixed_point_bicubic(pixels: Tensor, size: int) -> Tensor:
    """The resize of `interpolate` for uint8 on CPU, as matrix products on any device. The rows are
    resized first, then the columns, each with integer weights and rounded to 8 bits (as in Pillow).
    Sums of integers are exact in float64.
    """
    x = pixels.double()
    if pixels.shape[3] != size:
        weights, unit = _weights(pixels.shape[3], size, pixels.device)
        x = _rounded(x @ weights.T, unit)
    if pixels.shape[2] != size:
        weights, unit = _weights(pixels.shape[2], size, pixels.device)
        x = _rounded(weights @ x, unit)
    return x.to(torch.uint8)


def _rounded(total: Tensor, unit: int) -> Tensor:
    return ((total + unit // 2) / unit).floor_().clamp_(0, 255)


def _cubic(x: float, a: float = -0.5) -> float:
    """Keys' cubic convolution kernel (1981)."""
    x = abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a if x < 2 else 0.0


@cache
def _weights(source: int, target: int, device: torch.device) -> tuple[Tensor, int]:
    """Integer weights `(target, source)`, in float64, and the integer that represents 1: the
    largest power of two with which they fit into 16 bits."""
    scale = source / target
    stretch = max(scale, 1.0)  # antialiasing widens the kernel
    support, weights = 2 * stretch, torch.zeros(target, source, dtype=torch.float64)
    for i in range(target):
        center = scale * (i + 0.5)
        first = max(int(center - support + 0.5), 0)
        last = min(int(center + support + 0.5), source)
        row = [_cubic((j - center + 0.5) / stretch) for j in range(first, last)]
        weights[i, first:last] = torch.tensor(row, dtype=torch.float64) / math.fsum(row)
    unit, most = 1, weights.max().item()
    while int(0.5 + most * 2 * unit) < 1 << 15:
        unit *= 2
    # Halves are rounded away from zero.
    weights = (weights.abs() * unit + 0.5).floor() * weights.sign()
    return weights.to(device), unit


@cache
def _same_bits(height: int, width: int, size: int, device: torch.device) -> bool:
    """Whether a device resizes as the CPU does; checked once for each size, on noise."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (4, 3, height, width), dtype=torch.uint8, generator=generator)
    pixels[2:] = pixels[2:] // 128 * 255  # extremes overshoot
    expected = interpolate(pixels, (size, size), mode="bicubic", antialias=True)
    same = torch.equal(fixed_point_bicubic(pixels.to(device), size).cpu(), expected)
    if not same:
        message = "%s resizes from %d x %d to %d with other bits; the host resizes instead"
        logger.warning(message, device, height, width, size)
    return same


def in_threads(
    function: Callable[[Any], Any], images: Iterable[Any], device: torch.device
) -> list[Any]:
    """`function` of each image, in order, in threads: with a GPU as many as there are cores,
    otherwise as many as PyTorch uses. For functions that release Python's lock, as PIL's resizes
    do."""
    threads = joblib.cpu_count() if is_gpu(device) else torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(function, images))
