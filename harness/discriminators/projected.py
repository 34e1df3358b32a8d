"""GDD's discriminator as its authors build it: heads on random mixtures of the feature maps of
frozen pretrained networks (projected GAN, Sauer et al. 2021, arXiv 2111.01007; GDD, Zheng and Yang
2024, arXiv 2405.20750).

Written from facts about the authors' code (GDD, commit e9267e8), which differs from the papers'
text, and compared with numbers that this code computed. The features are in evaluation mode and the
discriminator in train mode throughout, both in float32.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, embedding, interpolate, leaky_relu, linear, normalize

from harness.denoiser import Condition
from harness.errors import UserError

MIXED_CHANNELS = (64, 128, 256, 512)  # after the mixing across channels, fine to coarse
OUTPUT_CHANNELS = (64, 64, 128, 256)  # after the mixing across scales: inputs of the heads
HEAD_WIDTHS = (64, 128, 256, 512)  # of the finest head's blocks; coarser heads omit the first
CLASS_WIDTH = 64  # channels of a conditional head's output, compared with the class vector
TABLE_WIDTH = 320  # numbers per class in the authors' table


class Trunk(Protocol):
    """A frozen pretrained network: `harness.features.timm_backbones.Backbone`."""

    native_channels: Sequence[int]
    native_stride: int
    is_transformer: bool

    def set_input_size(self, resolution: int) -> None: ...
    def normalise(self, x: Tensor) -> Tensor: ...
    def native_maps(self, x: Tensor) -> list[Tensor]: ...


def reassembly(width: int) -> nn.ModuleList:
    """Layers that turn four maps of a plain transformer's tokens `(B, width, h, w)` into a pyramid:
    `(B, width/8, 4h, 4w)`, `(B, width/4, 2h, 2w)`, `(B, width/2, h, w)`, `(B, width, h/2, w/2)`."""
    eighth, quarter, half = width // 8, width // 4, width // 2
    return nn.ModuleList(
        nn.Sequential(*layers)
        for layers in (
            (nn.Conv2d(width, eighth, 1), nn.ConvTranspose2d(eighth, eighth, 4, stride=4)),
            (nn.Conv2d(width, quarter, 1), nn.ConvTranspose2d(quarter, quarter, 2, stride=2)),
            (nn.Conv2d(width, half, 1),),
            (nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 3, stride=2, padding=1)),
        )
    )


class RandomProjection(nn.Module):
    """Random linear mixing of one trunk's four maps, with PyTorch's default initialisation.

    A transformer's maps are reassembled to a pyramid first. Across channels: a 1x1 convolution per
    map to `MIXED_CHANNELS`. Across scales, from coarse to fine: add the result of the coarser
    scale, upsample by two bilinearly with aligned corners, and apply a 1x1 convolution to
    `OUTPUT_CHANNELS`. Maps `(B, C_i, H_i, W_i)` become `(B, OUTPUT_CHANNELS[i], 2H_i, 2W_i)`.
    """

    def __init__(self, channels: Sequence[int], is_transformer: bool = False):
        super().__init__()
        self.reassembly = None
        if is_transformer:
            width = channels[0]
            self.reassembly = reassembly(width)
            channels = (width // 8, width // 4, width // 2, width)
        self.across_channels = nn.ModuleList(
            nn.Conv2d(a, b, 1) for a, b in zip(channels, MIXED_CHANNELS, strict=True)
        )
        self.across_scales = nn.ModuleList(
            nn.Conv2d(a, b, 1) for a, b in zip(MIXED_CHANNELS, OUTPUT_CHANNELS, strict=True)
        )

    def forward(self, maps: Iterable[Tensor]) -> list[Tensor]:
        if self.reassembly:
            maps = [layers(x) for layers, x in zip(self.reassembly, maps, strict=True)]
        outputs: list[Tensor] = []  # from coarse to fine
        layers = zip(maps, self.across_channels, self.across_scales, strict=True)
        for x, channels, scales in reversed(list(layers)):
            h = channels(x)
            if outputs:
                h += outputs[-1]
            # A 1x1 convolution commutes with the resampling, and costs a quarter before it.
            h = interpolate(scales(h), scale_factor=2, mode="bilinear", align_corners=True)
            outputs.append(h)
        return outputs[::-1]


class ProjectedFeatures(nn.Module):
    """The frozen part: trunks and `projections` random projections of the maps of each.

    The authors draw another projection in each process; several projections let one process imitate
    several. resolution: of the trunks' inputs, pixels. Always in evaluation mode. Twice
    differentiable with respect to the images. Only trained networks are saved: a resumed run draws
    the projections again under the same seed.
    """

    def __init__(self, trunks: Sequence[Trunk], projections: int = 1, resolution: int = 224):
        super().__init__()
        self.resolution = resolution
        for trunk in trunks:
            stride = trunk.native_stride * (2 if trunk.is_transformer else 1)
            if resolution % stride or resolution < 4 * stride:
                message = f"resolution: {resolution}, but a backbone with maps of stride {stride}"
                message += f" needs a multiple of {stride}, at least {4 * stride}"
                raise UserError(message, "resolution")
            trunk.set_input_size(resolution)
        self.trunks = nn.ModuleList(trunks)
        self.projections = nn.ModuleList(
            nn.ModuleList(RandomProjection(t.native_channels, t.is_transformer) for t in trunks)
            for _ in range(projections)
        )
        self.map_channels = OUTPUT_CHANNELS * len(trunks)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "ProjectedFeatures":
        return super().train(False)

    def forward(self, pixels: Tensor, projections: Sequence[int] = (0,)) -> list[Tensor]:
        """Maps of images `(B, 1 or 3, H, W)` in [-1, 1]: four per trunk, fine to coarse, one trunk
        after the other. The batch consists of `len(projections)` equal consecutive groups; group i
        passes through projection number `projections[i]`, modulo the number of projections."""
        _check_groups(pixels, len(projections))
        outputs: list[Tensor] = []
        size = (self.resolution, self.resolution)
        for number, trunk in enumerate(self.trunks):
            x = trunk.normalise(pixels)
            if x.shape[2:] != size:
                x = interpolate(x, size, mode="bilinear")
            groups = zip(*(m.chunk(len(projections)) for m in trunk.native_maps(x)), strict=True)
            projected = [
                self.projections[index % len(self.projections)][number](maps)
                for index, maps in zip(projections, groups, strict=True)
            ]
            outputs += map(_join, zip(*projected, strict=True))
        return outputs


def _check_groups(x: Tensor, groups: int) -> None:
    if len(x) % groups:
        raise ValueError(f"a batch of {len(x)} cannot be split into {groups} equal groups")


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


# -- the trained part -----------------------------------------------------------------------------


class SpectralConv2d(nn.Conv2d):
    """A convolution whose weight, as a matrix `(C_out, C_in k k)`, is divided by an estimate of its
    largest singular value (Miyato et al. 2018): `u·Wv` with vectors u and v from one power
    iteration per forward pass in train mode with `iterate`, v before u, and none at construction.

    The semantics of `torch.nn.utils.spectral_norm`, which is deprecated and whose modules cannot be
    copied after a forward pass; `torch.nn.utils.parametrizations.spectral_norm` updates u before v
    and iterates 15 times at construction."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        matrix = self.weight.flatten(1)
        self.register_buffer("u", normalize(torch.randn(matrix.shape[0]), dim=0))
        self.register_buffer("v", normalize(torch.randn(matrix.shape[1]), dim=0))

    def sigma(self, iterate: bool = True) -> Tensor:
        """The estimate of the largest singular value, after a power iteration in train mode."""
        matrix = self.weight.flatten(1)
        if self.training and iterate:
            with torch.no_grad():
                # New tensors: graphs of earlier forward passes hold theirs.
                v = normalize(matrix.t() @ self.u, dim=0, eps=1e-12)
                u = normalize(matrix @ v, dim=0, eps=1e-12)
                self.u.copy_(u)
                self.v.copy_(v)
        else:
            u, v = self.u.clone(), self.v.clone()
        return u @ (matrix @ v)

    def forward(self, x: Tensor, iterate: bool = True) -> Tensor:
        kind = self.weight.device.type
        with torch.autocast("cpu" if kind == "meta" else kind, enabled=False):
            sigma = self.sigma(iterate)
        return self._conv_forward(x, self.weight / sigma, self.bias)


class GhostBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation with separate statistics for each of `groups` equal consecutive groups of
    the batch ("ghost batches"), which are the batches of separate processes. The running statistics
    follow the first group."""

    def forward(self, x: Tensor, groups: int = 1) -> Tensor:
        if groups == 1 or not self.training:
            return super().forward(x)
        first, *others = x.chunk(groups)
        affine = {"weight": self.weight, "bias": self.bias, "training": True, "eps": self.eps}
        return torch.cat(
            [super().forward(first), *(batch_norm(part, None, None, **affine) for part in others)]
        )


class Block(nn.Module):
    """Halve a map: 4x4 convolution with stride 2, batch normalisation, LeakyReLU."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.conv = SpectralConv2d(channels, out_channels, 4, stride=2, padding=1)
        self.norm = GhostBatchNorm2d(out_channels)

    def forward(self, x: Tensor, groups: int = 1, iterate: bool = True) -> Tensor:
        return leaky_relu(self.norm(self.conv(x, iterate), groups), 0.2, inplace=True)


class ClassVector(nn.Module):
    """Class vectors `(B, CLASS_WIDTH)` of labels int64 `(B,)`: rows of a trained copy of a table
    `(rows, D)`, a linear layer with equalised learning rate (weights are standard normal and scaled
    by 1/√D in every pass), LeakyReLU, √2."""

    def __init__(self, table: Tensor):
        super().__init__()
        self.table = nn.Parameter(table.detach().clone())
        self.weight = nn.Parameter(torch.randn(CLASS_WIDTH, table.shape[1]))
        self.bias = nn.Parameter(torch.zeros(CLASS_WIDTH))

    def forward(self, labels: Tensor) -> Tensor:
        rows = embedding(labels, self.table)
        h = linear(rows, self.weight / self.weight.shape[1] ** 0.5, self.bias)
        return leaky_relu(h, 0.2) * 2**0.5


