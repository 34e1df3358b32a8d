"""EfficientNet-Lite (Tan and Le 2019) from timm: type `efficientnet-lite`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from harness.data.datasets import Dataset
from harness.features.base import FEATURES, RESIZE, PretrainedExtractor, PretrainedSettings
from harness.features.timm_backbones import (
    import_timm,
    load_weights,
    pretraining_set,
    weights_file,
)


@FEATURES.register("efficientnet-lite")
class EfficientNetLiteExtractor(PretrainedExtractor):
    """Features of the last pooling `(B, 1280)`, and probabilities of ImageNet's classes."""

    class Settings(PretrainedSettings):
        type: Literal["efficientnet-lite"]
        model: Literal["lite0", "lite1", "lite2"] = "lite0"
        weights: None = None

        @property
        def network(self) -> str:
            """timm's name."""
            return f"tf_efficientnet_{self.model}"

    resize = RESIZE

    @classmethod
    def provides(cls, settings: Settings) -> frozenset[str]:
        return frozenset({"features", "probabilities", "fd"})

    @classmethod
    def fetch(cls, settings: Settings) -> Path:
        return weights_file(settings.network)

    @classmethod
    def build(cls, settings: Settings, dataset: Dataset) -> nn.Module:
        return import_timm().create_model(settings.network)

    @classmethod
    def load_network(cls, settings: Settings, path: Path, dataset: Dataset) -> nn.Module:
        return load_weights(settings.network, path)

    def prepare(self, dataset: Dataset) -> None:
        name = self.settings.network
        self.pretraining, self.alias = (pretraining_set(name),), f"timm/{name}"
        self.details = {"model": name}

    @property
    def size(self) -> int:
        return self.network.pretrained_cfg["input_size"][1]

    def outputs(self, x: Tensor) -> dict[str, Tensor]:
        features = self.network.forward_head(self.network.forward_features(x), pre_logits=True)
        probabilities = self.network.classifier(features).softmax(dim=1)
        return {"features": features, "probabilities": probabilities}
