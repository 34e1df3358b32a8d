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

import torch
from torch import Tensor

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
    is on their device. Normals are rounded from float64: devices agree to the last bit or nearly.
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
        index = index.view(-1, 1)
        block = torch.arange((count + 3) // 4, device=index.device).view(1, -1)
        zero = torch.zeros_like(block + index)
        counter = (block + zero, (index & _MASK) + zero, (index >> 32) + zero, zero)
        return torch.stack(philox_4x32(counter, self.key), dim=-1).flatten(1)[:, :count]

    def uniform(self, index: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
        """float32 `(B, *shape)`, uniform on [0, 1]."""
        words = self._words(index, math.prod(shape))
        return ((words + 0.5) * 2.0**-32).float().view(-1, *shape)

    def normal(self, index: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
        """float32 `(B, *shape)`, standard normal (Box-Muller)."""
        count = math.prod(shape)
        pairs = (count + 1) // 2
        uniform = (self._words(index, 2 * pairs).double() + 0.5) * 2.0**-32
        radius = (-2.0 * uniform[:, :pairs].log()).sqrt()
        angle = (2.0 * math.pi) * uniform[:, pairs:]
        both = torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)
        return both[:, :count].float().view(-1, *shape)

    def integers(self, index: Tensor, high: int, shape: tuple[int, ...] = ()) -> Tensor:
        """int64 `(B, *shape)`, uniform on 0 .. high - 1 (high far below 2**32)."""
        return ((self._words(index, math.prod(shape)) * high) >> 32).view(-1, *shape)


# The noise of teacher pairs by the number of the pair, so that only images need to be stored.
PAIR_NOISE = Stream(0, "pairs")


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator inside the block (for initial weights), and restore it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
