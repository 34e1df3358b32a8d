"""DINOv2 (Oquab et al. 2023) from timm: type `dinov2`."""

from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from harness.config.schema import FeatureSettings, Sha256
from harness.features.base import FEATURES, PretrainedExtractor, PretrainedSettings
from harness.features.timm_backbones import load_weights

NETWORKS = {"vitb14": "vit_base_patch14_dinov2", "vitl14": "vit_large_patch14_dinov2"}


@FEATURES.register("dinov2")
class DINOv2Extractor(PretrainedExtractor):
    """The class token after the last norm, `(B, 768)` or `(B, 1024)`."""

    class Settings(PretrainedSettings):
        """weights: Meta's file, or an address with its sha256."""

        type: Literal["dinov2"]
        model: Literal["vitb14", "vitl14"]
        weights: str
        sha256: Sha256 | None = None

    size = 224
    resize = f"to {size} x {size}, bicubic with antialiasing, 8 bits"
    # The curated part of LVD-142M contains ImageNet-1k's training images (section 3).
    pretraining = ("lvd-142m", "imagenet-1k")
    provided = frozenset({"features", "fd"})

    def __init__(self, name: str, settings: FeatureSettings):
        super().__init__(name, settings)
        self.details = {"model": settings.model}

    def load_network(self, path: Path) -> nn.Module:
        # timm renames the weights of Meta's file and resamples the position embeddings.
        name = NETWORKS[self.settings.model]
        return load_weights(name, path, img_size=self.size, num_classes=0)

    def outputs(self, x: Tensor) -> dict[str, Tensor]:
        return {"features": self.network(x)}
