"""Feature networks of timm: types `dinov2` and `efficientnet-lite`."""

from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from harness.config.schema import FeatureSettings, Sha256
from harness.features.base import FEATURES, PretrainedExtractor, PretrainedSettings
from harness.features.timm_backbones import load_weights, pretraining_set, weights_file

DINOV2 = {"vitb14": "vit_base_patch14_dinov2", "vitl14": "vit_large_patch14_dinov2"}


@FEATURES.register("dinov2")
class DINOv2Extractor(PretrainedExtractor):
    """DINOv2 (Oquab et al. 2023): the class token after the last norm, `(B, 768 or 1024)`."""

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
        return load_weights(DINOV2[self.settings.model], path, img_size=self.size, num_classes=0)

    def outputs(self, x: Tensor) -> dict[str, Tensor]:
        return {"features": self.network(x)}


@FEATURES.register("efficientnet-lite")
class EfficientNetLiteExtractor(PretrainedExtractor):
    """EfficientNet-Lite (Tan and Le 2019): last pooling `(B, 1280)`, ImageNet's probabilities."""

    class Settings(PretrainedSettings):
        type: Literal["efficientnet-lite"]
        model: Literal["lite0", "lite1", "lite2"] = "lite0"
        weights: None = None

    provided = frozenset({"features", "probabilities", "fd"})

    def __init__(self, name: str, settings: FeatureSettings):
        super().__init__(name, settings)
        self.timm_name = f"tf_efficientnet_{settings.model}"
        self.alias, self.details = f"timm/{self.timm_name}", {"model": self.timm_name}

    @property
    def pretraining(self) -> tuple[str, ...]:
        return (pretraining_set(self.timm_name),)

    @property
    def size(self) -> int:
        return self.network.pretrained_cfg["input_size"][1]

    def fetch(self) -> Path:
        return weights_file(self.timm_name)

    def load_network(self, path: Path) -> nn.Module:
        return load_weights(self.timm_name, path)

    def outputs(self, x: Tensor) -> dict[str, Tensor]:
        features = self.network.forward_head(self.network.forward_features(x), pre_logits=True)
        probabilities = self.network.classifier(features).softmax(dim=1)
        return {"features": features, "probabilities": probabilities}
