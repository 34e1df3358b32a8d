"""A feature network from a local file of weights, as a plug-in file: torchvision's resnet18."""

from typing import Literal

from torch import nn

from harness.config.schema import Sha256
from harness.features.base import FEATURES, PretrainedExtractor, PretrainedSettings, read_weights


@FEATURES.register("resnet18")
class ResNet18(PretrainedExtractor):
    """The input of torchvision's last layer, `(B, 512)`."""

    class Settings(PretrainedSettings):
        type: Literal["resnet18"]
        weights: str  # resnet18-f37072fd.pth of torchvision, or a .safetensors file
        sha256: Sha256 | None = None

    size = 224
    pretraining = ("imagenet-1k",)  # flags students trained against a network of the same images
    provided = frozenset({"features", "fd"})

    def load_network(self, path):
        from torchvision.models import resnet18  # here: every stage imports plug-ins

        network = resnet18()
        network.load_state_dict(read_weights(path))
        network.fc = nn.Identity()
        return network

    def mean_and_std(self):
        return (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def outputs(self, x):
        return {"features": self.network(x)}
