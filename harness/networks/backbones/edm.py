"""EDM's U-Nets as class-conditional denoisers."""

from torch import Tensor
from torch.nn.functional import one_hot

from harness.denoiser import Condition, EDMDenoiser
from harness.networks.registry import BACKBONES, Backbone


class OneHotDenoiser(EDMDenoiser):
    """A `SongUNet` or `DhariwalUNet`, whose labels are one-hot vectors; zeros mean "no label".

    `condition`: labels int64 `(B,)`, or vectors float `(B, num_classes)`.
    """

    @staticmethod
    def backbone_arguments(image_shape: tuple[int, ...], num_classes: int, null: Condition) -> dict:
        channels, size, _ = image_shape
        arguments = {"img_resolution": size, "in_channels": channels, "out_channels": channels}
        return arguments | {"label_dim": num_classes}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        config = self.backbone.config
        return (config.in_channels, config.img_resolution, config.img_resolution)

    @property
    def augment_labels(self) -> int:
        return self.backbone.config.augment_dim

    def run_backbone(self, x: Tensor, c_noise: Tensor, condition, **extras) -> Tensor:
        if not self.num_classes:
            condition = None
        elif not condition.is_floating_point():
            condition = one_hot(condition, self.num_classes + 1)[:, :-1].float()
        return self.backbone(x, c_noise, condition, **extras)


@BACKBONES.register("SongUNet")
class SongUNetBackbone(Backbone):
    model = "harness.networks.edm_unet.SongUNet"
    denoisers = (OneHotDenoiser,)
    dropout = True

    @staticmethod
    def augment_labels(settings: dict) -> int:
        return settings.get("augment_dim", 0)


@BACKBONES.register("DhariwalUNet")
class DhariwalUNetBackbone(SongUNetBackbone):
    model = "harness.networks.edm_unet.DhariwalUNet"
