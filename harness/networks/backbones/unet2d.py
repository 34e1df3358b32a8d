"""diffusers' `UNet2DModel` as a class-conditional denoiser, trained here or imported."""

import torch
from torch import Tensor, nn

from harness.denoiser import Condition, EDMDenoiser
from harness.errors import UserError
from harness.networks.registry import BACKBONES, Backbone
from harness.networks.vp import VPDenoiser


class UNet2DDenoiser(EDMDenoiser):
    """A `UNet2DModel` with EDM's preconditioning.

    The class table has one row more than classes; the last row means "no label". The noise input is
    c_noise times `TIME_SCALE`, which spreads it over the wavelengths (2π and longer) of the
    sinusoidal embedding. A Fourier embedding takes the logarithm of its input, NaN for c_noise < 0,
    so `time_embedding_type` must be "positional".
    """

    TIME_SCALE = 100.0

    def __init__(self, backbone: nn.Module, num_classes: int, *args, **kwargs):
        super().__init__(backbone, num_classes, *args, **kwargs)
        if backbone.config.time_embedding_type != "positional":
            raise ValueError(f"{type(self).__name__} needs time_embedding_type 'positional'")
        if num_classes and backbone.config.num_class_embeds != num_classes + 1:
            raise ValueError(f"num_class_embeds must be num_classes + 1 = {num_classes + 1}")

    @staticmethod
    def backbone_arguments(image_shape: tuple[int, ...], num_classes: int, null: Condition) -> dict:
        channels, size, _ = image_shape
        arguments = {"sample_size": size, "in_channels": channels, "out_channels": channels}
        return arguments | {"num_class_embeds": num_classes + 1 if num_classes else None}

    def run_backbone(self, x: Tensor, c_noise: Tensor, condition, **extras) -> Tensor:
        return self.backbone(x, c_noise * self.TIME_SCALE, class_labels=condition, **extras).sample


class DDPMDenoiser(VPDenoiser):
    """The `UNet2DModel` of a `DDPMPipeline` or `DDIMPipeline` (Ho et al. 2020), in pixels.

    num_classes: of the data; None: all rows of the network's class table. One row more than classes
    means "no label" (the last one); without it there is no unconditional score. If the network has
    twice as many output channels as input channels, the second half, the learned variance, is
    dropped.
    """

    settings = (*VPDenoiser.settings, "num_classes")

    def __init__(
        self,
        backbone: nn.Module,
        schedule: dict,
        prediction: str = "epsilon",
        sigma_data: float = 1.0,
        num_classes: int | None = None,
    ):
        super().__init__(backbone, schedule, prediction, sigma_data)
        config = backbone.config
        rows = config.num_class_embeds or 0
        self.num_classes = rows if num_classes is None else num_classes
        channels = config.in_channels
        if config.time_embedding_type != "positional":
            raise ValueError(f"time_embedding_type {config.time_embedding_type!r}, not positional")
        if config.class_embed_type is not None:
            raise ValueError(f"class_embed_type {config.class_embed_type!r} is not supported")
        if config.out_channels not in (channels, 2 * channels):
            raise ValueError(
                f"{config.out_channels} output channels, but {channels} input channels"
            )
        if not isinstance(config.sample_size, int):
            raise ValueError(
                f"sample_size {config.sample_size!r} is not the width of square images"
            )
        if rows not in (self.num_classes, self.num_classes + bool(self.num_classes)):
            raise ValueError(f"num_class_embeds {rows}, but {self.num_classes} classes")
        self._null = self.num_classes if rows > self.num_classes else None

    def null_condition(self, batch: int) -> Tensor | None:
        if self.num_classes and self._null is None:
            message = "this network has no label for an unconditional score: its num_class_embeds"
            raise UserError(f"{message} equals the number of classes", "no-null-condition")
        if self._null is None:
            return None
        return torch.full((batch,), self._null, device=self.log_sigmas.device)

    def run_backbone(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return self.backbone(x, time, class_labels=condition).sample[:, : x.shape[1]]


@BACKBONES.register("UNet2DModel")
class UNet2DBackbone(Backbone):
    model = "diffusers.models.unets.unet_2d.UNet2DModel"
    denoisers = (UNet2DDenoiser, DDPMDenoiser)
    dropout = True
