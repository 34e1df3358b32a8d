"""Small classifiers whose inner features measure images, or judge them for a discriminator."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu, silu


class Classifier(nn.Module):
    """A classifier with the two views that the rest of the project needs.

    `maps(x)`: feature maps `(B, C_i, H_i, W_i)` from fine to coarse; `features(x)`: `(B, D)`;
    `logits(features)`: `(B, num_classes)`. `x`: `(B, C, H, W)` in [-1, 1].
    """

    feature_dim = 64
    map_channels: tuple[int, ...]

    def maps(self, x: Tensor) -> list[Tensor]:
        raise NotImplementedError

    def features(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def logits(self, features: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.features(x))


class PlainCNN(Classifier):
    """Two stages of two convolutions with max pooling, then a 64-d layer (VGG's manner)."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, width: int):
        super().__init__()
        channels, height, _ = image_shape
        self.map_channels = (width, 2 * width)
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, padding=1)
            for a, b in [
                (channels, width),
                (width, width),
                (width, 2 * width),
                (2 * width, 2 * width),
            ]
        )
        self.hidden = nn.Linear(2 * width * (height // 4) ** 2, self.feature_dim)
        self.head = nn.Linear(self.feature_dim, num_classes)

    def maps(self, x: Tensor) -> list[Tensor]:
        fine = relu(self.convs[1](relu(self.convs[0](x))))
        coarse = relu(self.convs[3](relu(self.convs[2](max_pool2d(fine, 2)))))
        return [fine, coarse]

    def features(self, x: Tensor) -> Tensor:
        return self.hidden(max_pool2d(self.maps(x)[-1], 2).flatten(1))

    def logits(self, features: Tensor) -> Tensor:
        return self.head(relu(features))


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, stride: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(4, channels), nn.GroupNorm(4, out_channels)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, stride, 1)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1)
        self.skip = nn.Conv2d(channels, out_channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(silu(self.norm2(self.conv1(silu(self.norm1(x))))))
        return self.skip(x) + h


class ResNet(Classifier):
    """Pre-activation residual blocks with GroupNorm, strides for pooling, global average."""

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int, width: int):
        super().__init__()
        self.map_channels = (width, 2 * width, 4 * width)
        self.stem = nn.Conv2d(image_shape[0], width, 3, padding=1)
        self.blocks = nn.ModuleList(
            [
                _ResidualBlock(width, width, 1),
                _ResidualBlock(width, 2 * width, 2),
                _ResidualBlock(2 * width, 4 * width, 2),
            ]
        )
        self.hidden = nn.Linear(4 * width, self.feature_dim)
        self.head = nn.Linear(self.feature_dim, num_classes)

    def maps(self, x: Tensor) -> list[Tensor]:
        outputs = [self.stem(x)]
        for block in self.blocks:
            outputs.append(block(outputs[-1]))
        return outputs[1:]

    def features(self, x: Tensor) -> Tensor:
        return self.hidden(silu(self.maps(x)[-1]).mean(dim=(2, 3)))

    def logits(self, features: Tensor) -> Tensor:
        return self.head(silu(features))


CLASSIFIERS = {"cnn": PlainCNN, "resnet": ResNet}


class FeatureMaps(nn.Module):
    """A classifier seen as what a discriminator looks at: calling it returns `maps(x)`."""

    def __init__(self, classifier: Classifier):
        super().__init__()
        self.classifier, self.map_channels = classifier, classifier.map_channels

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.classifier.maps(x)
