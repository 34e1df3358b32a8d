"""The memory-bound operations of EDM's blocks, fused: group norm with everything around it, the
residual sum, and resampling, on channels-last memory.

Each operation has a plain version in PyTorch, its reference, and one as a kernel
(`harness.networks.triton_ops`). Second derivatives go through the plain version. There is no
forward-mode derivative: `harness.kernels.usable` says when a network must not use this module.
"""

from collections.abc import Callable, Iterable
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook


def _operators():
    """The module of the operators; it imports Triton, which a plain pass does not need."""
    from harness.networks import triton_ops

    return triton_ops


# -- the plain versions ---------------------------------------------------------------------------


def plain_norm(
    x: Tensor,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    modulation: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
) -> Tensor:
    """The group norm of x + shift; then, with a modulation (scale, shift), y (1 + scale) + shift;
    then SiLU. See `norm`."""
    precision = torch.promote_types(x.dtype, torch.float32)
    v = x.to(precision)
    if shift is not None:
        v = v + shift.to(precision)[..., None, None]
    y = F.group_norm(v, groups, weight.to(precision), bias.to(precision), eps)
    if modulation is not None:
        scale, offset = modulation.to(precision)[:, :, None, None].chunk(2, dim=1)
        y = y * (1 + scale) + offset
    return (F.silu(y) if silu else y).to(x.dtype)


def plain_residual(h: Tensor, bias: Tensor, x: Tensor, scale: float) -> Tensor:
    """See `residual`."""
    precision = torch.promote_types(h.dtype, torch.float32)
    total = h.to(precision) + bias.to(precision)[:, None, None] + x.to(precision)
    return (total * scale).to(h.dtype)


def plain_resample(x: Tensor, taps: Tensor, up: bool, padding: int) -> Tensor:
    """See `resampled`."""
    filters = taps.to(x.dtype).expand(x.shape[1], -1, -1, -1)
    options = {"stride": 2, "padding": padding, "groups": x.shape[1]}
    if up:
        return F.conv_transpose2d(x, 4 * filters, **options)
    return F.conv2d(x, filters, **options)


# -- derivatives ----------------------------------------------------------------------------------


def _through_plain(ctx, plain: Callable, tensors: tuple, settings: tuple, dy: Tensor) -> list:
    """Gradients by the inputs that can be differentiated again (`create_graph`)."""
    with torch.enable_grad():
        # By aliases: one input may depend on another, if a network evaluates its own result.
        tensors = [None if t is None else t.view_as(t) for t in tensors]
        y = plain(*tensors, *settings)
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
    gradients = torch.autograd.grad(y, [tensors[i] for i in wanted], dy, create_graph=True)
    result = [None] * len(ctx.needs_input_grad)
    for i, gradient in zip(wanted, gradients, strict=True):
        result[i] = gradient
    return result


@lru_cache(maxsize=64)
def _zeros(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(size, dtype=dtype, device=device)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shift, weight, bias, modulation, groups, eps, silu):
        zeros = _zeros(2 * len(weight), weight.dtype, weight.device)
        given = zeros[: len(weight)] if shift is None else shift.contiguous(), weight, bias
        given = *given, zeros if modulation is None else modulation.contiguous()
        y, statistics = _operators().NORM_FORWARD(x, *given, groups, eps, silu)
        ctx.save_for_backward(x, shift, weight, bias, modulation, statistics, given[0], given[3])
        ctx.settings = groups, eps, silu
        return y

    @staticmethod
    def backward(ctx, dy):
        x, shift, weight, bias, modulation, statistics, added, modulated = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = x, shift, weight, bias, modulation
            return tuple(_through_plain(ctx, plain_norm, inputs, ctx.settings, dy))
        (groups, _, silu), (n, c), needs = ctx.settings, x.shape[:2], ctx.needs_input_grad
        given = added, weight, bias, modulated, statistics, groups, silu
        dx, gradients = _operators().NORM_BACKWARD(dy, x, *given)
        dshift = dweight = dbias = dmodulation = None
        if needs[1]:
            dshift = gradients[4].view(n, c)
            dshift = (dshift if shift.dim() == 2 else dshift.sum(0)).to(shift.dtype)
        if needs[2] or needs[3]:
            dweight, dbias = gradients[2:4].view(2, n, c).sum(1).to(weight.dtype)
        if needs[4]:
            dmodulation = gradients[:2].view(n, 2 * c).to(modulation.dtype)
        return dx, dshift, dweight, dbias, dmodulation, None, None, None


class _Residual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, bias, x, scale):
        ctx.save_for_backward(bias)
        ctx.scale = scale
        return _operators().RESIDUAL_FORWARD(h, bias, x, scale)

    @staticmethod
    def backward(ctx, dy):
        (bias,), needs_bias = ctx.saved_tensors, ctx.needs_input_grad[1]
        if torch.is_grad_enabled():
            d, sums = dy * ctx.scale, None
            dbias = d.to(bias.dtype).sum((0, 2, 3))
        elif ctx.scale == 1 and not needs_bias:
            d, dbias = dy, None
        else:
            d, sums = _operators().RESIDUAL_BACKWARD(dy, ctx.scale)
            dbias = sums.sum(0).to(bias.dtype) if needs_bias else None
        return d, dbias, d, None


class _Resample(torch.autograd.Function):
    """Linear, and up is the adjoint of down: its derivative is itself, at any order."""

    @staticmethod
    def forward(ctx, x, taps, up, padding, gain, height, width):
        ctx.save_for_backward(taps)
        ctx.settings = not up, padding, gain, x.shape[2], x.shape[3]
        return _operators().RESAMPLE(x, taps, up, padding, gain, height, width)

    @staticmethod
    def backward(ctx, dy):
        (taps,) = ctx.saved_tensors
        return _Resample.apply(dy, taps, *ctx.settings), *[None] * 6


