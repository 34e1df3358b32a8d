"""Triton kernels, registered as operators, for the memory-bound operations of EDM's blocks: group
norm with everything around it, the residual sum, and resampling. See `harness.networks.fused`.

Images are `(B, C, H, W)` in channels-last memory, or channel slices of such memory: pixel r of all
images begins at r * row elements. A group norm is one kernel forward and one backward: a program
has all pixels of a few groups of one image and reads them twice, the second time from the cache.
Means and squared deviations of its lanes are merged as by Chan et al. 1979 ("Updating formulae and
a pairwise algorithm for computing sample variances"). Sums have a fixed order: results repeat.

The kernels compute in float32 (float64 for float64 inputs), whatever the dtype of the images.
"""

import threading
from collections.abc import Callable
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements of each operand that a program holds at a time
CHANNELS = 32  # of them in a row, for group norms (64 bytes of bfloat16)
WIDTH = 64  # the same for the other kernels
WARPS = 4


_tracing = threading.local()


def launch(kernel, grid: tuple[int, ...], *arguments, **constants) -> None:
    """Launch a kernel, unless only shapes are traced. The first argument is a tensor."""
    if getattr(_tracing, "shapes", False):
        return
    options = constants | {"num_warps": WARPS, "enable_fp_fusion": True}
    device = arguments[0].get_device()  # -1: on CPU, for Triton's interpreter
    if device < 0 or device == torch.cuda.current_device():
        kernel[grid](*arguments, **options)
    else:  # Triton launches on the current device
        with torch.cuda.device(device):
            kernel[grid](*arguments, **options)


# -- kernels --------------------------------------------------------------------------------------


@triton.jit
def _group_sum(v, GROUPS: tl.constexpr, PADDED: tl.constexpr):
    """Sums over the channels of each group, for each channel; masked channels must be 0."""
    sums = tl.sum(tl.reshape(v, [GROUPS, PADDED]), 1)
    return tl.reshape(tl.broadcast_to(sums[:, None], [GROUPS, PADDED]), [GROUPS * PADDED])


@triton.jit
def _group_channels(block, C, SIZE: tl.constexpr, PADDED: tl.constexpr, GROUPS: tl.constexpr):
    """The channels of a program, which of them exist, their groups, and which are the first of a
    group. SIZE: channels of a group, PADDED to a power of 2."""
    k = tl.arange(0, GROUPS * PADDED)
    g = block * GROUPS + k // PADDED
    if SIZE == PADDED:  # contiguous channels and a simple mask, so that loads are wide
        c = block * GROUPS * SIZE + k
        real = c < C
    else:
        c = g * SIZE + k % PADDED
        real = (k % PADDED < SIZE) & (c < C)
    return c, real, g, k % PADDED == 0


@triton.jit
def _silu_slope(t, silu):
    """The derivative of SiLU or, if `silu` is 0, of the identity."""
    q = tl.sigmoid(t)
    return tl.where(silu > 0, q * (1.0 + t * (1.0 - q)), 1.0)


@triton.jit
def _load_normalised(x, dy, mask, centre, rstd, gain, offset, silu, ACC: tl.constexpr):
    """The normalised z of a tile, and the derivative by t = gain * z + offset."""
    z = (tl.load(x, mask=mask, other=0.0).to(ACC) + centre) * rstd
    d = tl.load(dy, mask=mask, other=0.0).to(ACC)
    return z, d * _silu_slope(z * gain + offset, silu)


