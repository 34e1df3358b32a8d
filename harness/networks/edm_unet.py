"""EDM's U-Nets (Karras et al. 2022, arXiv 2206.00364), written from a specification.

Arguments, module names and tensor shapes are those of the official checkpoints. Parameters are
float32. Under autocast the image path runs in bfloat16, but the noise and label embedding in
float32, because its phases reach hundreds of radians.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn import functional as F


class EmbeddingLinear(nn.Linear):
    """A linear layer of the embedding, always in float32."""

    def forward(self, x: Tensor) -> Tensor:
        if x.is_meta:  # autocast does not support meta tensors
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class GroupNorm(nn.GroupNorm):
    """Group norm in the dtype of its input, with float32 sums inside. Autocast would return
    float32, which doubles the memory traffic of the operations that follow."""

    def __init__(self, channels: int, eps: float):
        super().__init__(min(32, channels // 4), channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class Conv2d(nn.Module):
    """A convolution of odd size `kernel` (0: none), after an optional up- or downsampling by 2.

    fused_down: convolve, then downsample, as in NCSN++'s residual path; differs at the border.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        up: bool = False,
        down: bool = False,
        taps: Sequence[int] = (1, 1),
        fused_down: bool = False,
    ):
        super().__init__()
        self.up, self.down, self.fused_down = up, down, fused_down
        self.box = tuple(taps) == (1, 1)  # equals average pooling and nearest neighbour
        self.kernel, self.filter_padding = kernel, (len(taps) - 1) // 2
        if kernel:
            self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel, kernel))
            self.bias = nn.Parameter(torch.empty(out_channels))
        if up or down:
            f = torch.tensor(taps, dtype=torch.float32)
            self.register_buffer("resample_filter", (torch.outer(f, f) / f.sum() ** 2)[None, None])

    def _depthwise(self, x: Tensor, gain: float = 1.0) -> Tensor:
        return (gain * self.resample_filter).to(x.dtype).expand(x.shape[1], -1, -1, -1)

    def forward(self, x: Tensor) -> Tensor:
        padding = self.kernel // 2
        if self.fused_down:
            x = F.conv2d(x, self.weight.to(x.dtype), padding=padding + self.filter_padding)
            x = F.conv2d(x, self._depthwise(x), stride=2, groups=x.shape[1])
            return x + self.bias.to(x.dtype).view(1, -1, 1, 1)
        depthwise = {"stride": 2, "padding": self.filter_padding, "groups": x.shape[1]}
        if self.down and self.box:
            x = F.avg_pool2d(x, 2)
        elif self.down:
            x = F.conv2d(x, self._depthwise(x), **depthwise)
        elif self.up and self.box:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        elif self.up:
            x = F.conv_transpose2d(x, self._depthwise(x, gain=4.0), **depthwise)
        if self.kernel:
            x = F.conv2d(x, self.weight.to(x.dtype), self.bias.to(x.dtype), padding=padding)
        return x


