"""Sampling in blocks of fixed size, with noise that depends on (seed, index) alone.

All blocks have the same size, so that the same weights give the same bytes for image i in any call
and with any number of processes (on a GPU up to rounding, since cuDNN times its algorithms in each
process). Noise is drawn on the device, labels on the host. While the host uses a block, a GPU
generates the next one.
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from harness.denoiser import Condition, Denoiser, guided, map_condition, one_step, to_pixels
from harness.errors import UserError
from harness.kernels import has_fused_pass
from harness.schedules import heun_sigmas
from harness.streams import Stream
from harness.transfers import HostCopy, ahead, to_device

BLOCK = 256  # images per block; at 64 a small network spends a quarter of its time on overhead
DECODED = 1 << 20  # pixels that a codec decodes at a time

# Step number -> standard normal noise for the images of a block, `(B, C, H, W)`.
Noise = Callable[[int], Tensor]
# Noise, condition and step noise of a block -> images or latents.
Generator = Callable[[Tensor, Condition, Noise], Tensor]


def heun(
    denoiser: Denoiser,
    latents: Tensor,
    condition=None,
    noise: Noise | None = None,
    *,
    steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float | None = None,
    s_noise: float = 1.0,
    guidance: float = 1.0,
) -> Tensor:
    """EDM's sampler (Karras et al. 2022): Heun's method, `2 steps - 1` evaluations, twice as many
    with classifier-free `guidance`. `latents`: standard normal `(B, C, H, W)`; result: float64.

    It is deterministic (algorithm 1) with `s_churn` 0, and stochastic (algorithm 2) otherwise:
    `noise` is then added at levels from `s_min` to `s_max` (None: no bound).
    """
    if s_churn and noise is None:
        raise ValueError("a sampler with s_churn needs noise")
    sigmas = heun_sigmas(steps, sigma_min, sigma_max, rho)
    levels = sigmas.tolist()  # on the host: comparisons must not wait for the device
    sigmas, denoiser = to_device(sigmas, latents.device), guided(denoiser, guidance)

    def slope(x: Tensor, sigma: Tensor) -> Tensor:
        return (x - denoiser(x.float(), sigma.float().expand(len(x)), condition).double()) / sigma

    x = latents.double() * sigmas[0]
    for step, (now, then) in enumerate(pairwise(sigmas)):
        if s_churn and s_min <= levels[step] and (s_max is None or levels[step] <= s_max):
            raised = now * (1 + min(s_churn / steps, math.sqrt(2) - 1))
            x = x + (raised**2 - now**2).sqrt() * s_noise * noise(step).double()
            now = raised
        first = slope(x, now)
        following = x + (then - now) * first
        if step + 1 < steps:  # the last step, to 0, is Euler's
            following = x + (then - now) * (first + slope(following, then)) / 2
        x = following
    return x


def balanced_labels(index: Tensor, num_classes: int, stream: Stream) -> Tensor | None:
    """Labels `(B,)` of images `index` (None without classes): `num_classes` consecutive images are
    a random permutation of all classes, so that sets of samples have equal class frequencies."""
    if not num_classes:
        return None
    rounds, row = (index // num_classes).unique(return_inverse=True)
    orders = _orders(stream.name, tuple(rounds.tolist()), num_classes)
    return orders.to(index.device)[row, index % num_classes]


@lru_cache(maxsize=4)
def _orders(stream: str, rounds: tuple[int, ...], num_classes: int) -> Tensor:
    """A random permutation of all classes or prompts for each round, `(rounds, num_classes)`;
    cached, since a round of prompts has many blocks."""
    return Stream(stream).uniform(torch.tensor(rounds), (num_classes,)).argsort(dim=1, stable=True)


def noise_and_labels(
    index: Tensor, shape: tuple[int, ...], num_classes: int, seed: int, device: str = "cpu"
) -> tuple[Tensor, Tensor | None]:
    """Latents `(B, *shape)` on a device and labels `(B,)` on the host (None without classes) of
    images `index`, on the host."""
    stream = Stream(seed, "evaluation")
    labels = balanced_labels(index, num_classes, stream.child("label"))
    return stream.normal(to_device(index, device), shape), labels


def step_noise(index: Tensor, shape: tuple[int, ...], seed: int) -> Noise:
    """The noise that a stochastic sampler adds to images `index` at each step, on their device."""
    stream = Stream(seed, "evaluation")
    return lambda step: stream.child(f"churn{step}").normal(index, shape)


def one_step_generator(student: Denoiser, sigma_init: float) -> Generator:
    """A student's images from noise and condition."""
    return lambda z, condition, noise: one_step(student, z, condition, sigma_init)