class ProjectedHead(nn.Module):
    """One discriminator: a map `(B, C, H, W)` -> logits `(B, K)`, one per position in row-major
    order. Blocks of `widths` channels, then a 4x4 convolution without padding or bias. With a class
    table a logit is the product of the output at its position and the class vector, divided by the
    square root of their width; there is no class-independent term."""

    def __init__(self, channels: int, widths: Sequence[int], table: Tensor | None):
        super().__init__()
        self.blocks = nn.ModuleList(Block(a, b) for a, b in pairwise((channels, *widths)))
        outputs = 1 if table is None else CLASS_WIDTH
        self.output = SpectralConv2d(widths[-1], outputs, 4, bias=False)
        self.classes = None if table is None else ClassVector(table)

    def forward(
        self, x: Tensor, condition: Condition, groups: int = 1, iterate: bool = True
    ) -> Tensor:
        for block in self.blocks:
            x = block(x, groups, iterate)
        h = self.output(x, iterate).flatten(2)
        if self.classes is None:
            return h.squeeze(1)
        return (h * self.classes(condition)[:, :, None]).sum(dim=1) / CLASS_WIDTH**0.5


class ProjectedDiscriminator(nn.Module):
    """One head per map of `ProjectedFeatures`, with 4, 3, 2 and 1 blocks for each trunk.

    class_table: `(rows, D)`; class i reads row i, and each head trains its own copy. Without a
    table each head starts from standard normal rows. Not used if `num_classes` is 0."""

    def __init__(self, features: nn.Module, num_classes: int, class_table: Tensor | None = None):
        super().__init__()
        if class_table is not None and num_classes > len(class_table):
            message = f"class_table: {len(class_table)} rows for {num_classes} classes; "
            raise UserError(message + "set class_table: random", "class-table")
        heads = []
        for number, channels in enumerate(features.map_channels):
            table = class_table if num_classes else None
            if num_classes and class_table is None:
                table = torch.randn(num_classes, TABLE_WIDTH)
            widths = HEAD_WIDTHS[number % len(HEAD_WIDTHS) :]
            heads.append(ProjectedHead(channels, widths, table))
        self.heads = nn.ModuleList(heads)

    def forward(
        self, maps: list[Tensor], condition: Condition, groups: int = 1, iterate: bool = True
    ) -> list[Tensor]:
        """Logits `(B, K)` per head. Batch normalisation uses separate statistics for each of
        `groups` equal consecutive groups of the batch. iterate: once in each spectral norm; False
        in all micro-batches but the first, since more of them must not iterate more often."""
        _check_groups(maps[0], groups)
        heads = zip(self.heads, maps, strict=True)
        return [head(x, condition, groups, iterate) for head, x in heads]
