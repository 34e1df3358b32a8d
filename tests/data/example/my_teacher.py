"""A teacher from a plug-in file: a plain module with its own preconditioning."""

import torch
from torch import nn

from harness.networks.plain import ModuleDenoiser, register_module


class Net(nn.Module):
    """Any network; it may also be imported from its own package."""

    def __init__(self, width: int):
        super().__init__()
        self.label, self.noise = nn.Embedding(10, width), nn.Linear(1, width)
        self.first, self.last = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x, noise, labels):
        shift = self.label(labels) + self.noise(noise[:, None])
        return self.last(nn.functional.silu(self.first(x) + shift[:, :, None, None]))


@register_module("MyNet")  # the `type` in an experiment
class MyNet(ModuleDenoiser):
    image_shape, num_classes = (1, 8, 8), 10

    @staticmethod
    def build(width: int = 16) -> nn.Module:  # the other keys of `network`
        return Net(width)

    def denoise(self, module, x, sigma, condition) -> torch.Tensor:
        """D(x; σ, c) by EDM's and EDM2's preconditioning, with σ_data = 0.5."""
        s, d = sigma.view(-1, 1, 1, 1), 0.5
        scale = (s**2 + d**2).sqrt()
        output = module(x / scale, sigma.log() / 4, condition)
        return (d / scale) ** 2 * x + s * d / scale * output
