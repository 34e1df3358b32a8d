"""A compact projected discriminator: trained heads on random mixtures of frozen pretrained
features, of any width, conditioned on class or text. Written from the text of Sauer et al. 2021
(Projected GANs, arXiv 2111.01007); docstrings name our choices where it leaves them open. GDD's
authors build another network: `harness.discriminators.projected`."""

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.nn.utils.parametrizations import spectral_norm

from harness.denoiser import Condition
from harness.discriminators.embeddings import condition_embedding
from harness.features.timm_backbones import STRIDES, Backbone


class RandomPyramid(nn.Module):
    """Random mixing across channels (CCM), then across scales (CSM), of one backbone's four maps.
    CCM: a 1x1 convolution per map, to `cout * (1, 2, 4, 8)` channels from fine to coarse
    ("expand"). CSM, from coarse to fine: add the result of the coarser scale, apply a 3x3
    convolution to the channels of the next finer map (the finest map keeps its own), and upsample
    by two bilinearly. Kaiming-normal weights, no bias. Maps `(B, C_i, S/s_i, S/s_i)` for s_i = 4,
    8, 16, 32 become `(B, cout * (1, 1, 2, 4)[i], 2S/s_i, 2S/s_i)`."""

    def __init__(self, channels: Sequence[int], cout: int):
        super().__init__()
        widths = [cout * 2**i for i in range(len(channels))]
        self.map_channels = (cout, *widths[:-1])
        self.across_channels = nn.ModuleList(
            nn.Conv2d(a, b, 1, bias=False) for a, b in zip(channels, widths, strict=True)
        )
        self.across_scales = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1, bias=False)
            for a, b in zip(widths, self.map_channels, strict=True)
        )
        for convolution in (*self.across_channels, *self.across_scales):
            nn.init.kaiming_normal_(convolution.weight)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        mixed: list[Tensor] = []  # from coarse to fine
        layers = zip(maps, self.across_channels, self.across_scales, strict=True)
        for x, channels, scales in reversed(list(layers)):
            h = channels(x) + mixed[-1] if mixed else channels(x)
            mixed.append(interpolate(scales(h), scale_factor=2, mode="bilinear"))
        return mixed[::-1]


class CompactFeatures(nn.Module):
    """The frozen part: backbones and their random pyramids. `forward(pixels)`: `(B, 1 or 3, H, W)`
    in [-1, 1], resized bilinearly to `resolution` -> four maps per backbone from fine to coarse,
    one backbone after the other. Twice differentiable. Only trained networks are saved: a resumed
    run draws the mixing weights again under the same seed."""

    def __init__(self, backbones: Sequence[Backbone], cout: int, resolution: int = 224):
        super().__init__()
        self.resolution = resolution
        self.backbones = nn.ModuleList(backbones)
        for backbone in backbones:
            backbone.set_input_size(resolution)
        self.pyramids = nn.ModuleList(RandomPyramid(b.map_channels, cout) for b in backbones)
        self.map_channels = tuple(c for p in self.pyramids for c in p.map_channels)
        self.requires_grad_(False).eval()

    def forward(self, pixels: Tensor) -> list[Tensor]:
        x = interpolate(pixels.expand(-1, 3, -1, -1), (self.resolution,) * 2, mode="bilinear")
        networks = zip(self.backbones, self.pyramids, strict=True)
        return [m for backbone, pyramid in networks for m in pyramid(backbone(x))]


class CompactHead(nn.Module):
    """One discriminator: a map `(B, C, H, W)` and labels -> logits `(B, H', W')`.
    Blocks of a spectrally normalised 4x4 convolution with stride 2, GroupNorm and LeakyReLU reduce
    the map to 1/32 of the image size; a last 4x4 convolution gives the logit. With labels it also
    gives a vector per position, whose product with a learned class embedding is added to the logit
    (Miyato and Koyama 2018). Ours: GroupNorm (groups of about 16 channels) instead of batch
    normalisation, so that a logit depends on one image only; widths double as the size halves."""

    def __init__(self, channels: int, widths: list[int], classes: int, size: int, text_width: int):
        super().__init__()
        blocks = [
            nn.Sequential(
                spectral_norm(nn.Conv2d(a, b, 4, stride=2, padding=1)),
                nn.GroupNorm(math.gcd(b, max(1, b // 16)), b),
                nn.LeakyReLU(0.2),
            )
            for a, b in pairwise([channels, *widths])
        ]
        self.blocks = nn.Sequential(*blocks)
        conditional = classes or text_width
        self.embed = condition_embedding(classes, size, text_width) if conditional else None
        outputs = 1 + size if conditional else 1
        self.output = spectral_norm(nn.Conv2d(widths[-1], outputs, 4, padding=1))

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        h = self.output(self.blocks(x))
        logits = h[:, 0]
        if self.embed is None or condition is None:
            return logits
        embedding = self.embed(condition)
        product = (h[:, 1:] * embedding[:, :, None, None]).sum(dim=1)
        return logits + product / embedding.shape[1] ** 0.5


class CompactDiscriminator(nn.Module):
    """One head per map of `CompactFeatures`; the logits of all heads have one low resolution."""

    def __init__(self, features: nn.Module, num_classes: int, cout: int, text_width: int = 0):
        super().__init__()
        widths = [cout * 2**i for i in range(len(STRIDES))]
        self.heads = nn.ModuleList(
            CompactHead(channels, widths[i % len(STRIDES) :], num_classes, cout, text_width)
            for i, channels in enumerate(features.map_channels)
        )

    def forward(self, maps: list[Tensor], condition: Condition) -> list[Tensor]:
        """Logits `(B, H', W')` per head."""
        return [head(x, condition) for head, x in zip(self.heads, maps, strict=True)]