@triton.jit
def _norm_forward(
    x, shift, weight, bias, modulation, y, statistics,
    N, S, C, G, x_row, shift_row, modulation_row, silu, eps,
    SIZE: tl.constexpr, PADDED: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    c, real, g, leader = _group_channels(tl.program_id(1), C, SIZE, PADDED, GROUPS)
    r = tl.arange(0, ROWS)
    shifts = tl.load(shift + n * shift_row + c, mask=real, other=0.0).to(ACC)

    # Welford's recurrence in each lane (a row and channel of the tile), then the merge.
    mean = tl.zeros([ROWS, GROUPS * PADDED], ACC)
    squares = tl.zeros([ROWS, GROUPS * PADDED], ACC)
    steps = 0.0
    for start in range(0, S, ROWS):
        steps += 1.0
        mask = (start + r < S)[:, None] & real[None, :]
        o = (n * S + start + r)[:, None] * x_row + c[None, :]
        v = tl.load(x + o, mask=mask, other=0.0).to(ACC) + shifts[None, :]
        delta = v - mean
        updated = mean + delta / steps
        squares = tl.where(mask, squares + delta * (v - updated), squares)
        mean = tl.where(mask, updated, mean)
    counts = ((S - r + ROWS - 1) // ROWS).to(ACC)  # values in each lane
    counts = tl.where(r < S, counts, 0.0)[:, None] * real[None, :].to(ACC)
    total = S * SIZE
    # The deviations of the means from their rounded average correct it.
    average = _group_sum(tl.sum(counts * mean, 0), GROUPS, PADDED) / total
    deviation = mean - average[None, :]
    excess = _group_sum(tl.sum(counts * deviation, 0), GROUPS, PADDED) / total
    squares = tl.sum(squares + counts * deviation * deviation, 0)
    variance = _group_sum(squares, GROUPS, PADDED) / total - excess * excess
    average += excess
    rstd = 1.0 / tl.sqrt(variance + eps)
    tl.store(statistics + n * G + g, average, mask=real & leader)
    tl.store(statistics + (N + n) * G + g, rstd, mask=real & leader)

    modulation += n * modulation_row
    scale = 1.0 + tl.load(modulation + c, mask=real, other=0.0).to(ACC)
    gain = rstd * scale * tl.load(weight + c, mask=real, other=0.0).to(ACC)
    offset = scale * tl.load(bias + c, mask=real, other=0.0).to(ACC)
    offset += tl.load(modulation + C + c, mask=real, other=0.0).to(ACC)
    centre = shifts - average
    for start in range(0, S, ROWS):
        mask = (start + r < S)[:, None] & real[None, :]
        rows = (n * S + start + r)[:, None]
        v = tl.load(x + rows * x_row + c[None, :], mask=mask, other=0.0).to(ACC)
        t = (v + centre[None, :]) * gain[None, :] + offset[None, :]
        t *= tl.where(silu > 0, tl.sigmoid(t), 1.0)
        tl.store(y + rows * C + c[None, :], t.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _norm_backward(
    x, dy, shift, weight, bias, modulation, statistics, dx, gradients,
    N, S, C, G, x_row, dy_row, shift_row, modulation_row, silu,
    SIZE: tl.constexpr, PADDED: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    c, real, g, _ = _group_channels(tl.program_id(1), C, SIZE, PADDED, GROUPS)
    r = tl.arange(0, ROWS)
    rstd = tl.load(statistics + (N + n) * G + g, mask=real, other=0.0)
    centre = tl.load(shift + n * shift_row + c, mask=real, other=0.0).to(ACC)
    centre -= tl.load(statistics + n * G + g, mask=real, other=0.0)
    w = tl.load(weight + c, mask=real, other=0.0).to(ACC)
    b = tl.load(bias + c, mask=real, other=0.0).to(ACC)
    modulation += n * modulation_row
    scale = 1.0 + tl.load(modulation + c, mask=real, other=0.0).to(ACC)
    gain = w * scale
    offset = b * scale + tl.load(modulation + C + c, mask=real, other=0.0).to(ACC)

    # d: derivative by the activation's input t = gain * z + offset, of normalised z.
    sum_d = tl.zeros([ROWS, GROUPS * PADDED], ACC)
    sum_dz = tl.zeros([ROWS, GROUPS * PADDED], ACC)
    for start in range(0, S, ROWS):
        mask = (start + r < S)[:, None] & real[None, :]
        rows = (n * S + start + r)[:, None]
        z, d = _load_normalised(
            x + rows * x_row + c[None, :], dy + rows * dy_row + c[None, :], mask,
            centre[None, :], rstd[None, :], gain[None, :], offset[None, :], silu, ACC,
        )  # fmt: skip
        sum_d += d
        sum_dz += d * z
    by_offset, by_gain = tl.sum(sum_d, 0), tl.sum(sum_dz, 0)
    # Of the modulation `(N, 2, C)`, the weight, the bias and, below, the shift, `(N, C)` each.
    o = gradients + n * 2 * C + c
    tl.store(o, w * by_gain + b * by_offset, mask=real)
    tl.store(o + C, by_offset, mask=real)
    tl.store(gradients + (2 * N + n) * C + c, by_gain * scale, mask=real)
    tl.store(gradients + (3 * N + n) * C + c, by_offset * scale, mask=real)

    mean_d = _group_sum(gain * by_offset, GROUPS, PADDED) / (S * SIZE)
    mean_dz = _group_sum(gain * by_gain, GROUPS, PADDED) / (S * SIZE)
    by_shift = tl.zeros([ROWS, GROUPS * PADDED], ACC)
    for start in range(0, S, ROWS):
        mask = (start + r < S)[:, None] & real[None, :]
        rows = (n * S + start + r)[:, None]
        z, d = _load_normalised(
            x + rows * x_row + c[None, :], dy + rows * dy_row + c[None, :], mask,
            centre[None, :], rstd[None, :], gain[None, :], offset[None, :], silu, ACC,
        )  # fmt: skip
        dv = rstd[None, :] * (d * gain[None, :] - mean_d[None, :] - z * mean_dz[None, :])
        by_shift += tl.where(mask, dv, 0.0)
        tl.store(dx + rows * C + c[None, :], dv.to(dx.dtype.element_ty), mask=mask)
    tl.store(gradients + (4 * N + n) * C + c, tl.sum(by_shift, 0), mask=real)


@triton.jit
def _residual_forward(
    h, bias, x, y, R, C, h_row, x_row, scale,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = (r < R)[:, None] & (c < C)[None, :]
    v = tl.load(h + r[:, None] * h_row + c[None, :], mask=mask, other=0.0).to(ACC)
    v += tl.load(bias + c, mask=c < C, other=0.0).to(ACC)[None, :]
    v += tl.load(x + r[:, None] * x_row + c[None, :], mask=mask, other=0.0).to(ACC)
    tl.store(y + r[:, None] * C + c[None, :], (v * scale).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["TILES"])
def _residual_backward(
    dy, dx, sums, R, C, dy_row, scale, TILES,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([ROWS, WIDTH], ACC)
    first = tl.program_id(0).to(tl.int64) * TILES * ROWS
    for tile in range(TILES):
        r = first + tile * ROWS + tl.arange(0, ROWS)
        mask = (r < R)[:, None] & (c < C)[None, :]
        d = tl.load(dy + r[:, None] * dy_row + c[None, :], mask=mask, other=0.0).to(ACC) * scale
        total += d
        tl.store(dx + r[:, None] * C + c[None, :], d.to(dx.dtype.element_ty), mask=mask)
    tl.store(sums + tl.program_id(0) * C + c, tl.sum(total, 0), mask=c < C)


@triton.jit(do_not_specialize=["padding"])
def _resample(
    x, taps, y, H, W, OUT_H, OUT_W, C, x_row, padding, gain,
    TAPS: tl.constexpr, UP: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    i, j = p // OUT_W, p % OUT_W
    real = (i < OUT_H)[:, None] & (c < C)[None, :]
    total = tl.zeros([ROWS, WIDTH], ACC)
    # Up: of an even filter, every second tap meets an input, beginning with the parity's.
    for a in tl.static_range(0, TAPS // 2 if UP else TAPS):
        for b in tl.static_range(0, TAPS // 2 if UP else TAPS):
            if UP:
                tap_i, tap_j = (i + padding) % 2 + 2 * a, (j + padding) % 2 + 2 * b
                from_i, from_j = (i + padding) // 2 - a, (j + padding) // 2 - b
            else:
                tap_i, tap_j = i * 0 + a, j * 0 + b
                from_i, from_j = 2 * i + a - padding, 2 * j + b - padding
            inside = (from_i >= 0) & (from_i < H) & (from_j >= 0) & (from_j < W)
            factor = tl.load(taps + tap_i * TAPS + tap_j).to(ACC)
            o = ((n * H + from_i) * W + from_j)[:, None] * x_row + c[None, :]
            v = tl.load(x + o, mask=real & inside[:, None], other=0.0).to(ACC)
            total += factor[:, None] * v
    o = (n * OUT_H * OUT_W + p)[:, None] * C + c[None, :]
    tl.store(y + o, (gain * total).to(y.dtype.element_ty), mask=real)


# -- operators ------------------------------------------------------------------------------------
# Thin functions that allocate and launch. They are registered with PyTorch, so that profilers and
# compilers see named operators.


# All of it runs several times for each block of a network: what depends on shapes alone is cached.


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """An image with channels in rows, and the distance of the rows in elements: the tensor itself
    if it is channels-last or a slice of its channels, otherwise a channels-last copy."""
    n, c, h, w = x.shape
    if x.is_contiguous(memory_format=torch.channels_last):
        return x, c
    row = x.stride(3) if w > 1 else x.stride(2) if h > 1 else x.stride(0) if n > 1 else c
    expected = zip(x.shape, x.stride(), (h * w * row, 1, w * row, row), strict=True)
    if row >= c and all(stride == dense for size, stride, dense in expected if size > 1):
        return x, row
    return x.contiguous(memory_format=torch.channels_last), c


def _image(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """A new channels-last image of the dtype and on the device of x."""
    return x.new_empty_strided(size, _strides(*size[1:]))


@cache
def _strides(c: int, h: int, w: int) -> tuple[int, ...]:
    return c * h * w, 1, c * w, c


def _sums(x: Tensor, *size: int) -> Tensor:
    """New memory for what is computed per channel, in the precision of sums."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(size, dtype=dtype)


def _accumulator(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _sample_stride(x: Tensor) -> int:
    return x.stride(0) if x.dim() == 2 else 0


def group_tiles(channels: int, groups: int) -> dict[str, int]:
    """Constants of the kernels of group norms: groups per program, and the size of its tile."""
    size = channels // groups
    padded = triton.next_power_of_2(size)
    together = max(1, CHANNELS // padded)
    rows = max(1, TILE // (together * padded))
    return {"SIZE": size, "PADDED": padded, "GROUPS": together, "ROWS": rows}


@cache
def _norm_settings(n: int, channels: int, groups: int, dtype: torch.dtype) -> tuple[tuple, dict]:
    """The grid and the constants."""
    tiles = group_tiles(channels, groups)
    grid = (n, triton.cdiv(groups, tiles["GROUPS"]))
    return grid, tiles | {"ACC": _accumulator(dtype)}


@cache
def _row_settings(rows: int, channels: int, dtype: torch.dtype) -> tuple[tuple, dict]:
    constants = {"ROWS": TILE // WIDTH, "WIDTH": WIDTH, "ACC": _accumulator(dtype)}
    return (triton.cdiv(rows, TILE // WIDTH), triton.cdiv(channels, WIDTH)), constants


def set_tiles(tile: int, channels: int, width: int, warps: int) -> None:
    """Set the sizes of all tiles, for benchmarks and tests."""
    global TILE, CHANNELS, WIDTH, WARPS
    TILE, CHANNELS, WIDTH, WARPS = tile, channels, width, warps
    _norm_settings.cache_clear()
    _row_settings.cache_clear()


# One kernel serves all norms, so that little is compiled: shift `(C,)` or `(B, C)` and modulation
# `(2 C,)` or `(B, 2 C)` are zeros where there are none.


def norm_forward(
    x: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor,
    modulation: Tensor,
    groups: int,
    eps: float,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """The result, and the mean and 1 / standard deviation of each group, `(2, B, G)`."""
    (x, row), (n, c, h, w) = _rows(x), x.shape
    y, statistics = _image(x, x.shape), _sums(x, 2, n, groups)
    grid, constants = _norm_settings(n, c, groups, x.dtype)
    numbers = n, h * w, c, groups, row, _sample_stride(shift), _sample_stride(modulation)
    tensors = x, shift, weight, bias, modulation, y, statistics
    launch(_norm_forward, grid, *tensors, *numbers, float(silu), eps, **constants)
    return y, statistics


def norm_backward(
    dy: Tensor,
    x: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor,
    modulation: Tensor,
    statistics: Tensor,
    groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient by x, and those for each image by the modulation `(B, 2, C)`, the weight, the
    bias and the shift, `(B, C)` each, behind one another `(5, B C)`."""
    (x, row), (dy, dy_row), (n, c, h, w) = _rows(x), _rows(dy), x.shape
    dx, gradients = _image(x, x.shape), _sums(x, 5, n * c)
    grid, constants = _norm_settings(n, c, groups, x.dtype)
    strides = row, dy_row, _sample_stride(shift), _sample_stride(modulation)
    tensors = x, dy, shift, weight, bias, modulation, statistics, dx, gradients
    launch(_norm_backward, grid, *tensors, n, h * w, c, groups, *strides, float(silu), **constants)
    return dx, gradients


def residual_forward(h: Tensor, bias: Tensor, x: Tensor, scale: float) -> Tensor:
    (h, h_row), (x, x_row), (n, c, height, width) = _rows(h), _rows(x), h.shape
    y, pixels = _image(h, h.shape), n * height * width
    grid, constants = _row_settings(pixels, c, h.dtype)
    launch(_residual_forward, grid, h, bias, x, y, pixels, c, h_row, x_row, scale, **constants)
    return y


def residual_backward(dy: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The gradient by h and by x, and sums of it by channel, `(P, C)` of P parts of the pixels."""
    (dy, row), (n, c, height, width) = _rows(dy), dy.shape
    pixels = n * height * width
    (tiles, blocks), constants = _row_settings(pixels, c, dy.dtype)
    each = -(-tiles // 256)  # tiles of a program: enough programs, few parts
    grid = (-(-tiles // each), blocks)
    dx, sums = _image(dy, dy.shape), _sums(dy, grid[0], c)
    launch(_residual_backward, grid, dy, dx, sums, pixels, c, row, scale, each, **constants)
    return dx, sums


def resample(
    x: Tensor, taps: Tensor, up: bool, padding: int, gain: float, height: int, width: int
) -> Tensor:
    (x, row), (n, c, h, w) = _rows(x), x.shape
    y = _image(x, (n, c, height, width))
    (tiles, blocks), constants = _row_settings(height * width, c, x.dtype)
    numbers = h, w, height, width, c, row, padding, gain
    constants = constants | {"TAPS": taps.shape[-1], "UP": up}
    launch(_resample, (n, tiles, blocks), x, taps, y, *numbers, **constants)
    return y


LIBRARY = torch.library.Library("onestep", "DEF")


def _register(function: Callable) -> Callable:
    """Register an operator for GPUs and, with Triton's interpreter, for CPU."""
    name = function.__name__
    LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
    for device in ("CUDA", "CPU"):
        LIBRARY.impl(name, function, device)

    def shapes(*arguments):
        _tracing.shapes = True
        try:
            return function(*arguments)
        finally:
            _tracing.shapes = False

    torch.library.register_fake(f"onestep::{name}", shapes, lib=LIBRARY)
    return getattr(torch.ops.onestep, name).default


NORM_FORWARD, NORM_BACKWARD = _register(norm_forward), _register(norm_backward)
RESIDUAL_FORWARD, RESIDUAL_BACKWARD = _register(residual_forward), _register(residual_backward)
RESAMPLE = _register(resample)
