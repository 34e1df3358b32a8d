"""A plug-in file: one data set, backbone, method, feature network and metric.

An experiment names it under `plugins`. Each class is registered under the name that the
experiment uses.
"""

from __future__ import annotations

from typing import Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn.functional import embedding, silu

from harness.config.schema import FeatureSettings
from harness.data.registry import DATASETS, DataSource, split
from harness.denoiser import EDMDenoiser
from harness.evaluation.feature_set import mean_estimate
from harness.evaluation.registry import register
from harness.features.base import FEATURES, FeatureExtractor
from harness.io.records import FeatureRecord
from harness.method import METHODS, Method, MethodConfig, OptimizerConfig, Phase, ours
from harness.networks.registry import BACKBONES, Backbone
from harness.streams import Stream


@DATASETS.register("stripes")
class Stripes(DataSource):
    """Noisy 8 x 8 images with stripes: horizontal or vertical."""

    shape = (1, 8, 8)
    class_names = ("horizontal", "vertical")

    def read(self):
        index = torch.arange(1600)
        labels, phase = index % 2, (index // 2) % 4
        rows = ((torch.arange(8) + phase[:, None]) % 4 < 2).float().mul(200)[:, :, None]
        images = torch.where(labels.bool()[:, None, None], rows.transpose(1, 2), rows)
        images = images.expand(-1, 8, 8) + 50 * Stream(0, "stripes").uniform(index, (8, 8))
        pixels = images.to(torch.uint8)[:, None]
        return *split(pixels, labels, self.section.held_out), self.class_names


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


@METHODS.register("teacher-output")
class TeacherOutput(Method):
    """The student's images move towards what the teacher makes of their noised versions."""

    paper = "an example"

    class Config(MethodConfig):
        batch: int = ours(16, "small", gt=0)
        sigma_init: float = ours(10.0, "noise level of the student", gt=0)
        lr: float = ours(1e-3, "Adam", gt=0)

    def phases(self):
        return [Phase("generator", "student", self.loss, OptimizerConfig(lr=self.config.lr))]

    def loss(self, context):
        images = context.generated()
        sigma = torch.ones(len(context), device=images.x.device)
        with torch.no_grad():
            noised = context.noised(images.x, sigma)
            target = context.networks["teacher"](noised, sigma, images.condition)
        return (images.x - target).square().mean()


@FEATURES.register("raw-pixels")
class RawPixels(FeatureExtractor):
    """The pixels themselves: no weights."""

    class Settings(FeatureSettings):
        type: Literal["raw-pixels"]

    provided = frozenset({"features", "brightness", "fd"})

    def make(self, job):
        record = FeatureRecord(name=job.name, sha256="none", settings=job.settings.model_dump())
        record.write(job.folder / "features.json")
        return record

    def load(self, record, folder, dataset, device):
        self.network = nn.Flatten()

    def extract(self, pixels, labels=None):
        features = pixels.flatten(1).float() / 255
        return {"features": features, "brightness": features.mean(dim=1)}


@register("mean-brightness", "Mean brightness", None, requires=("brightness",))
def brightness(features):
    """The mean of a per-image output that only the network above provides."""
    return mean_estimate(features.outputs["brightness"])