def placed_for_sampling(denoiser: Denoiser, precision: str) -> Denoiser:
    """The denoiser with its weights in the memory layout in which it samples fastest on its device:
    channels_last for a fused pass in bf16 on a GPU, contiguous otherwise."""
    on_gpu = next(denoiser.parameters()).is_cuda
    if precision == "bf16" and on_gpu and has_fused_pass(denoiser):
        denoiser.to(memory_format=torch.channels_last)
    return denoiser


def sampling_autocast(device: str, precision: str) -> torch.autocast:
    """The context in which networks sample. The sampler itself computes in float64 in any case."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=precision == "bf16")


def not_finite(images: Tensor) -> Tensor:
    """How many images or latents contain NaN or infinity, int64 `()`, on their device."""
    return (~images.isfinite().flatten(1).all(dim=1)).sum()


class Delivery:
    """A generated block on its way to the host. bad: how many of its images are not finite. Both
    are read by `wait` alone, so that the host does not wait for the device before."""

    def __init__(self, images: Tensor, bad: Tensor):
        self._copy = HostCopy(images, bad)

    def wait(self) -> Tensor:
        """The images on the host; a `UserError` if some contain NaN or infinity."""
        images, bad = self._copy.wait()
        if bad:
            message = f"{bad} of {len(images)} generated images or latents contain NaN or infinity"
            remedy = "were the weights saved after float16 had overflowed?"
            raise UserError(f"{message}; {remedy}", "not-finite")
        return images


def decode(codec: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 pixels of images or latents, and how many of either are not finite. A codec decodes a
    few images at a time, since it takes gigabytes of memory for each."""
    bad = not_finite(images)
    if isinstance(codec, nn.Identity):
        return to_pixels(images), bad
    pixels, counts, part = [], [], images[:1]
    while len(part):
        decoded = codec(part.float())
        pixels.append(to_pixels(decoded))
        counts.append(not_finite(decoded))
        size = max(1, DECODED // decoded[0, 0].numel())
        start = sum(map(len, pixels))
        part = images[start : start + size]
    return torch.cat(pixels), torch.maximum(bad, torch.stack(counts).sum())


@torch.no_grad()
def sample(
    generate: Generator,
    count: int,
    shape: tuple[int, ...],
    num_classes: int,
    seed: int,
    device: str = "cpu",
    embeddings: Callable[[Tensor], Condition] | None = None,
    block: int = BLOCK,
    start: int = 0,
    group: Any = None,
    codec: nn.Module | None = None,
    precision: str = "fp32",
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield images `start` .. count - 1 of `generate` block by block, with labels, on the host.

    embeddings: map labels (numbers of prompts) to conditions. start: the end of an earlier block.
    group: `harness.training.distributed.Processes` that take turns at the blocks. All iterate; the
    first receives all blocks in order, the others none. codec: yield uint8 pixels, decoded by it.
    precision: fp32, or bf16 for the generating networks; codecs compute in float32. Raises a
    `UserError` if images contain NaN or infinity.
    """
    rank, size = (group.rank, group.size) if group else (0, 1)
    remaining = [torch.arange(i, i + block) for i in range(0, count, block) if i >= start]
    label_stream = Stream(seed, "evaluation").child("label")

    def launch(index: Tensor) -> Delivery:
        z, labels = noise_and_labels(index, shape, num_classes, seed, device)
        condition = embeddings(labels) if embeddings else labels
        condition = map_condition(partial(to_device, device=device), condition)
        noise = step_noise(to_device(index, device), shape, seed)
        with sampling_autocast(device, precision):
            images = generate(z, condition, noise)
        decoded = decode(codec, images) if codec is not None else (images, not_finite(images))
        return Delivery(*decoded)

    launched = ahead(launch, remaining[rank::size], device)
    for first in range(0, len(remaining), size):
        turn, own = remaining[first : first + size], None
        if rank < len(turn):
            own = next(launched).wait()
        received = group.gather(own, len(turn)) if group else [own]
        for index, images in zip(turn, received, strict=False):
            index = index[index < count]  # the last block is padded
            yield images[: len(index)], balanced_labels(index, num_classes, label_stream)
