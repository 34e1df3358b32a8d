"""Inception of 2015-12-05, the network of all published FIDs: type `inception`. The network and its
converted TensorFlow weights are torch-fidelity's."""

import io
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from harness.config.schema import FeatureSettings
from harness.errors import UserError
from harness.features.base import FEATURES, PretrainedExtractor, PretrainedSettings
from harness.features.resize import in_threads
from harness.io.downloads import fetch, load_pickled
from harness.transfers import to_device

WEIGHTS = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SIZE = 299
DIM = 2048
TENSORFLOW = "to 299 x 299 inside the network, bilinear as TensorFlow 1"
RESIZES = {
    "edm": TENSORFLOW,
    "clean": "to 299 x 299 before the network, PIL's bicubic, not quantised (clean-fid)",
    # clean-fid leaves the resize to the network, as EDM does; on 8-bit images the FIDs are equal.
    "legacy-tensorflow": f"{TENSORFLOW} (clean-fid's legacy_tensorflow)",
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
        resize: Literal[*RESIZES] = "edm"
        sha256: ClassVar[str] = SHA256

    pretraining = ("imagenet-1k",)

    def __init__(self, name: str, settings: FeatureSettings):
        super().__init__(name, settings)
        self.resize, distance = RESIZES[settings.resize], f"fid-{settings.resize}"
        self.provided = frozenset({"features", "probabilities", "inception", distance})

    def fetch(self) -> Path:
        return fetch(self.settings.weights or WEIGHTS, SHA256)

    def load_network(self, path: Path) -> nn.Module:
        """torch-fidelity's network for `inputs`; it returns features and logits without bias."""
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        class Network(FeatureExtractorInceptionV3):
            def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
                x = (x - 128) / 128
                *layers, fc = self.children()  # in the order of the library's forward pass
                for layer in layers:
                    x = layer(x)
                features = torch.flatten(x, 1)
                return features, features.mm(fc.weight.T)

        # The library unpickles any object; this copy of the file holds tensors only.
        torch.save(load_pickled(path), tensors := io.BytesIO())
        tensors.seek(0)
        return Network("inception-v3-compat", ["2048", "logits_unbiased"], tensors)

    def inputs(self, pixels: Tensor) -> Tensor:
        """Pixels from 0 to 255, `(B, 3, 299, 299)`, by the protocol's resize."""
        protocol = self.settings.resize
        if protocol in ("clean", "coco"):
            from cleanfid.resize import make_resizer  # Parmar et al. 2022

            images = pixels.expand(-1, 3, -1, -1).movedim(1, -1).cpu().numpy()
            if protocol == "coco":  # this leaves images of 256 x 256 unchanged
                images = in_threads(
                    make_resizer("PIL", True, "lanczos", (256, 256)), images, self.device
                )
            images = in_threads(
                make_resizer("PIL", False, "bicubic", (SIZE, SIZE)), images, self.device
            )
            x = torch.stack(list(map(torch.from_numpy, images))).movedim(-1, 1)
            return to_device(x, self.device)
        rgb = to_device(pixels, self.device).expand(-1, 3, -1, -1)
        if protocol == "patch":
            height, width = rgb.shape[2:]
            if min(height, width) < SIZE:
                needed = f"at least {SIZE} x {SIZE} pixels, not {height} x {width}"
                raise UserError(f"resize: patch needs images of {needed}", "image-size")
            top, left = (height - SIZE) // 2, (width - SIZE) // 2
            rgb = rgb[:, :, top : top + SIZE, left : left + SIZE]
        from torch_fidelity import interpolate_compat_tensorflow as compatible

        resize = compatible.interpolate_bilinear_2d_like_tensorflow1x  # without antialiasing
        return resize(rgb.float(), size=(SIZE, SIZE), align_corners=False)

    def outputs(self, x: Tensor) -> dict[str, Tensor]:
        features, logits = self.network(x)
        return {"features": features, "probabilities": logits.softmax(dim=1)}
