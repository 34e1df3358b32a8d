"""Inception of 2015-12-05, the network of every published FID, as torch-fidelity has it.

Its weights are TensorFlow's own, converted; it resizes to 299 x 299 as TensorFlow 1 did (bilinear,
no antialiasing), so images come as they are.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from harness.errors import UserError
from harness.io.downloads import fetch, load_pickled

WEIGHTS = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
RESIZE = "to 299 x 299 inside the network, bilinear as TensorFlow 1"
# By the protocol. clean-fid's legacy_tensorflow leaves the resize to the network, as EDM does: on
# 8-bit images their numbers are the same.
RESIZES = {
    "edm": RESIZE,
    "clean": "to 299 x 299 before the network, PIL's bicubic, not quantised (clean-fid)",
    "legacy-tensorflow": f"{RESIZE} (clean-fid's legacy_tensorflow)",
    "coco": "to 256 x 256 by PIL's Lanczos, 8 bits, then as clean (text-to-image papers, COCO)",
    "patch": "none: the 299 x 299 pixels in the middle",
}
COCO, SIZE = 256, 299
DIM = 2048
PRETRAINING = "imagenet-1k"  # as `harness.features.timm_backbones.pretraining_set` names it
BLOCK = 64  # images at a time: 1 GB of activations


def fetch_weights(source: str | None = None) -> Path:
    """The weights' file: `source`, a local file, or the published one, downloaded once. A file of
    another hash, or none at all, is a `UserError`."""
    return fetch(source or WEIGHTS, SHA256)


class Inception(nn.Module):
    """uint8 images `(B, 1 or 3, H, W)` of any size -> features `(B, 2048)` of the last pooling and
    probabilities `(B, 1008)`, those of the Inception Score (logits without their bias, as in
    Salimans et al. 2016); float32, on the images' device. `resize`: one of RESIZES."""

    def __init__(self, network: nn.Module, resize: str = "edm"):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.resize = resize

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        device = self.network.fc.weight.device
        blocks = []
        # A GPU would convolve in TensorFloat-32, and features differ from machine to machine.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False), self._resizing():
            for block in pixels.split(BLOCK):
                rgb = self._prepared(block.expand(-1, 3, -1, -1)).to(device)
                features, logits = self.network(rgb)
                blocks.append((features, logits.softmax(dim=1)))
        return tuple(torch.cat(parts).to(pixels.device) for parts in zip(*blocks, strict=True))

    def see(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        features, probabilities = self(pixels)
        return {"features": features, "probabilities": probabilities}

    def _prepared(self, rgb: Tensor) -> Tensor:
        """What the protocol does to images as they are."""
        if self.resize == "coco":
            return lanczos(rgb, COCO)
        if self.resize == "patch":
            return middle(rgb, SIZE)
        return rgb

    def _resizing(self):
        """Put the protocol's resize in the place of the network's own."""
        from torch_fidelity import feature_extractor_inceptionv3 as library

        if self.resize not in ("clean", "coco"):
            return contextlib.nullcontext()
        name = "interpolate_bilinear_2d_like_tensorflow1x"
        return mock.patch.object(library, name, lambda images, **_: clean_resize(images))


def lanczos(pixels: Tensor, size: int) -> Tensor:
    """uint8 `(B, 3, H, W)` -> `(B, 3, size, size)` by PIL's Lanczos filter, as text-to-image papers
    bring samples of 512 pixels to those of COCO's photographs."""
    import numpy as np
    from PIL import Image

    if pixels.shape[2:] == (size, size):
        return pixels
    images = map(Image.fromarray, pixels.movedim(1, -1).cpu().numpy())
    resized = [np.asarray(image.resize((size, size), Image.Resampling.LANCZOS)) for image in images]
    return torch.from_numpy(np.stack(resized)).movedim(-1, 1)


def middle(pixels: Tensor, size: int) -> Tensor:
    """The middle `size` x `size` pixels: the network's own resize then does nothing."""
    height, width = pixels.shape[2:]
    if min(height, width) < size:
        raise UserError(
            f"resize: patch looks at {size} x {size} pixels, and images are {height} x {width}"
        )
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[:, :, top : top + size, left : left + size]


def clean_resize(images: Tensor) -> Tensor:
    """Whole numbers 0 to 255 `(B, 3, H, W)` -> float32 `(B, 3, 299, 299)`, by clean-fid (Parmar et
    al. 2022)."""
    from cleanfid.resize import build_resizer

    resize = build_resizer("clean")
    arrays = images.to(torch.uint8).movedim(1, -1).cpu().numpy()
    resized = torch.stack([torch.from_numpy(resize(array)) for array in arrays])
    return resized.movedim(-1, 1).to(images)


def load_inception(path: Path, resize: str = "edm") -> Inception:
    """Inception with the weights in a file that `fetch_weights` gave."""
    import pickle

    network = _untrained()
    try:
        state = load_pickled(path)
        nn.Module.load_state_dict(network, state)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path} holds no weights of Inception: {str(error).splitlines()[0]}"
        ) from None
    return Inception(network, resize)


def _untrained() -> nn.Module:
    """torch-fidelity's network with the random weights of its layers, without the download or the
    unpickling in its constructor."""
    from torch_fidelity import feature_extractor_inceptionv3 as library

    class Network(library.FeatureExtractorInceptionV3):
        def load_state_dict(self, state):  # called by the constructor alone
            pass

    with mock.patch.object(library, "load_state_dict_from_url", lambda *_, **__: None):
        return Network("inception-v3-compat", ["2048", "logits_unbiased"])
