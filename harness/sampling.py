"""Sampling in blocks of fixed size, with noise that depends on (seed, index) alone.

All blocks have the same size, so that the same weights give the same bytes for image i in any call
and with any number of processes (on a GPU up to rounding, since cuDNN times its algorithms in each
process). Noise and labels are drawn on the host.
"""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from harness.denoiser import Condition, Denoiser, guided, map_condition, one_step, to_pixels
from harness.errors import UserError
from harness.schedules import heun_sigmas
from harness.streams import Stream

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
    sigmas, denoiser = sigmas.to(latents.device), guided(denoiser, guidance)

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
    orders = torch.stack([_order(stream.name, int(number), num_classes) for number in rounds])
    return orders.to(index.device)[row, index % num_classes]


@lru_cache(maxsize=4)
def _order(stream: str, number: int, num_classes: int) -> Tensor:
    """A random permutation of all classes or prompts; cached, since a round has many blocks."""
    uniform = Stream(stream).uniform(torch.tensor([number]), (num_classes,))
    return uniform[0].argsort(stable=True)


def noise_and_labels(index: Tensor, shape: tuple, num_classes: int, seed: int) -> tuple:
    """Latents `(B, *shape)` and labels `(B,)` (None without classes) of images `index`."""
    stream = Stream(seed, "evaluation")
    return stream.normal(index, shape), balanced_labels(index, num_classes, stream.child("label"))


def step_noise(index: Tensor, shape: tuple[int, ...], seed: int, device: str = "cpu") -> Noise:
    """The noise that a stochastic sampler adds to images `index` at each step."""
    stream = Stream(seed, "evaluation")
    return lambda step: stream.child(f"churn{step}").normal(index, shape).to(device)


def prefetch(make: Callable, items: list, device: str) -> Iterator:
    """Yield `make(item)` for each item. With a GPU a thread works one item ahead, so that the GPU
    does not wait for the host; on CPU this would take another job's core."""
    if device == "cpu" or len(items) < 2:
        yield from map(make, items)
        return
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(make, items[0])
        for item in items[1:]:
            current, following = following.result(), pool.submit(make, item)
            yield current
        yield following.result()


def one_step_generator(student: Denoiser, sigma_init: float) -> Generator:
    """A student's images from noise and condition."""
    return lambda z, condition, noise: one_step(student, z, condition, sigma_init)


def check_finite(images: Tensor) -> None:
    """Raise a `UserError` if generated images or latents contain NaN or infinity."""
    if bad := (~images.isfinite().flatten(1).all(dim=1)).sum().item():
        message = f"{bad} of {len(images)} generated images or latents contain NaN or infinity"
        remedy = "were the weights saved after float16 had overflowed?"
        raise UserError(f"{message}; {remedy}", "not-finite")


def pixels_of(generate: Generator, codec: nn.Module) -> Generator:
    """A generator of uint8 pixels on the host. A codec decodes a few images at a time, since it
    takes gigabytes of memory for each."""

    def decode(latents: Tensor) -> Tensor:
        images = codec(latents.float())
        check_finite(images)
        return to_pixels(images)

    def pixels(z: Tensor, condition: Condition, noise: Noise) -> Tensor:
        images = generate(z, condition, noise)
        check_finite(images)
        if isinstance(codec, nn.Identity):
            return to_pixels(images).cpu()
        parts = [decode(images[:1])]
        size = max(1, DECODED // parts[0][0, 0].numel())
        return torch.cat(parts + [decode(part) for part in images[1:].split(size)]).cpu()

    return pixels


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
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield images `start` .. count - 1 of `generate` block by block, with labels on the host.

    embeddings: map labels (numbers of prompts) to conditions. start: the end of an earlier block.
    group: `harness.training.distributed.Processes` that take turns at the blocks. All iterate; the
    first receives all blocks in order, the others none.
    """
    rank, size = (group.rank, group.size) if group else (0, 1)
    remaining = [torch.arange(i, i + block) for i in range(0, count, block) if i >= start]
    label_stream = Stream(seed, "evaluation").child("label")

    def draw(index: Tensor) -> tuple[Tensor, Tensor, Condition]:
        z, labels = noise_and_labels(index, shape, num_classes, seed)
        return index, z, embeddings(labels) if embeddings else labels

    inputs = prefetch(draw, remaining[rank::size], device)
    for first in range(0, len(remaining), size):
        turn, own = remaining[first : first + size], None
        if rank < len(turn):
            index, z, condition = next(inputs)
            condition = map_condition(lambda part: part.to(device), condition)
            own = generate(z.to(device), condition, step_noise(index, shape, seed, device))
        received = group.gather(own, len(turn)) if group else [own]
        for index, images in zip(turn, received, strict=False):
            index = index[index < count]  # the last block is padded
            yield images[: len(index)], balanced_labels(index, num_classes, label_stream)
