"""Text-to-image networks of diffusers' pipelines as denoisers: Stable Diffusion, PixArt.

They were trained on variance-preserving data `x_t = (x0 + σ n) / sqrt(1 + σ²)` at whole times t of
a scheduler, and predict the noise n or the velocity `(n - σ x0) / sqrt(1 + σ²)`. A denoiser takes
any σ: between two of the scheduler's times it asks for a time between them.

`condition`: `embeddings` `(B, L, D)` of the text encoder's last layer and, where padding is masked,
`mask` `(B, L)` (1: a token, 0: padding).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from harness.denoiser import NullText
from harness.errors import UserError, did_you_mean
from harness.io.artifacts import digest, read_json, sha256_file
from harness.networks.vp import (
    PREDICTIONS,
    SCHEDULE,
    VP_DENOISERS,
    Codec,
    VPDenoiser,
    schedule_sigmas,
)
from harness.teachers.text_embeddings import TextEncoder

# Pipeline class -> its denoising network's folder and class.
PIPELINES = {
    "StableDiffusionPipeline": ("unet", "UNet2DConditionModel"),
    "PixArtAlphaPipeline": ("transformer", "PixArtTransformer2DModel"),
}
# Network class -> tokens that its pipeline's text encoder gives, and whether they are masked.
TOKENS = {"UNet2DConditionModel": (77, False), "PixArtTransformer2DModel": (120, True)}
# The autoencoder of all of them, of images of 8 x 8 pixels for each place of a latent.
STABLE_DIFFUSION_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
# What else a pipeline's folder must have.
PARTS = ("scheduler", "text_encoder", "tokenizer", "vae")


def fresh(network: dict) -> VPDenoiser:
    """A denoiser with new weights and no text as its condition; `network`: `type` and arguments."""
    import diffusers

    settings = dict(network)
    kind = settings.pop("type")
    (tokens, masked), denoiser_class = TOKENS[kind], VP_DENOISERS[kind]
    denoiser = denoiser_class(getattr(diffusers, kind)(**settings), {})
    null = {"embeddings": torch.zeros(1, tokens, denoiser.text_width)}
    if masked:
        null["mask"] = torch.ones(1, tokens, dtype=torch.uint8)
    denoiser.null = NullText(null)
    return denoiser


class PipelineFolder:
    """A diffusers pipeline in a local folder, read part by part: weights from safetensors alone,
    code from nowhere."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        if not (self.folder / "model_index.json").is_file():
            raise UserError(f"{folder} is no pipeline's folder: it has no model_index.json")
        self.kind = read_json(self.folder / "model_index.json").get("_class_name", "")
        if self.kind not in PIPELINES:
            hint = did_you_mean(self.kind, PIPELINES) or f"; known: {', '.join(PIPELINES)}"
            raise UserError(f"{folder}: unknown pipeline {self.kind!r}{hint}")
        self.network, self.network_class = PIPELINES[self.kind]
        for part in (self.network, *PARTS):
            if not (self.folder / part).is_dir():
                raise UserError(f"{folder}: this {self.kind} has no {part}; fetch the whole folder")

    def _load(self, model_class, part: str, **options) -> nn.Module:
        try:
            folder = self.folder / part
            return model_class.from_pretrained(folder, use_safetensors=True, **options).eval()
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{self.folder / part}: {' '.join(str(error).split())}") from None

    def check(self, teacher: str, image_shape: tuple[int, ...] | None, sigma_max: float) -> None:
        """Refuse, before anything is read that takes time, what does not fit the experiment: the
        size of its images (None: any), and noise beyond its schedule."""
        vae = read_json(self.folder / "vae" / "config.json")
        network = read_json(self.folder / self.network / "config.json")
        size = network["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
        mine = (vae.get("out_channels", 3), size, size)
        if image_shape and mine != tuple(image_shape):
            said = ["x".join(map(str, shape)) for shape in (mine, image_shape)]
            raise UserError(
                f"teacher {teacher} makes {said[0]} images, but the data's are {said[1]}"
            )
        most = schedule_sigmas(self.schedule)[-1].item()
        if sigma_max > 1.01 * most:
            raise UserError(
                f"teachers.{teacher}.sampler.sigma_max: {sigma_max:g} is beyond the noise that "
                f"this pipeline knows, {most:.4g}"
            )

    @property
    def schedule(self) -> dict:
        scheduler = read_json(self.folder / "scheduler" / "scheduler_config.json")
        return {key: scheduler[key] for key in SCHEDULE if key in scheduler}

    def sha256(self) -> str:
        """Of all that a teacher is made of."""
        return self._sha256(self.network, *PARTS)

    def denoiser(self, null: dict[str, Tensor] | None = None) -> VPDenoiser:
        """`null`: what the text encoder makes of the empty prompt."""
        import diffusers

        backbone = self._load(getattr(diffusers, self.network_class), self.network)
        scheduler = read_json(self.folder / "scheduler" / "scheduler_config.json")
        prediction = scheduler.get("prediction_type", "epsilon")
        if prediction not in PREDICTIONS:
            raise UserError(
                f"{self.folder / 'scheduler'}: prediction_type {prediction!r}; known: "
                f"{', '.join(PREDICTIONS)}"
            )
        self._check_width(backbone)
        return VP_DENOISERS[self.network_class](backbone, self.schedule, prediction, null)

    def _check_width(self, backbone: nn.Module) -> None:
        config = read_json(self.folder / "text_encoder" / "config.json")
        given = config.get("hidden_size", config.get("d_model"))
        key = "cross_attention_dim" if self.network == "unet" else "caption_channels"
        if given != backbone.config[key]:
            raise UserError(
                f"{self.folder}: its text encoder gives {given} numbers a token, and its "
                f"{self.network} takes {backbone.config[key]}"
            )

    def text_encoder(self) -> TextEncoder:
        from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

        clip = self.network == "unet"
        # transformers would keep a file's float16, in which T5 overflows.
        network_class = CLIPTextModel if clip else T5EncoderModel
        network = self._load(network_class, "text_encoder", dtype=torch.float32)
        tokenizer = (CLIPTokenizer if clip else T5Tokenizer).from_pretrained(
            self.folder / "tokenizer"
        )
        return TextEncoder(
            tokenizer,
            network,
            # As the pipelines: PixArt's has a limit of its own, and lower-case text.
            limit=tokenizer.model_max_length if clip else 120,
            masked=not clip or getattr(network.config, "use_attention_mask", False),
            sha256=self._sha256("text_encoder", "tokenizer"),
            prepare=str if clip else lambda text: text.lower().strip(),
        )

    def config(self, part: str) -> dict:
        """The configuration of a part, without diffusers' own notes."""
        known = read_json(self.folder / part / "config.json")
        return {key: value for key, value in known.items() if not key.startswith("_")}

    def codec(self) -> Codec:
        from diffusers import AutoencoderKL

        return Codec(self._load(AutoencoderKL, "vae"))

    def _sha256(self, *parts: str) -> str:
        """Of all files of some parts."""
        files = sorted(path for part in parts for path in (self.folder / part).glob("*.*"))
        return digest([(str(path.relative_to(self.folder)), sha256_file(path)) for path in files])
