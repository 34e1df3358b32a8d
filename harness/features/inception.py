"""Inception of 2015-12-05, the network of all published FIDs: type `inception`.

The network and its converted TensorFlow weights are torch-fidelity's.
"""

import io
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from harness.data.datasets import Dataset
from harness.errors import UserError
from harness.features.base import FEATURES, PretrainedExtractor, PretrainedSettings
from harness.io.downloads import fetch, load_pickled

WEIGHTS = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SIZE, COCO_SIZE = 299, 256
DIM = 2048
TENSORFLOW = "to 299 x 299 inside the network, bilinear as TensorFlow 1"
RESIZES = {
    "edm": TENSORFLOW,
    # clean-fid leaves the resize to the network, as EDM does; on 8-bit images the FIDs are equal.
    "legacy-tensorflow": f"{TENSORFLOW} (clean-fid's legacy_tensorflow)",
    "clean": "to 299 x 299 before the network, PIL's bicubic, not quantised (clean-fid)",
    "coco": "to 256 x 256 by PIL's Lanczos, 8 bits, then as clean (text-to-image papers, COCO)",
    "patch": "none: the 299 x 299 pixels in the middle",
}


@FEATURES.register("inception")
class InceptionExtractor(PretrainedExtractor):
    """Features of the last pooling `(B, 2048)`, and the Inception Score's probabilities `(B, 1008)`
    (from logits without bias, as in Salimans et al. 2016)."""

    class Settings(PretrainedSettings):
        """resize: EDM's protocol, one of clean-fid's two, that of text-to-image papers on COCO (to
        256 pixels first), or none (patch FID)."""

        type: Literal["inception"]
        resize: Literal["edm", "clean", "legacy-tensorflow", "coco", "patch"] = "edm"

    size = SIZE
    pretraining = ("imagenet-1k",)

    known_sha256 = SHA256

    @property
    def provided(self) -> frozenset[str]:
        return frozenset({"features", "probabilities", "inception", f"fid-{self.settings.resize}"})

    @property
    def resize(self) -> str:
        return RESIZES[self.settings.resize]

    def fetch(self) -> Path:
        return fetch(self.settings.weights or WEIGHTS, SHA256)

    def build(self, dataset: Dataset | None = None) -> nn.Module:
        """torch-fidelity's network for `inputs`; it returns features and logits without bias."""
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        class Network(FeatureExtractorInceptionV3):
            def load_state_dict(self, state: dict, *args, **kwargs):
                # The constructor loads the empty file below.
                return super().load_state_dict(state, *args, **kwargs) if state else None

            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                x = (x - 128) / 128
                *layers, fc = self.children()  # in the order of the library's forward pass
                for layer in layers:
                    x = layer(x)
                features = torch.flatten(x, 1)
                return features, features.mm(fc.weight.T)

        torch.save({}, empty := io.BytesIO())
        empty.seek(0)
        return Network("inception-v3-compat", ["2048", "logits_unbiased"], empty)

    def fill(self, network: nn.Module, path: Path) -> None:
        network.load_state_dict(load_pickled(path))

    def inputs(self, pixels: Tensor) -> Tensor:
        """Pixels from 0 to 255, `(B, 3, 299, 299)`, by the protocol's resize."""
        rgb = pixels.expand(-1, 3, -1, -1)
        protocol = self.settings.resize
        if protocol == "coco":
            rgb = lanczos(rgb, COCO_SIZE)
        if protocol == "patch":
            rgb = centre_crop(rgb, SIZE)
        if protocol in ("clean", "coco"):
            return clean_resize(rgb).to(self.device)
        return tensorflow_resize(rgb.to(self.device))

    def outputs(self, x: Tensor) -> dict[str, Tensor]:
        features, logits = self.network(x)
        return {"features": features, "probabilities": logits.softmax(dim=1)}


def tensorflow_resize(pixels: Tensor) -> Tensor:
    """uint8 `(B, 3, H, W)` -> float32 `(B, 3, 299, 299)`, bilinear without antialiasing as in
    TensorFlow 1."""
    from torch_fidelity import interpolate_compat_tensorflow as compatible

    resize = compatible.interpolate_bilinear_2d_like_tensorflow1x
    return resize(pixels.float(), size=(SIZE, SIZE), align_corners=False)


def clean_resize(pixels: Tensor) -> Tensor:
    """uint8 `(B, 3, H, W)` -> float32 `(B, 3, 299, 299)` by clean-fid (Parmar et al. 2022)."""
    from cleanfid.resize import build_resizer

    resize = build_resizer("clean")
    arrays = pixels.movedim(1, -1).cpu().numpy()
    resized = torch.stack([torch.from_numpy(resize(array)) for array in arrays])
    return resized.movedim(-1, 1).float()


def lanczos(pixels: Tensor, size: int) -> Tensor:
    """uint8 `(B, 3, H, W)` -> `(B, 3, size, size)` by PIL's Lanczos filter."""
    import numpy as np
    from PIL import Image

    if pixels.shape[2:] == (size, size):
        return pixels
    images = map(Image.fromarray, pixels.movedim(1, -1).cpu().numpy())
    resized = [np.asarray(image.resize((size, size), Image.Resampling.LANCZOS)) for image in images]
    return torch.from_numpy(np.stack(resized)).movedim(-1, 1)


def centre_crop(pixels: Tensor, size: int) -> Tensor:
    """The middle `size` x `size` pixels."""
    height, width = pixels.shape[2:]
    if min(height, width) < size:
        needed = f"at least {size} x {size} pixels, not {height} x {width}"
        raise UserError(f"resize: patch needs images of {needed}", "image-size")
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[:, :, top : top + size, left : left + size]