class PositionalEmbedding(nn.Module):
    """Cosines, then sines, of `x` `(B,)` at `size / 2` frequencies from 1 to 1/10000 (`endpoint`:
    inclusive)."""

    def __init__(self, size: int, endpoint: bool):
        super().__init__()
        self.half, self.endpoint = size // 2, endpoint

    def forward(self, x: Tensor) -> Tensor:
        exponent = torch.arange(self.half, dtype=torch.float32, device=x.device)
        exponent = exponent / (self.half - int(self.endpoint))
        phase = torch.outer(x.float(), (1 / 10000) ** exponent)
        return torch.cat([phase.cos(), phase.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """Cosines, then sines, of `x` `(B,)` at fixed random frequencies."""

    def __init__(self, size: int):
        super().__init__()
        self.register_buffer("freqs", torch.randn(size // 2) * 16.0)

    def forward(self, x: Tensor) -> Tensor:
        # Multiply 2π·freqs first: at hundreds of radians the order of the products is visible.
        phase = torch.outer(x.float(), 2 * math.pi * self.freqs)
        return torch.cat([phase.cos(), phase.sin()], dim=1)


class UNetBlock(nn.Module):
    """A residual block modulated by the embedding, with self-attention if `heads` > 0.

    adm: ADM's block, with a scale and shift after the second norm. Otherwise SongUNet's, with a
    shift before it, sums scaled by sqrt(1/2), and a convolution in every resampling skip.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        adm: bool,
        heads: int = 0,
        up: bool = False,
        down: bool = False,
        taps: Sequence[int] = (1, 1),
        dropout: float = 0.0,
    ):
        super().__init__()
        self.heads, self.adm, self.dropout = heads, adm, dropout
        self.skip_scale = 1.0 if adm else math.sqrt(0.5)
        eps, resampling = 1e-5 if adm else 1e-6, {"up": up, "down": down, "taps": taps}
        self.norm0 = GroupNorm(in_channels, eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, **resampling)
        self.affine = EmbeddingLinear(emb_channels, out_channels * (2 if adm else 1))
        self.norm1 = GroupNorm(out_channels, eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3)
        self.skip = None
        if in_channels != out_channels or up or down:
            kernel = 1 if in_channels != out_channels or not adm else 0
            self.skip = Conv2d(in_channels, out_channels, kernel, **resampling)
        if heads:
            self.norm2 = GroupNorm(out_channels, eps)
            self.qkv = Conv2d(out_channels, out_channels * 3, 1)
            self.proj = Conv2d(out_channels, out_channels, 1)

    def _attention(self, x: Tensor) -> Tensor:
        """Self-attention over pixels, as tokens `(B, H·W, C)` (no copy if x is channels-last)."""
        batch, channels, height, width = x.shape
        # Reorder the weight, not the activations, from the checkpoint's (head, channel, q/k/v) to
        # (q/k/v, head, channel), so that q, k and v are contiguous.
        order = (3, self.heads, channels // self.heads)
        weight = self.qkv.weight.view(order[1], order[2], 3, channels).permute(2, 0, 1, 3)
        bias = self.qkv.bias.view(order[1], order[2], 3).permute(2, 0, 1)
        tokens = self.norm2(x).flatten(2).transpose(1, 2)
        weight, bias = weight.reshape(-1, channels), bias.reshape(-1)
        qkv = F.linear(tokens, weight.to(tokens.dtype), bias.to(tokens.dtype))
        q, k, v = qkv.view(batch, height * width, *order).unbind(2)
        result = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
        tokens = result.transpose(1, 2).reshape(batch, height * width, channels)
        weight, bias = self.proj.weight.flatten(1), self.proj.bias
        tokens = F.linear(tokens, weight.to(tokens.dtype), bias.to(tokens.dtype))
        return tokens.transpose(1, 2).reshape(batch, channels, height, width)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv0(F.silu(self.norm0(x)))
        modulation = self.affine(emb).to(h.dtype)[:, :, None, None]
        if self.adm:
            scale, shift = modulation.chunk(2, dim=1)
            h = F.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = F.silu(self.norm1(h + modulation))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        h = self.skip_scale * (h + (x if self.skip is None else self.skip(x)))
        if self.heads:
            h = self.skip_scale * (h + self._attention(h))
        return h


@torch.no_grad()
def _initialise(network: nn.Module, xavier: bool, gain: Callable[[str], float]) -> None:
    """Draw all parameters except norms: Xavier-uniform with zero biases, or Kaiming-uniform.

    gain: the factor of a layer by the last part of its name.
    """
    for name, module in network.named_modules():
        if not hasattr(module, "weight") or isinstance(module, nn.GroupNorm):
            continue
        fan_in = module.weight[0].numel()
        fan_out = module.weight.numel() // module.weight.shape[1]
        bound = math.sqrt(6 / (fan_in + fan_out) if xavier else 3 / fan_in)
        factor = gain(name.rpartition(".")[-1])
        module.weight.uniform_(-bound, bound).mul_(factor)
        if module.bias is not None:
            module.bias.uniform_(-bound, bound).mul_(0.0 if xavier else factor)


class EDMUNet(ModelMixin, ConfigMixin):
    """Common part of both U-Nets.

    `x` and the result are `(B, C, H, W)`, `c_noise` `(B,)`, `labels` `(B, label_dim)` (zeros mean
    "no label"), `augment_labels` `(B, augment_dim)`.
    """

    def _build(self, channels: int, adm: bool, taps: Sequence[int] = (1, 1)) -> int:
        """Build encoder and decoder; returns the channels of the decoder's output.

        channels: output of the first convolution. adm: ADM's blocks, with 64 channels per attention
        head. Otherwise there is one head, and in the decoder only in the last block of a level.
        """
        config = self.config
        options = {"adm": adm, "taps": taps, "dropout": config.dropout}
        options["emb_channels"] = config.model_channels * config.channel_mult_emb
        block = partial(UNetBlock, **options)
        levels = []  # name, channels, attention heads
        for level, mult in enumerate(config.channel_mult):
            size, width = config.img_resolution >> level, config.model_channels * mult
            heads = width // 64 if adm else 1
            levels.append((f"{size}x{size}", width, heads * (size in config.attn_resolutions)))

        self.enc, skips, aux_channels = nn.ModuleDict(), [], config.in_channels
        for level, (name, width, heads) in enumerate(levels):
            if level == 0:
                self.enc[f"{name}_conv"] = Conv2d(config.in_channels, channels, 3)
            else:
                self.enc[f"{name}_down"] = block(channels, channels, down=True)
                if config.get("encoder_type") == "residual":
                    self.enc[f"{name}_aux_residual"] = Conv2d(
                        aux_channels, channels, 3, down=True, taps=taps, fused_down=True
                    )
                    aux_channels = channels
            skips.append(channels)
            for i in range(config.num_blocks):
                self.enc[f"{name}_block{i}"] = block(channels, width, heads=heads)
                channels = width
                skips.append(channels)

        self.dec = nn.ModuleDict()
        for level, (name, width, heads) in reversed(list(enumerate(levels))):
            if level == len(levels) - 1:
                middle_heads = channels // 64 if adm else 1
                self.dec[f"{name}_in0"] = block(channels, channels, heads=middle_heads)
                self.dec[f"{name}_in1"] = block(channels, channels)
            else:
                self.dec[f"{name}_up"] = block(channels, channels, up=True)
            for i in range(config.num_blocks + 1):
                attention = heads if adm or i == config.num_blocks else 0
                self.dec[f"{name}_block{i}"] = block(channels + skips.pop(), width, heads=attention)
                channels = width
        return channels

    def _drop(self, labels: Tensor) -> Tensor:
        if not (self.training and self.config.label_dropout):
            return labels
        keep = torch.rand(len(labels), 1, device=labels.device) >= self.config.label_dropout
        return labels * keep

    def forward(
        self,
        x: Tensor,
        c_noise: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        emb = self.embedding(c_noise, labels, augment_labels)
        skips, aux = [], x
        for module in self.enc.values():
            if isinstance(module, UNetBlock):
                x = module(x, emb)
            elif module.fused_down:  # the residual path of NCSN++
                x = aux = skips[-1] = (x + module(aux)) * math.sqrt(0.5)
                continue
            else:
                x = module(x)
            skips.append(x)
        for name, module in self.dec.items():
            if isinstance(module, UNetBlock):
                if "_block" in name:
                    x = torch.cat([x, skips.pop()], dim=1)
                x = module(x, emb)
        return self.output(x)


class SongUNet(EDMUNet):
    """DDPM++ and NCSN++ (Song et al. 2021) in EDM's version.

    DDPM++ ("VP"): `embedding_type` positional, `encoder_type` standard, `channel_mult_noise` 1,
    `resample_filter` [1, 1]. NCSN++ ("VE"): fourier, residual, 2, [1, 3, 3, 1].
    """

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
        for name, known in (
            ("embedding_type", ("positional", "fourier")),
            ("encoder_type", ("standard", "residual")),
            ("decoder_type", ("standard",)),
        ):
            if self.config[name] not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}")
        width, emb_channels = model_channels * channel_mult_noise, model_channels * channel_mult_emb
        if embedding_type == "fourier":
            self.map_noise = FourierEmbedding(width)
        else:
            self.map_noise = PositionalEmbedding(width, endpoint=True)
        self.map_label = EmbeddingLinear(label_dim, width) if label_dim else None
        self.map_augment = EmbeddingLinear(augment_dim, width, bias=False) if augment_dim else None
        self.map_layer0 = EmbeddingLinear(width, emb_channels)
        self.map_layer1 = EmbeddingLinear(emb_channels, emb_channels)
        channels = self._build(model_channels, adm=False, taps=tuple(resample_filter))
        size = f"{img_resolution}x{img_resolution}"
        self.dec[f"{size}_aux_norm"] = GroupNorm(channels, eps=1e-6)
        self.dec[f"{size}_aux_conv"] = Conv2d(channels, out_channels, 3)

        gains = {"conv1": 1e-5, "proj": 1e-5, "qkv": math.sqrt(0.2)}
        _initialise(self, True, lambda name: 1e-5 if "aux_conv" in name else gains.get(name, 1.0))

    def embedding(self, c_noise: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        cos, sin = self.map_noise(c_noise).chunk(2, dim=1)
        emb = torch.cat([sin, cos], dim=1)
        if self.map_label is not None:
            labels = self._drop(labels)
            emb = emb + self.map_label(math.sqrt(labels.shape[1]) * labels)
        if self.map_augment is not None and augment is not None:
            emb = emb + self.map_augment(augment)
        return F.silu(self.map_layer1(F.silu(self.map_layer0(emb))))

    def output(self, x: Tensor) -> Tensor:
        *_, norm, conv = self.dec.values()
        return conv(F.silu(norm(x)))


class DhariwalUNet(EDMUNet):
    """ADM (Dhariwal and Nichol 2021) in EDM's version, with 64 channels per attention head."""

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
        width, emb_channels = model_channels, model_channels * channel_mult_emb
        self.map_noise = PositionalEmbedding(width, endpoint=False)
        self.map_augment = EmbeddingLinear(augment_dim, width, bias=False) if augment_dim else None
        self.map_layer0 = EmbeddingLinear(width, emb_channels)
        self.map_layer1 = EmbeddingLinear(emb_channels, emb_channels)
        self.map_label = EmbeddingLinear(label_dim, emb_channels, bias=False) if label_dim else None
        channels = self._build(width * channel_mult[0], adm=True)
        self.out_norm = GroupNorm(channels, eps=1e-5)
        self.out_conv = Conv2d(channels, out_channels, 3)

        zero = ("conv1", "proj", "out_conv", "map_augment")
        _initialise(self, False, lambda name: 0.0 if name in zero else math.sqrt(1 / 3))
        if self.map_label is not None:
            nn.init.normal_(self.map_label.weight)

    def embedding(self, c_noise: Tensor, labels: Tensor | None, augment: Tensor | None) -> Tensor:
        emb = self.map_noise(c_noise)
        if self.map_augment is not None and augment is not None:
            emb = emb + self.map_augment(augment)
        emb = self.map_layer1(F.silu(self.map_layer0(emb)))
        if self.map_label is not None:
            emb = emb + self.map_label(self._drop(labels))
        return F.silu(emb)

    def output(self, x: Tensor) -> Tensor:
        return self.out_conv(F.silu(self.out_norm(x)))
