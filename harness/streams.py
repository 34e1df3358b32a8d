"""Counter-based random numbers: a value depends on its position, not on when it is drawn.

A `Stream` is named by a seed and a path (such as evaluation, noise). Number k of sample i is
Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") of the counter
(k, i), with a key hashed from the name. Numbers therefore do not depend on batch size, order,
number of processes or interruptions, and there is no generator state to save.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from harness.kernels import agrees, kernels, usable

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]):
    """Ten rounds of Philox-4x32 on four int64 tensors of 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # 32x32-bit products fill 64 bits; int64 wraps, and the mask undoes the arithmetic shift.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((p1 >> 32) & _MASK) ^ c1 ^ k0, ((p0 >> 32) & _MASK) ^ c3 ^ k1
        c1, c3 = p1 & _MASK, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


class Stream:
    """Random numbers named by `seed` and `path`; each draw takes sample indices, int64 `(B,)`, and
    is on their device. Words, uniforms and integers have the same bits on every device. Normals are
    rounded from float64: devices agree within one unit in the last place of float32.
    """

    def __init__(self, seed: int | str, *path: str | int):
        self.name = "/".join(str(part) for part in (seed, *path))
        digest = hashlib.blake2b(self.name.encode(), digest_size=8).digest()
        self.key = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")

    def child(self, name: str) -> Stream:
        """An independent stream for the same samples."""
        return Stream(self.name, name)

    def _words(self, index: Tensor, count: int) -> Tensor:
        """`(B, count)` int64 tensor of independent 32-bit words."""
        if philox := _kernels(index):
            return philox.words(index, self.key, count)
        index = index.view(-1, 1)
        block = torch.arange((count + 3) // 4, device=index.device).view(1, -1)
        zero = torch.zeros_like(block + index)
        counter = (block + zero, (index & _MASK) + zero, (index >> 32) + zero, zero)
        return torch.stack(philox_4x32(counter, self.key), dim=-1).flatten(1)[:, :count]

    def uniform(self, index: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
        """float32 `(B, *shape)`, uniform on [0, 1]."""
        if philox := _kernels(index):
            return philox.uniform(index, self.key, math.prod(shape)).view(-1, *shape)
        words = self._words(index, math.prod(shape))
        return ((words + 0.5) * 2.0**-32).float().view(-1, *shape)

    def normal(self, index: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
        """float32 `(B, *shape)`, standard normal (Box-Muller)."""
        count = math.prod(shape)
        if philox := _kernels(index):
            return philox.normal(index, self.key, count).view(-1, *shape)
        pairs = (count + 1) // 2
        uniform = (self._words(index, 2 * pairs).double() + 0.5) * 2.0**-32
        radius = (-2.0 * uniform[:, :pairs].log()).sqrt()
        angle = (2.0 * math.pi) * uniform[:, pairs:]
        both = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
        return both[:, :count].float().view(-1, *shape)

    def integers(self, index: Tensor, high: int, shape: tuple[int, ...] = ()) -> Tensor:
        """int64 `(B, *shape)`, uniform on 0 .. high - 1 (high far below 2**32)."""
        count = math.prod(shape)
        if philox := _kernels(index):
            return philox.integers(index, self.key, count, high).view(-1, *shape)
        return ((self._words(index, count) * high) >> 32).view(-1, *shape)


def _kernels(index: Tensor) -> ModuleType | None:
    """The module of kernels, where they draw the numbers of these samples."""
    if not (usable(index) and agrees("harness.philox", lambda: _compare(index.device))):
        return None
    from harness import philox

    return philox


def _compare(device: torch.device) -> None:
    """Raise an exception if the kernels fail on a device or their numbers differ."""
    from harness import philox

    stream = Stream(0, "kernels")
    index = torch.tensor([0, 1, 2**32 - 1, 2**40 + 5], device=device)
    for count in (1, 7, 12, 14, 17):  # all cases of `philox.normal`
        with kernels("off"):
            words, uniform = stream._words(index, count), stream.uniform(index, (count,))
            normal = stream.normal(index, (count,))
        same = torch.equal(philox.words(index, stream.key, count), words)
        same &= torch.equal(philox.uniform(index, stream.key, count), uniform)
        if not (same and within_one_ulp(philox.normal(index, stream.key, count), normal)):
            raise ValueError(f"other numbers on {device}")


def within_one_ulp(a: Tensor, b: Tensor) -> bool:
    """Whether all numbers agree within one unit in the last place."""
    least, most = (b.nextafter(b.new_tensor(limit)) for limit in (-torch.inf, torch.inf))
    return bool(((least <= a) & (a <= most)).all())


# The noise of teacher pairs by the number of the pair, so that only images need to be stored.
PAIR_NOISE = Stream(0, "pairs")


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator inside the block (for initial weights), and restore it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