# -- operations -----------------------------------------------------------------------------------


def norm(
    x: Tensor, layer: nn.GroupNorm, shift: Tensor | None = None, modulation=None, silu=True
) -> Tensor:
    """`layer` of x + shift, with modulation and SiLU, in the dtype of x. shift: `(C,)` or `(B, C)`.
    modulation: scale and shift `(B, 2 C)` after the norm, y (1 + scale) + shift."""
    parameters = shift, layer.weight, layer.bias, modulation
    return _Norm.apply(x, *parameters, layer.num_groups, layer.eps, silu)


def residual(h: Tensor, bias: Tensor, x: Tensor, scale: float) -> Tensor:
    """`(h + bias + x) scale` in the dtype of h; `bias` `(C,)` is that of the convolution that made
    h."""
    return _Residual.apply(h, bias, x.to(h.dtype), scale)


def resampled(x: Tensor, taps: Tensor, up: bool, padding: int) -> Tensor:
    """Convolve with a filter `taps` `(1, 1, T, T)`, T even, and change the size by 2: every second
    pixel, or (`up`) the adjoint, times 4. padding: on each side of the larger image."""
    size, t = x.shape[2:], taps.shape[-1]
    if up:
        height, width = (2 * (k - 1) + t - 2 * padding for k in size)
    else:
        height, width = ((k + 2 * padding - t) // 2 + 1 for k in size)
    return _Resample.apply(x, taps, up, padding, 4.0 if up else 1.0, height, width)


# -- weights --------------------------------------------------------------------------------------


class _Cast(torch.autograd.Function):
    """Parameters as their copies in another dtype; gradients are cast back by one kernel."""

    @staticmethod
    def forward(ctx, copies, *parameters):
        ctx.dtype = parameters[0].dtype
        return tuple(copy.view_as(copy) for copy in copies)

    @staticmethod
    def backward(ctx, *gradients):
        found = [g for g in gradients if g is not None]
        if torch.is_grad_enabled():
            cast = [g.to(ctx.dtype) for g in found]
        else:
            cast = [torch.empty_like(g, dtype=ctx.dtype) for g in found]
            torch._foreach_copy_(cast, found)
        remaining = iter(cast)
        return None, *(None if g is None else next(remaining) for g in gradients)


def _count_update(optimizer: Optimizer, arguments, options) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.autograd.graph.increment_version(parameters)


# Fused optimisers change weights without counting it in `Tensor._version`.
register_optimizer_step_post_hook(_count_update)


class CastWeights:
    """Weights in another dtype, by parameter. All are cast at once, and again when one has changed;
    only changes through `Tensor.data` go unnoticed."""

    def __init__(self) -> None:
        self._key: list | None = None
        self._copies: dict[nn.Parameter, Tensor] = {}

    def __deepcopy__(self, memo: dict) -> "CastWeights":
        return CastWeights()

    def __call__(self, parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> dict:
        parameters = list(parameters)
        if all(p.dtype == dtype for p in parameters):
            return dict(zip(parameters, parameters, strict=True))
        key = [(dtype, p.data_ptr(), p._version) for p in parameters]
        if key != self._key:
            with torch.no_grad():
                copies = [torch.empty_like(p, dtype=dtype) for p in parameters]
                torch._foreach_copy_(copies, parameters)
            self._key, self._copies = key, dict(zip(parameters, copies, strict=True))
        result = dict(self._copies)
        trained = [p for p in parameters if p.requires_grad]
        if trained and torch.is_grad_enabled():
            copies = [self._copies[p] for p in trained]
            result |= zip(trained, _Cast.apply(copies, *trained), strict=True)
        return result


# -- the comparison before the first use ----------------------------------------------------------


def check(device: torch.device, dtype: torch.dtype) -> None:
    """Raise an exception if a kernel fails on the device, or differs from the plain version by more
    than rounding, in its result or in a gradient. The shapes are such that the kernels of a network
    with 256 channels need no other compilation."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int, dtype=torch.float32) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype).requires_grad_()

    def image() -> Tensor:
        x = normal(2, 256, 16, 16, dtype=dtype).detach()
        return x.to(memory_format=torch.channels_last).requires_grad_()

    channels = normal(2, 256), normal(256), normal(256)
    taps = torch.full((1, 1, 2, 2), 0.25, device=device)
    cases = (
        ("norm", _Norm.apply, plain_norm, (image(), *channels, None), (32, 1e-6, True)),
        ("residual sum", residual, plain_residual, (image(), channels[1], image()), (0.7,)),
        ("upsampling", resampled, plain_resample, (image(),), (taps, True, 0)),
        ("downsampling", resampled, plain_resample, (image(),), (taps, False, 0)),
    )
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for name, fused, plain, tensors, settings in cases:
        inputs, found = [t for t in tensors if t is not None], []
        for function in (fused, plain):
            y = function(*tensors, *settings)
            dy = torch.linspace(-1, 1, y.numel(), device=device).view_as(y).to(dtype)
            found.append([y, *torch.autograd.grad(y, inputs, dy)])
        for ours, reference in zip(*found, strict=True):
            difference = (ours.double() - reference.double()).norm() / reference.double().norm()
            if not difference < tolerance:
                raise ArithmeticError(f"{name}: relative difference {difference:.1e}")
