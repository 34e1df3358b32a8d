"""diffusers' `UNet2DModel` as a class-conditional denoiser."""

from torch import Tensor, nn

from harness.denoiser import Condition, EDMDenoiser
from harness.networks.registry import BACKBONES, Backbone


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


@BACKBONES.register("UNet2DModel")
class UNet2DBackbone(Backbone):
    model = "diffusers.models.unets.unet_2d.UNet2DModel"
    denoisers = (UNet2DDenoiser,)
