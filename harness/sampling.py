"""Sampling: fixed, padded blocks of indices, noise that depends on (seed, index) alone.

Every block has the same size whatever is asked for, so the same weights give the same bytes for
image i in any call, and in any number of processes. Noise and labels are drawn on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor, nn

from harness.denoiser import Condition, Denoiser, each_part, guided, one_step, to_pixels
from harness.errors import UserError
from harness.schedules import heun_sigmas
from harness.streams import Stream
from harness.teachers.text_embeddings import Embeddings
from harness.training.distributed import processes

BLOCK = 256  # images at a time; at 64 a small network spends a quarter of its time on overhead
DECODED = 1 << 20  # pixels at a time that a codec makes


# Step number -> standard normal noise of the images that are being sampled, `(B, C, H, W)`.
Noise = Callable[[int], Tensor]


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
    with classifier-free `guidance`.

    Deterministic (algorithm 1) with `s_churn` 0; else stochastic (algorithm 2), and `noise` gives
    what each step adds at levels from `s_min` to `s_max` (None: no bound).

    `latents`: standard normal `(B, C, H, W)`. The state is float64, the network float32.
    Returns float64 images in the model's space.
    """
    if s_churn and noise is None:
        raise ValueError("a sampler with s_churn needs noise")
    sigmas = heun_sigmas(steps, sigma_min, sigma_max, rho).to(latents.device)
    # The levels on the host: their comparisons must not wait for the device.
    levels = heun_sigmas(steps, sigma_min, sigma_max, rho).tolist()

    denoiser = guided(denoiser, guidance)

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


def balanced_labels(index: Tensor, num_classes: int, stream: Stream) -> Tensor:
    """Labels `(B,)` of images `index`: every `num_classes` consecutive images are a random order of
    all classes, so that no set of samples differs from another by its share of a class."""
    rounds, row = (index // num_classes).unique(return_inverse=True)
    orders = torch.stack([_order(stream.name, int(number), num_classes) for number in rounds])
    return orders.to(index.device)[row, index % num_classes]


@lru_cache(maxsize=4)
def _order(stream: str, number: int, num_classes: int) -> Tensor:
    """A random order of all classes, or of millions of prompts; it serves all blocks of a round."""
    uniform = Stream(stream).uniform(torch.tensor([number]), (num_classes,))
    return uniform[0].argsort(stable=True)


def noise_and_labels(
    index: Tensor, shape: tuple[int, ...], num_classes: int, seed: int, purpose: str = "evaluation"
) -> tuple[Tensor, Tensor | None]:
    """Latents `(B, *shape)` and labels `(B,)` (None without classes) of images `index`."""
    return Stream(seed, purpose).normal(index, shape), labels_of(index, num_classes, seed, purpose)


def labels_of(
    index: Tensor, num_classes: int, seed: int, purpose: str = "evaluation"
) -> Tensor | None:
    """Labels `(B,)` of images `index`; None without classes."""
    if not num_classes:
        return None
    return balanced_labels(index, num_classes, Stream(seed, purpose).child("label"))


def step_noise(
    index: Tensor, shape: tuple[int, ...], seed: int, purpose: str = "evaluation", device="cpu"
) -> Noise:
    """What a stochastic sampler adds to images `index` at each of its steps."""
    stream = Stream(seed, purpose)
    return lambda step: stream.child(f"churn{step}").normal(index, shape).to(device)


def blocks(count: int, block: int = BLOCK) -> Iterator[tuple[Tensor, int]]:
    """Index tensors of equal size that cover 0 .. count - 1, and how many of each are wanted."""
    for start in range(0, count, block):
        yield torch.arange(start, start + block), min(block, count - start)


def ahead(make: Callable, items: list, device: str) -> Iterator:
    """`make(item)` for each; beside a GPU one is made in a thread while the one before is used, so
    that the GPU does not wait for the host. (On CPU that would take another job's core.)"""
    if device == "cpu" or len(items) < 2:
        yield from map(make, items)
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(make, items[0])
        for item in items[1:]:
            made, following = following.result(), pool.submit(make, item)
            yield made
        yield following.result()


Generator = Callable[[Tensor, Condition, Noise], Tensor]


def one_step_generator(student: Denoiser, sigma_init: float) -> Generator:
    """z, condition -> images, for a student."""
    return lambda z, condition, noise: one_step(student, z, condition, sigma_init)


def heun_generator(denoiser: Denoiser, sampler: dict) -> Generator:
    """z, condition, noise -> images, by the sampler settings of a teacher."""
    return lambda z, condition, noise: heun(denoiser, z, condition, noise, **sampler)


def check_finite(images: Tensor, what: str = "images") -> None:
    """Refuse generated images, or latents, that are no numbers."""
    if bad := (~images.isfinite().flatten(1).all(dim=1)).sum().item():
        raise UserError(
            f"{bad} of {len(images)} generated {what} hold NaN or infinity; were the weights saved "
            "after float16 had overflowed?"
        )


def decode(codec: nn.Module, latents: Tensor) -> Tensor:
    """Latents -> uint8 pixels."""
    images = codec(latents.float())
    check_finite(images)
    return to_pixels(images)


def pixels_of(generate: Generator, codec: nn.Module) -> Generator:
    """z, condition, noise -> uint8 pixels on the host: quantised before anything sees them. A codec
    makes a few at a time, since it takes gigabytes for each."""
    plain = isinstance(codec, nn.Identity)

    def make(z: Tensor, condition: Condition, noise: Noise) -> Tensor:
        made = generate(z, condition, noise)
        check_finite(made, "images" if plain else "latents")
        if plain:
            return to_pixels(made).cpu()
        parts = [decode(codec, made[:1])]
        size = max(1, DECODED // parts[0][0, 0].numel())
        parts += [decode(codec, part) for part in made[1:].split(size)]
        return torch.cat(parts).cpu()

    return make


@torch.no_grad()
def sample(
    generate: Generator,
    count: int,
    shape: tuple[int, ...],
    num_classes: int,
    seed: int,
    device: str = "cpu",
    embeddings: Embeddings | None = None,
    block: int = BLOCK,
    start: int = 0,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Images `start` .. count - 1 block by block, as `generate` makes them, and labels on the host.

    `embeddings`: labels are the numbers of prompts, and these what they ask for. `start`: where
    another call's block ended. Processes take turns at the blocks. The first gets all of them in
    order; the others, who must go through this, too, get none.
    """
    group, todo = processes(), list(blocks(count, block))[-(-start // block) :]

    def draw(index: Tensor) -> tuple[Tensor, Tensor, Condition]:
        z, labels = noise_and_labels(index, shape, num_classes, seed)
        return index, z, embeddings(labels) if embeddings else labels

    mine = ahead(draw, [index for index, _ in todo[group.rank :: group.size]], device)
    for first in range(0, len(todo), group.size):
        turn, own = todo[first : first + group.size], None
        if group.rank < len(turn):
            index, z, asked = next(mine)
            condition = each_part(lambda part: part.to(device), asked)
            noise = step_noise(index, shape, seed, device=device)
            own = generate(z.to(device), condition, noise)
        for (index, wanted), images in zip(turn, group.gather(own, len(turn)), strict=False):
            yield images[:wanted], labels_of(index[:wanted], num_classes, seed)
