"""diffusers' `PixArtTransformer2DModel` as a text-conditional denoiser, imported only."""

from torch import Tensor

from harness.denoiser import Condition
from harness.networks.registry import BACKBONES, Backbone, Pipeline
from harness.networks.vp import TextVPDenoiser


class PixArtDenoiser(TextVPDenoiser):
    """The `PixArtTransformer2DModel` of a `PixArtAlphaPipeline`.

    The second half of the output channels, the learned variance, is dropped. The transformer for
    images of 1024 pixels also takes their size and aspect ratio: those of a square of its own size.
    """

    PIXELS_PER_LATENT = 8  # along each side

    @property
    def text_width(self) -> int:
        return self.backbone.config.caption_channels

    def run_backbone(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        size: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.backbone.config.sample_size == 128:
            height, width = (self.PIXELS_PER_LATENT * side for side in x.shape[-2:])
            size["resolution"] = x.new_tensor([height, width]).repeat(len(x), 1)
            size["aspect_ratio"] = x.new_tensor([height / width]).repeat(len(x), 1)
        embeddings, mask = condition["embeddings"].to(x), condition["mask"]
        output = self.backbone(x, embeddings, time, size, encoder_attention_mask=mask).sample
        return output[:, : x.shape[1]]


@BACKBONES.register("PixArtTransformer2DModel")
class PixArtBackbone(Backbone):
    model = "diffusers.models.transformers.pixart_transformer_2d.PixArtTransformer2DModel"
    denoisers = (PixArtDenoiser,)
    reads_text = True
    dropout = True
    pipeline = Pipeline(
        "PixArtAlphaPipeline", folder="transformer", text_encoder="t5", tokens=120, masked=True
    )
