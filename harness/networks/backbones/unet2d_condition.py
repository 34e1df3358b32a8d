"""diffusers' `UNet2DConditionModel` as a text-conditional denoiser, trained here or imported."""

from torch import Tensor, nn

from harness.denoiser import Condition
from harness.networks.backbones.unet2d import UNet2DDenoiser
from harness.networks.registry import BACKBONES, Backbone, Pipeline
from harness.networks.vp import EmptyPrompt, TextVPDenoiser


class _TextUNet:
    """What both denoisers share."""

    @property
    def text_width(self) -> int:
        return self.backbone.config.cross_attention_dim

    def run_backbone(self, x: Tensor, time: Tensor, condition: Condition, **extras) -> Tensor:
        embeddings, mask = condition["embeddings"].to(x), condition.get("mask")
        return self.backbone(x, time, embeddings, encoder_attention_mask=mask, **extras).sample


class StableDiffusionDenoiser(_TextUNet, TextVPDenoiser):
    """The `UNet2DConditionModel` of a `StableDiffusionPipeline`."""


class TextDenoiser(_TextUNet, UNet2DDenoiser):
    """A `UNet2DConditionModel` with EDM's preconditioning and without classes.

    `condition`: `embeddings` `(B, L, D)` and, if padding is masked, `mask` `(B, L)`. `null`: the
    same for the empty prompt, batch 1.
    """

    def __init__(self, backbone: nn.Module, *args, null: dict[str, Tensor] | None = None, **kwargs):
        super().__init__(backbone, *args, **kwargs)
        self.null = EmptyPrompt(null)

    @staticmethod
    def backbone_arguments(image_shape: tuple[int, ...], num_classes: int, null: Condition) -> dict:
        if null is None:
            raise ValueError("it reads texts; set text_encoder")
        arguments = UNet2DDenoiser.backbone_arguments(image_shape, 0, None)
        return arguments | {"cross_attention_dim": null["embeddings"].shape[-1]}

    def null_condition(self, batch: int) -> Condition:
        return self.null(batch)

    def run_backbone(self, x: Tensor, c_noise: Tensor, condition: Condition, **extras) -> Tensor:
        return super().run_backbone(x, c_noise * self.TIME_SCALE, condition, **extras)


@BACKBONES.register("UNet2DConditionModel")
class UNet2DConditionBackbone(Backbone):
    model = "diffusers.models.unets.unet_2d_condition.UNet2DConditionModel"
    denoisers = (TextDenoiser, StableDiffusionDenoiser)
    reads_text = True
    dropout = True
    pipeline = Pipeline(
        "StableDiffusionPipeline", folder="unet", text_encoder="clip", tokens=77, masked=False
    )
