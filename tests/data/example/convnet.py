"""A backbone of three convolutions, as a plug-in file."""

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn.functional import embedding, silu

from harness.denoiser import EDMDenoiser
from harness.networks.registry import BACKBONES, Backbone


class ConvNet(ModelMixin, ConfigMixin):
    """Three convolutions; noise level and class shift the hidden channels."""

    @register_to_config
    def __init__(self, channels: int, resolution: int, classes: int, width: int = 16):
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, channels, 3, padding=1)
        self.level = nn.Linear(1, width)
        self.label = nn.Embedding(classes + 1, width)

    def forward(self, x, c_noise, labels):
        shift = self.level(c_noise[:, None]) + embedding(labels, self.label.weight)
        h = silu(self.first(x) + shift[:, :, None, None])
        return self.last(silu(self.middle(h)))


class ConvDenoiser(EDMDenoiser):
    @staticmethod
    def backbone_arguments(image_shape, num_classes, null):
        channels, height, _ = image_shape
        return {"channels": channels, "resolution": height, "classes": num_classes}

    @property
    def image_shape(self):
        config = self.backbone.config
        return (config.channels, config.resolution, config.resolution)

    def run_backbone(self, x, c_noise, condition, **extras):
        return self.backbone(x, c_noise, condition)


@BACKBONES.register("ConvNet")
class ConvNetBackbone(Backbone):
    denoisers = (ConvDenoiser,)

    @staticmethod
    def model_class():
        return ConvNet
