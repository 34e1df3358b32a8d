"""EfficientNet-Lite (Tan and Le 2019) from timm: type `efficientnet-lite`."""

from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from harness.config.schema import FeatureSettings
from harness.features.base import FEATURES, PretrainedExtractor, PretrainedSettings
from harness.features.timm_backbones import load_weights, pretraining_set, weights_file


@FEATURES.register("efficientnet-lite")
class EfficientNetLiteExtractor(PretrainedExtractor):
    """Features of the last pooling `(B, 1280)`, and probabilities of ImageNet's classes."""

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
