"""Triton kernels for the draws of `harness.streams`: one launch per draw.

Words, uniforms and integers have the bits of the plain path. Normals are computed in float64, too,
and differ at most in the last bit of float32, since logarithm, sine and cosine are the device's.
All functions take sample indices, int64 `(B,)`, the two words of a Philox key, and the number of
values per sample.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 128  # Philox blocks, of four words, per program

_WORDS, _UNIFORM, _INTEGERS = map(tl.constexpr, range(3))
_HALF, _STEP, _TURN = tl.constexpr(0.5), tl.constexpr(2.0**-32), tl.constexpr(6.283185307179586)


@triton.jit
def _philox(seed, index, block):
    """The four words of the counter (block, low word of the index, high word, 0)."""
    low, high = (index & 0xFFFFFFFF).to(tl.uint32), (index >> 32).to(tl.uint32)
    return tl.philox(seed, block.to(tl.uint32), low, high, low ^ low)


@triton.jit
def _position(index, stride, rows, blocks, TILE: tl.constexpr):
    """Of each Philox block of this program: the row of the result, the index there, the number of
    the block in the row, and whether the row exists."""
    place = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    row, block = place // blocks, place % blocks
    valid = row < rows
    return row, tl.load(index + row * stride, mask=valid, other=0), block, valid


@triton.jit
def _store(out, word, high, mask, KIND: tl.constexpr):
    if KIND == _UNIFORM:
        # As in the plain path, the word is rounded to float32 first.
        tl.store(out, (word.to(tl.float32) + _HALF) * _STEP, mask=mask)
    elif KIND == _INTEGERS:
        tl.store(out, (word.to(tl.int64) * high) >> 32, mask=mask)
    else:
        tl.store(out, word.to(tl.int64), mask=mask)


# The values are those of a draw: without specialisation each kernel is compiled only once.
@triton.jit(do_not_specialize=["stride", "seed", "rows", "count", "high"])
def _draw(
    out,
    index,
    stride: tl.int64,
    seed: tl.uint64,
    rows: tl.int64,
    count: tl.int64,
    high: tl.int64,
    KIND: tl.constexpr,
    TILE: tl.constexpr,
):
    row, sample, block, valid = _position(index, stride, rows, (count + 3) // 4, TILE)
    w0, w1, w2, w3 = _philox(seed, sample, block)
    column = 4 * block
    out += row * count + column
    _store(out, w0, high, valid & (column < count), KIND)
    _store(out + 1, w1, high, valid & (column + 1 < count), KIND)
    _store(out + 2, w2, high, valid & (column + 2 < count), KIND)
    _store(out + 3, w3, high, valid & (column + 3 < count), KIND)


@triton.jit
def _store_pair(out, first, second, column, pairs, count, valid):
    """Box-Muller: the normals `column` and `pairs + column` of a row from two words."""
    radius = tl.sqrt(-2.0 * tl.log((first.to(tl.float64) + _HALF) * _STEP))
    angle = (second.to(tl.float64) + _HALF) * _STEP * _TURN
    valid = valid & (column < pairs)
    tl.store(out, (radius * tl.cos(angle)).to(tl.float32), mask=valid)
    second_valid = valid & (pairs + column < count)
    tl.store(out + pairs, (radius * tl.sin(angle)).to(tl.float32), mask=second_valid)


@triton.jit(do_not_specialize=["stride", "seed", "rows", "count"])
def _draw_normal(
    out,
    index,
    stride: tl.int64,
    seed: tl.uint64,
    rows: tl.int64,
    count: tl.int64,
    SHIFT: tl.constexpr,  # number of pairs modulo 4
    TILE: tl.constexpr,
):
    # Word p of a row is paired with word p + pairs, which is SHIFT words later in its block.
    pairs = (count + 1) // 2
    row, sample, block, valid = _position(index, stride, rows, (pairs + 3) // 4, TILE)
    w0, w1, w2, w3 = _philox(seed, sample, block)
    later = pairs // 4 + block
    v0, v1, v2, v3 = _philox(seed, sample, later)
    if SHIFT > 0:
        u0, u1, u2, _ = _philox(seed, sample, later + 1)
        if SHIFT == 1:
            v0, v1, v2, v3 = v1, v2, v3, u0
        elif SHIFT == 2:
            v0, v1, v2, v3 = v2, v3, u0, u1
        else:
            v0, v1, v2, v3 = v3, u0, u1, u2
    column = 4 * block
    out += row * count + column
    _store_pair(out, w0, v0, column, pairs, count, valid)
    _store_pair(out + 1, w1, v1, column + 1, pairs, count, valid)
    _store_pair(out + 2, w2, v2, column + 2, pairs, count, valid)
    _store_pair(out + 3, w3, v3, column + 3, pairs, count, valid)


Key = tuple[int, int]


def _launch(kernel, blocks: int, index: Tensor, key: Key, count: int, dtype, *more) -> Tensor:
    """Draw `(B, count)` numbers; `blocks` Philox blocks for each sample."""
    index, seed = index.view(-1), key[0] | key[1] << 32
    out = torch.empty(len(index), count, dtype=dtype, device=index.device)
    if out.numel():
        grid = (triton.cdiv(len(index) * blocks, TILE),)
        with torch.cuda.device_of(index):  # Triton launches on the current device
            arguments = out, index, index.stride(0), seed, *out.shape, *more, TILE
            kernel[grid](*arguments, enable_fp_fusion=False)  # every rounding as in the plain path
    return out


def words(index: Tensor, key: Key, count: int) -> Tensor:
    """Independent 32-bit words, int64 `(B, count)`."""
    return _launch(_draw, -(-count // 4), index, key, count, torch.int64, 0, _WORDS.value)


def uniform(index: Tensor, key: Key, count: int) -> Tensor:
    """Uniform on [0, 1], float32 `(B, count)`."""
    return _launch(_draw, -(-count // 4), index, key, count, torch.float32, 0, _UNIFORM.value)


def integers(index: Tensor, key: Key, count: int, high: int) -> Tensor:
    """Uniform on 0 .. high - 1, int64 `(B, count)`."""
    return _launch(_draw, -(-count // 4), index, key, count, torch.int64, high, _INTEGERS.value)


def normal(index: Tensor, key: Key, count: int) -> Tensor:
    """Standard normal, float32 `(B, count)`."""
    pairs = (count + 1) // 2
    blocks, shift = -(-pairs // 4), pairs % 4
    return _launch(_draw_normal, blocks, index, key, count, torch.float32, shift)
