"""EDM's U-Nets (Karras et al. 2022, arXiv 2206.00364), written from a specification.

Arguments, module names and shapes are those of the official checkpoints. Under autocast the image
path runs in bfloat16, but the embedding in float32: its phases reach hundreds of radians.

A forward pass is plain or fused. The fused one runs where `harness.kernels` allows it, usually on a
GPU, if the weights are in channels-last memory: activations are then channels-last, too, weights
are cast to the dtype of the activations once per update, convolutions add no bias of their own, and
everything between them is one kernel (`harness.networks.fused`).
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import ClassVar, Self

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from harness import kernels
from harness.networks import fused

Weights = Mapping[nn.Parameter, Tensor]  # parameters of convolutions in the activations' dtype
HALF = (torch.float16, torch.bfloat16)


class EmbeddingLinear(nn.Linear):
    """A linear layer of the embedding, always in the dtype of its weight: float32."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta:  # autocast does not support meta tensors
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class GroupNorm(nn.GroupNorm):
    """Group norm in the dtype of its input, with float32 sums inside. Autocast would return
    float32, which doubles the memory traffic of the operations that follow."""

    def __init__(self, channels: int, eps: float):
        super().__init__(min(32, channels // 4), channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        if kernels.transformed():  # PyTorch 2.11 has no forward-mode derivative for channels-last
            x = x.contiguous()
        if x.dtype == self.weight.dtype and x.dtype not in HALF:
            return super().forward(x)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class Conv2d(nn.Module):
    """A convolution of odd size `kernel` (0: none), after an optional change of the size by 2.

    resample: "up", "down", or "fused_down", which convolves and then downsamples, as in NCSN++'s
    residual path; it differs at the border. taps: of the resampling filter.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, resample: str = "", taps=(1, 1)):
        super().__init__()
        box = tuple(taps) == (1, 1)  # equals average pooling and nearest neighbour
        self.resample = f"box_{resample}" if box and resample in ("up", "down") else resample
        self.kernel, self.filter_padding = kernel, (len(taps) - 1) // 2
        if kernel:
            self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
            self.bias = nn.Parameter(torch.empty(outputs))
        if resample:
            f = torch.tensor(taps, dtype=torch.float32)
            self.register_buffer("resample_filter", (torch.outer(f, f) / f.sum() ** 2)[None, None])

    def _depthwise(self, x: Tensor, gain: float = 1.0) -> Tensor:
        return (gain * self.resample_filter).to(x.dtype).expand(x.shape[1], -1, -1, -1)

    def forward(self, x: Tensor, weights: Weights | None = None) -> Tensor:
        """weights: of a fused pass."""
        padding = self.kernel // 2
        if self.resample == "fused_down":
            x = F.conv2d(x, self.weight.to(x.dtype), padding=padding + self.filter_padding)
            x = F.conv2d(x, self._depthwise(x), stride=2, groups=x.shape[1])
            return x + self.bias.to(x.dtype).view(1, -1, 1, 1)
        depthwise = {"stride": 2, "padding": self.filter_padding, "groups": x.shape[1]}
        if self.resample == "box_down":
            x = F.avg_pool2d(x, 2)
        elif self.resample == "down":
            x = F.conv2d(x, self._depthwise(x), **depthwise)
        elif self.resample == "box_up":
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        elif self.resample == "up":
            x = F.conv_transpose2d(x, self._depthwise(x, gain=4.0), **depthwise)
        if self.kernel:
            weight = self.weight if weights is None else weights[self.weight]
            x = F.conv2d(x, weight.to(x.dtype), self.bias.to(x.dtype), padding=padding)
        return x

    def fused(self, x: Tensor, weights: Weights) -> Tensor:
        """The result without the bias, which the following operation adds."""
        padding, taps = self.kernel // 2, getattr(self, "resample_filter", None)
        if self.resample == "fused_down":
            x = F.conv2d(x, weights[self.weight], padding=padding + self.filter_padding)
            return fused.resampled(x, taps, False, 0)
        if self.resample:
            x = fused.resampled(x, taps, self.resample.endswith("up"), self.filter_padding)
        return F.conv2d(x, weights[self.weight], padding=padding) if self.kernel else x


class NoiseEmbedding(nn.Module):
    """Cosines, then sines, of `x` `(B,)` at `size / 2` frequencies: from 1 to 1/10000 (`endpoint`:
    inclusive) if `kind` is "positional", random ones if it is "fourier"."""

    def __init__(self, size: int, kind: str, endpoint: bool = False):
        super().__init__()
        self.half, self.kind, self.endpoint = size // 2, kind, endpoint
        if kind == "fourier":
            self.register_buffer("freqs", torch.randn(self.half) * 16.0)

    def _apply(self, fn, recurse=True):
        """Keep the frequencies in float32 in a network of half precision: phases of hundreds of
        radians would be rounded by tenths."""
        frequencies = getattr(self, "freqs", None)
        super()._apply(fn, recurse)
        if frequencies is not None and self.freqs.dtype in HALF:
            self.freqs = frequencies.to(self.freqs.device)
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "fourier":
            # Multiply 2π·freqs first: at hundreds of radians the order of the products is visible.
            frequencies = 2 * math.pi * self.freqs
        else:
            exponent = torch.arange(self.half, dtype=torch.float32, device=x.device)
            frequencies = (1 / 10000) ** (exponent / (self.half - int(self.endpoint)))
        phase = torch.outer(x.float(), frequencies)
        return torch.cat([phase.cos(), phase.sin()], dim=1)


class UNetBlock(nn.Module):
    """A residual block modulated by the embedding, with optional self-attention.

    adm: ADM's block, with a scale and shift after the second norm and 64 channels per head.
    Otherwise SongUNet's, with a shift before this norm, sums scaled by sqrt(1/2), a convolution in
    every resampling skip, and one head. config: of the network.
    """

    def __init__(
        self, inputs: int, outputs: int, config, adm: bool, attention=False, resample: str = ""
    ):
        super().__init__()
        self.adm, self.dropout, self.skip_scale = (
            adm,
            config.dropout,
            1.0 if adm else math.sqrt(0.5),
        )
        self.heads = (outputs // 64 if adm else 1) if attention else 0
        emb_channels = config.model_channels * config.channel_mult_emb
        resampling = (resample, config.get("resample_filter", (1, 1)))
        norm = partial(GroupNorm, eps=1e-5 if adm else 1e-6)
        self.norm0 = norm(inputs)
        self.conv0 = Conv2d(inputs, outputs, 3, *resampling)
        self.affine = EmbeddingLinear(emb_channels, outputs * (2 if adm else 1))
        self.norm1 = norm(outputs)
        self.conv1 = Conv2d(outputs, outputs, 3)
        self.skip = None
        if inputs != outputs or resample:
            kernel = 1 if inputs != outputs or not adm else 0
            self.skip = Conv2d(inputs, outputs, kernel, *resampling)
        if self.heads:
            self.norm2 = norm(outputs)
            self.qkv = Conv2d(outputs, outputs * 3, 1)
            self.proj = Conv2d(outputs, outputs, 1)

    def _attention(self, x: Tensor, weights: Weights | None = None) -> Tensor:
        """Self-attention over pixels of normalised `x`, as tokens `(B, H·W, C)` (no copy if x is
        channels-last). weights: of a fused pass, without the last bias."""

        def linear(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            bias = None if bias is None else bias.to(tokens.dtype)
            return F.linear(tokens, weight.to(tokens.dtype), bias)

        qkv_weight, proj_weight = (
            conv.weight if weights is None else weights[conv.weight]
            for conv in (self.qkv, self.proj)
        )
        # Reorder the weight, not the activations, from the checkpoint's (head, channel, q/k/v) to
        # (q/k/v, head, channel), so that q, k and v are contiguous.
        stored = (qkv_weight.flatten(1), self.qkv.bias)
        weight, bias = (
            part.unflatten(0, (self.heads, -1, 3)).movedim(2, 0).flatten(0, 2) for part in stored
        )
        qkv = linear(x.flatten(2).transpose(1, 2), weight, bias)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        # PyTorch's fast attention has no forward-mode derivative.
        math_only = sdpa_kernel(SDPBackend.MATH) if kernels.transformed() else nullcontext()
        with math_only:
            tokens = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        bias = self.proj.bias if weights is None else None
        tokens = linear(tokens, proj_weight.flatten(1), bias)
        return tokens.transpose(1, 2).unflatten(2, x.shape[2:])

    def forward(self, x: Tensor, emb: Tensor, weights: Weights | None = None) -> Tensor:
        """weights: of a fused pass."""
        if weights is not None:
            return self._fused(x, emb, weights)
        h = self.conv0(F.silu(self.norm0(x)))
        modulation = self.affine(emb).to(h.dtype)[:, :, None, None]
        if self.adm:
            scale, shift = modulation.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = F.silu(self.norm1(h + modulation))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        h = self.skip_scale * (h + (x if self.skip is None else self.skip(x)))
        return self.skip_scale * (h + self._attention(self.norm2(h))) if self.heads else h

    def _fused(self, x: Tensor, emb: Tensor, weights: Weights) -> Tensor:
        h = self.conv0.fused(fused.norm(x, self.norm0), weights)
        modulation, shift = self.affine(emb), self.conv0.bias
        if not self.adm:
            modulation, shift = None, modulation + shift
        h = fused.norm(h, self.norm1, shift, modulation)
        h = self.conv1.fused(F.dropout(h, self.dropout, self.training), weights)
        bias = self.conv1.bias
        if self.skip is not None:
            x = self.skip.fused(x, weights)
            bias = bias + self.skip.bias if self.skip.kernel else bias
        h = fused.residual(h, bias, x, self.skip_scale)
        if not self.heads:
            return h
        attention = self._attention(fused.norm(h, self.norm2, silu=False), weights)
        return fused.residual(attention, self.proj.bias, h, self.skip_scale)


class EDMUNet(ModelMixin, ConfigMixin):
    """Common part of both U-Nets.

    `x` and the result are `(B, C, H, W)`, `c_noise` `(B,)`, `labels` `(B, label_dim)` (zeros mean
    "no label"), `augment_labels` `(B, augment_dim)`.
    """

    adm: ClassVar[bool]
    has_fused_pass: ClassVar[bool] = True

    @classmethod
    def from_pretrained(cls, *args, torch_dtype=None, dtype=None, **kwargs) -> Self:
        """Load as any diffusers model. A network of half precision keeps its Fourier frequencies in
        float32, which diffusers would convert."""
        model = super().from_pretrained(*args, **kwargs)
        dtype = dtype or torch_dtype
        return model if dtype is None else nn.Module.to(model, dtype)

    def _build(self, noise_width: int, channels: int) -> int:
        """Build the layers of the embedding, the encoder and the decoder. noise_width: of
        `map_noise`. channels: output of the first convolution; returns those of the decoder."""
        self._cast: fused.CastWeights | None = None
        self._convolutions: list[Conv2d] | None = None  # found at the first fused pass
        config, linear = self.config, partial(EmbeddingLinear, bias=False)
        emb_channels = config.model_channels * config.channel_mult_emb
        self.map_augment = linear(config.augment_dim, noise_width) if config.augment_dim else None
        self.map_layer0 = EmbeddingLinear(noise_width, emb_channels)
        self.map_layer1 = EmbeddingLinear(emb_channels, emb_channels)
        if self.adm:
            self.map_label = linear(config.label_dim, emb_channels) if config.label_dim else None
        block = partial(UNetBlock, config=config, adm=self.adm)
        levels = [  # name, channels, whether blocks have attention
            (f"{size}x{size}", config.model_channels * mult, size in config.attn_resolutions)
            for level, mult in enumerate(config.channel_mult)
            for size in [config.img_resolution >> level]
        ]
        self.enc, skips, aux_channels = nn.ModuleDict(), [channels], config.in_channels
        for name, width, attention in levels:
            if not self.enc:
                self.enc[f"{name}_conv"] = Conv2d(config.in_channels, channels, 3)
            else:
                self.enc[f"{name}_down"] = block(channels, channels, resample="down")
                skips.append(channels)
                if config.get("encoder_type") == "residual":
                    aux = Conv2d(aux_channels, channels, 3, "fused_down", config.resample_filter)
                    self.enc[f"{name}_aux_residual"], aux_channels = aux, channels
            for i in range(config.num_blocks):
                self.enc[f"{name}_block{i}"] = block(channels, width, attention=attention)
                channels = width
                skips.append(channels)

        self.dec = nn.ModuleDict()
        for name, width, attention in reversed(levels):
            if not self.dec:
                self.dec[f"{name}_in0"] = block(channels, channels, attention=True)
                self.dec[f"{name}_in1"] = block(channels, channels)
            else:
                self.dec[f"{name}_up"] = block(channels, channels, resample="up")
            for i in range(config.num_blocks + 1):
                # SongUNet's decoder has attention only in the last block of a level.
                attends = attention and (self.adm or i == config.num_blocks)
                self.dec[f"{name}_block{i}"] = block(
                    channels + skips.pop(), width, attention=attends
                )
                channels = width
        return channels

    @torch.no_grad()
    def _initialise(self, gains: dict[str, float]) -> None:
        """Draw all parameters except norms: Kaiming-uniform for ADM, or Xavier-uniform with zero
        biases. gains: factors of layers by the last part of their names."""
        for name, module in self.named_modules():
            if not hasattr(module, "weight") or isinstance(module, nn.GroupNorm):
                continue
            fan_in = module.weight[0].numel()
            fan_out = module.weight.numel() // module.weight.shape[1]
            bound = math.sqrt(3 / fan_in if self.adm else 6 / (fan_in + fan_out))
            gain = gains.get(name.rpartition(".")[-1], math.sqrt(1 / 3) if self.adm else 1.0)
            module.weight.uniform_(-bound, bound).mul_(gain)
            if module.bias is not None:
                module.bias.uniform_(-bound, bound).mul_(gain if self.adm else 0.0)

    def _add_label(self, emb: Tensor, labels: Tensor | None) -> Tensor:
        if self.map_label is None:
            return emb
        if self.training and self.config.label_dropout:
            keep = torch.rand(len(labels), 1, device=labels.device) >= self.config.label_dropout
            labels = labels * keep
        scale = 1.0 if self.adm else math.sqrt(labels.shape[1])
        return emb + self.map_label(scale * labels)

    def forward(self, x: Tensor, c_noise: Tensor, labels=None, augment_labels=None) -> Tensor:
        emb = self.map_noise(c_noise)
        if not self.adm:
            cos, sin = emb.chunk(2, dim=1)
            emb = self._add_label(torch.cat([sin, cos], dim=1), labels)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        emb = F.silu(self._add_label(emb, labels) if self.adm else emb)

        weights, autocast = self._fused_weights(x), nullcontext()
        if weights is not None:
            x = x.to(next(iter(weights.values())).dtype, memory_format=torch.channels_last)
            autocast = torch.autocast(x.device.type, enabled=False)
        with autocast:
            return self._unet(x, emb, weights)

    def _unet(self, x: Tensor, emb: Tensor, weights: Weights | None) -> Tensor:
        skips, aux = [], x
        for name, module in self.enc.items():
            if name.endswith("aux_residual"):  # NCSN++
                x = aux = self._add_aux(skips.pop(), module, aux, weights)
            else:
                block = isinstance(module, UNetBlock)
                x = module(x, emb, weights) if block else module(x, weights)
            skips.append(x)
        for name, module in self.dec.items():
            if isinstance(module, UNetBlock):
                x = torch.cat([x, skips.pop()], dim=1) if "_block" in name else x
                x = module(x, emb, weights)
        norm, conv = (self.out_norm, self.out_conv) if self.adm else list(self.dec.values())[-2:]
        if weights is None:
            return conv(F.silu(norm(x)))
        return conv(fused.norm(x, norm), weights)

    def _add_aux(self, x: Tensor, module: Conv2d, aux: Tensor, weights: Weights | None) -> Tensor:
        if weights is None:
            return (x + module(aux)) * math.sqrt(0.5)
        return fused.residual(module.fused(aux, weights), module.bias, x, math.sqrt(0.5))

    def _fused_weights(self, x: Tensor) -> Weights | None:
        """The weights of convolutions for a fused pass: in autocast's dtype or, without autocast,
        their own. None: the pass is plain."""
        if not kernels.usable(x):
            return None
        if self._convolutions is None:  # a search takes as long as several kernels
            self._convolutions = [m for m in self.modules() if isinstance(m, Conv2d) and m.kernel]
        convolutions = [m.weight for m in self._convolutions]
        largest, layout = max(convolutions, key=Tensor.numel), torch.channels_last
        # With one channel or one pixel, all layouts are the same.
        if largest.is_contiguous() or not largest.is_contiguous(memory_format=layout):
            return None
        kind, dtype = x.device.type, largest.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        if not kernels.agrees(f"{fused.__name__}, {dtype}", partial(fused.check, x.device, dtype)):
            return None
        if self._cast is None:
            self._cast = fused.CastWeights()
        return self._cast(convolutions, dtype)


class SongUNet(EDMUNet):
    """DDPM++ and NCSN++ (Song et al. 2021) in EDM's version.

    DDPM++ ("VP"): `embedding_type` positional, `encoder_type` standard, `channel_mult_noise` 1,
    `resample_filter` [1, 1]. NCSN++ ("VE"): fourier, residual, 2, [1, 3, 3, 1].
    """

    adm = False

    @register_to_config
    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
        embedding_type: str = "positional",
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        decoder_type: str = "standard",
        resample_filter: Sequence[int] = (1, 1),
    ):
        super().__init__()
        known = {"embedding_type": ("positional", "fourier"), "decoder_type": ("standard",)}
        for name, values in {**known, "encoder_type": ("standard", "residual")}.items():
            if self.config[name] not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}")
        width = model_channels * channel_mult_noise
        self.map_noise = NoiseEmbedding(width, embedding_type, endpoint=True)
        self.map_label = EmbeddingLinear(label_dim, width) if label_dim else None
        channels = self._build(width, model_channels)
        size = f"{img_resolution}x{img_resolution}"
        self.dec[f"{size}_aux_norm"] = GroupNorm(channels, eps=1e-6)
        self.dec[f"{size}_aux_conv"] = Conv2d(channels, out_channels, 3)

        last = dict.fromkeys((f"{size}_aux_conv", "conv1", "proj"), 1e-5)
        self._initialise({**last, "qkv": math.sqrt(0.2)})


class DhariwalUNet(EDMUNet):
    """ADM (Dhariwal and Nichol 2021) in EDM's version."""

    adm = True

    @register_to_config
    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
    ):
        super().__init__()
        self.map_noise = NoiseEmbedding(model_channels, "positional")
        channels = self._build(model_channels, model_channels * channel_mult[0])
        self.out_norm = GroupNorm(channels, eps=1e-5)
        self.out_conv = Conv2d(channels, out_channels, 3)

        self._initialise(dict.fromkeys(("conv1", "proj", "out_conv", "map_augment"), 0.0))
        if self.map_label is not None:
            nn.init.normal_(self.map_label.weight)
