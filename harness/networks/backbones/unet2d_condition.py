"""diffusers' `UNet2DConditionModel` as a text-conditional denoiser, trained here or imported."""

from torch import Tensor, nn

from harness.denoiser import Condition
from harness.networks.backbones.unet2d import UNet2DDenoiser
from harness.networks.registry import BACKBONES, Backbone, Pipeline
from harness.networks.text import EmptyPrompt
from harness.networks.vp import VPDenoiser


class TextDenoiser(UNet2DDenoiser):
    """A `UNet2DConditionModel` with EDM's preconditioning and without classes.

    `condition`: `embeddings` `(B, L, D)` and, if padding is masked, `mask` `(B, L)`. `null`: the
    same for the empty prompt, batch 1.
    """

    def __init__(self, backbone: nn.Module, *args, null: dict[str, Tensor] | None = None, **kwargs):
        super().__init__(backbone, *args, **kwargs)
        self.null = EmptyPrompt(null or {})

    @staticmethod
    def backbone_arguments(image_shape: tuple[int, ...], num_classes: int, null: Condition) -> dict:
        if null is None:
            raise ValueError("it reads texts; set text_encoder")
        arguments = UNet2DDenoiser.backbone_arguments(image_shape, 0, None)
        return arguments | {"cross_attention_dim": null["embeddings"].shape[-1]}

    @property
    def text_width(self) -> int:
        return self.backbone.config.cross_attention_dim

    def null_condition(self, batch: int) -> Condition:
        return self.null(batch)

    def run_backbone(self, x: Tensor, c_noise: Tensor, condition, **extras) -> Tensor:
        return _run(self.backbone, x, c_noise * self.TIME_SCALE, condition, **extras)


class StableDiffusionDenoiser(VPDenoiser):
    """The `UNet2DConditionModel` of a `StableDiffusionPipeline`."""

    @property
    def text_width(self) -> int:
        return self.backbone.config.cross_attention_dim

    def run_backbone(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return _run(self.backbone, x, time, condition)


def _run(backbone: nn.Module, x: Tensor, time: Tensor, condition: Condition, **extras) -> Tensor:
    return backbone(
        x,
        time,
        encoder_hidden_states=condition["embeddings"].to(x),
        encoder_attention_mask=condition.get("mask"),
        **extras,
    ).sample


@BACKBONES.register("UNet2DConditionModel")
class UNet2DConditionBackbone(Backbone):
    model = "diffusers.models.unets.unet_2d_condition.UNet2DConditionModel"
    denoisers = (TextDenoiser, StableDiffusionDenoiser)
    reads_text = True
    pipeline = Pipeline(
        "StableDiffusionPipeline", folder="unet", text_encoder="clip", tokens=77, masked=False
    )
