"""Small classifiers trained on the data set: types `cnn` and `resnet`."""

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, max_pool2d, relu, silu

from harness.config.schema import DataSection
from harness.context import Context
from harness.data.datasets import Dataset, Images
from harness.errors import Problem
from harness.features.base import FEATURES
from harness.features.train import TrainedExtractor, TrainedSettings, augmented

GROUPS = 4  # of GroupNorm in `ResNet`


class Classifier(nn.Module):
    """A classifier of images `(B, C, H, W)` in [-1, 1]. `maps(x)`: maps `(B, C_i, H_i, W_i)` from
    fine to coarse; `features(x)`: `(B, D)`; `logits(features)`: `(B, num_classes)`."""

    feature_dim = 64
    map_channels: tuple[int, ...]
    activation: Callable[[Tensor], Tensor]  # before the last layer

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.features(x))

    def logits(self, features: Tensor) -> Tensor:
        return self.head(self.activation(features))


class PlainCNN(Classifier):
    """Two stages of two convolutions with max pooling, then a 64-d layer, as in VGG."""

    activation = staticmethod(relu)

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, width: int):
        super().__init__()
        self.map_channels = (width, 2 * width)
        widths = (image_shape[0], width, width, 2 * width, 2 * width)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.hidden = nn.Linear(2 * width * (image_shape[1] // 4) ** 2, self.feature_dim)
        self.head = nn.Linear(self.feature_dim, num_classes)

    def maps(self, x: Tensor) -> list[Tensor]:
        fine = relu(self.convs[1](relu(self.convs[0](x))))
        coarse = relu(self.convs[3](relu(self.convs[2](max_pool2d(fine, 2)))))
        return [fine, coarse]

    def features(self, x: Tensor) -> Tensor:
        return self.hidden(max_pool2d(self.maps(x)[-1], 2).flatten(1))


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, stride: int):
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(GROUPS, c) for c in (channels, out_channels))
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, 1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1)
        self.skip = nn.Conv2d(channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(silu(self.norm2(self.conv1(silu(self.norm1(x))))))
        return self.skip(x) + h


class ResNet(Classifier):
    """Pre-activation residual blocks with GroupNorm and strides, then global average pooling."""

    activation = staticmethod(silu)

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, width: int):
        super().__init__()
        self.map_channels = (width, 2 * width, 4 * width)
        self.stem = nn.Conv2d(image_shape[0], width, 3, padding=1)
        shapes = [(width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2)]
        self.blocks = nn.ModuleList(_ResidualBlock(*shape) for shape in shapes)
        self.hidden = nn.Linear(4 * width, self.feature_dim)
        self.head = nn.Linear(self.feature_dim, num_classes)

    def maps(self, x: Tensor) -> list[Tensor]:
        outputs = [self.stem(x)]
        for block in self.blocks:
            outputs.append(block(outputs[-1]))
        return outputs[1:]

    def features(self, x: Tensor) -> Tensor:
        return self.hidden(silu(self.maps(x)[-1]).mean(dim=(2, 3)))


@FEATURES.register("cnn")
@FEATURES.register("resnet")
class ClassifierExtractor(TrainedExtractor):
    """Features and class probabilities of a classifier."""

    class Settings(TrainedSettings):
        """Label smoothing and weight decay bound the features. Without them, the features of one
        class outgrow the others', so that a Fréchet distance depends on that class and the sampling
        seed more than on the generator."""

        type: Literal["cnn", "resnet"]
        label_smoothing: float = Field(0.1, ge=0, lt=1)
        weight_decay: float = Field(0.05, ge=0)

    has_feature_maps = True
    provided = frozenset({"features", "probabilities", "data-classes", "fd"})

    def check(self, data: DataSection | None, files: bool) -> Iterable[Problem]:
        yield from super().check(data, files)
        if self.settings.type == "resnet" and self.settings.width % GROUPS:
            message = f"must be a multiple of {GROUPS}, not {self.settings.width}"
            yield Problem(f"features.{self.name}.width", "invalid-value", message)

    def build(self, dataset: Dataset) -> Classifier:
        architecture = {"cnn": PlainCNN, "resnet": ResNet}[self.settings.type]
        return architecture(dataset.image_shape, dataset.num_classes, self.settings.width)

    def labelled(self, images: Images, dataset: Dataset) -> Images:
        return Images(images.pixels, dataset.classes(images.labels))

    def loss(self, context: Context) -> Tensor:
        x, labels = context.real()
        logits = context.networks["features"](augmented(context, x))
        return cross_entropy(logits, labels, label_smoothing=self.settings.label_smoothing)

    def correct(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.network(x).argmax(dim=1) == labels

    def answers(self, dataset: Dataset) -> Tensor:
        return dataset.classes(super().answers(dataset))

    def outputs(self, x: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        features = self.network.features(x)
        return {"features": features, "probabilities": self.network.logits(features).softmax(1)}
