"""diffusers text-to-image pipelines in local folders, as the parts of a teacher."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from harness.config.schema import ImportedTeacher
from harness.errors import UserError, did_you_mean
from harness.io.artifacts import digest, read_json, sha256_file
from harness.networks import BACKBONES
from harness.networks.vp import (
    PREDICTIONS,
    SCHEDULE_KEYS,
    Codec,
    EmptyPrompt,
    VPDenoiser,
    schedule_sigmas,
)

# The autoencoder of the supported pipelines: 8 x 8 pixels per latent.
STABLE_DIFFUSION_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
PARTS = ("scheduler", "text_encoder", "tokenizer", "vae")  # folders beside the network's


def is_pipeline(section: ImportedTeacher) -> bool:
    """Whether a teacher is a pipeline, by its folder or, before that exists, by its network."""
    if Path(section.source).expanduser().exists():
        return section.pipeline
    kind = (section.network or {}).get("type")
    return kind in BACKBONES and BACKBONES[kind].pipeline is not None


def build_pipeline_denoiser(network: dict) -> VPDenoiser:
    """A pipeline's denoiser with random weights and an empty prompt of zeros. `network`: the
    backbone's class name under `type`, and its arguments."""
    settings = dict(network)
    backbone = BACKBONES[settings.pop("type")]
    denoiser = backbone.denoiser("vp")(backbone.model_class()(**settings), {})
    null = {"embeddings": torch.zeros(1, backbone.pipeline.tokens, denoiser.text_width)}
    if backbone.pipeline.masked:
        null["mask"] = torch.ones(1, backbone.pipeline.tokens, dtype=torch.uint8)
    denoiser.null = EmptyPrompt(null)
    return denoiser


@dataclass
class PipelineTextEncoder:
    """The tokenizer and text encoder of a pipeline (a `harness.features.base.TextEncoder`).

    limit: tokens per text. masked: whether the denoiser masks padding. prepare: applied to texts.
    """

    tokenizer: Callable
    network: nn.Module
    limit: int
    masked: bool
    sha256: str
    prepare: Callable[[str], str] = str

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """`embeddings` float `(B, L, D)` and, if masked, `mask` int `(B, L)`, on the host."""
        tokens = self.tokenizer(
            [self.prepare(text) for text in texts],
            padding="max_length",
            max_length=self.limit,
            truncation=True,
            return_tensors="pt",
        )
        device = next(self.network.parameters()).device
        mask = tokens.attention_mask.to(device) if self.masked else None
        embeddings = self.network(tokens.input_ids.to(device), attention_mask=mask)[0].cpu()
        return {"embeddings": embeddings} | ({"mask": tokens.attention_mask} if self.masked else {})

    def truncated(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than `limit`."""
        ids = self.tokenizer([self.prepare(text) for text in texts]).input_ids
        return sum(len(tokens) > self.limit for tokens in ids)


class PipelineFolder:
    """A pipeline's folder, read part by part: weights from safetensors only, and no code."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        if not (self.folder / "model_index.json").is_file():
            message = f"{folder} is not a pipeline's folder: it has no model_index.json"
            raise UserError(message, "missing-file")
        self.kind = read_json(self.folder / "model_index.json").get("_class_name", "")
        backbones = [name for name in BACKBONES if BACKBONES[name].pipeline]
        known = {BACKBONES[name].pipeline.name: name for name in backbones}
        if self.kind not in known:
            hint = did_you_mean(self.kind, known)
            raise UserError(f"{folder}: unknown pipeline {self.kind!r}{hint}", "unknown-name")
        self.network_class = known[self.kind]
        self.backbone = BACKBONES[self.network_class]
        self.network = self.backbone.pipeline.folder
        for part in (self.network, *PARTS):
            if not (self.folder / part).is_dir():
                message = f"{folder}: {part}/ is missing; download the whole {self.kind}"
                raise UserError(message, "missing-file")
        self.scheduler = read_json(self.folder / "scheduler" / "scheduler_config.json")
        # The keys that decide the noise levels.
        self.schedule = {key: self.scheduler[key] for key in SCHEDULE_KEYS if key in self.scheduler}

    def _load(self, model_class, part: str, **options) -> nn.Module:
        try:
            folder = self.folder / part
            return model_class.from_pretrained(folder, use_safetensors=True, **options).eval()
        except (OSError, ValueError, RuntimeError) as error:
            message = f"{self.folder / part}: {' '.join(str(error).split())}"
            raise UserError(message, "damaged") from None

    def check(self, teacher: str, image_shape: tuple[int, ...] | None, sigma_max: float) -> None:
        """Check the size of its images (unless `image_shape` is None) and the sampler's largest
        noise level, before reading any weights."""
        vae, network = self.config("vae"), self.config(self.network)
        size = network["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
        shape = (vae.get("out_channels", 3), size, size)
        if image_shape and shape != tuple(image_shape):
            own, data = ("x".join(map(str, s)) for s in (shape, image_shape))
            message = f"teacher {teacher} generates {own} images, but the data has {data} images"
            raise UserError(message, "shape")
        largest = schedule_sigmas(self.schedule)[-1].item()
        if sigma_max > 1.01 * largest:
            message = f"{sigma_max:g} exceeds the pipeline's largest noise level, {largest:.4g}"
            raise UserError(f"teachers.{teacher}.sampler.sigma_max: {message}", "noise-level")

    def sha256(self, *parts: str) -> str:
        """Hash of all files in these parts; by default, those that the teacher is made from."""
        parts = parts or (self.network, *PARTS)
        files = sorted(path for part in parts for path in (self.folder / part).glob("*.*"))
        return digest([(str(path.relative_to(self.folder)), sha256_file(path)) for path in files])

    def denoiser(self, null: dict[str, Tensor] | None = None) -> VPDenoiser:
        """Load the denoiser. `null`: the embedding of the empty prompt."""
        model = self._load(self.backbone.model_class(), self.network)
        prediction = self.scheduler.get("prediction_type", "epsilon")
        if prediction not in PREDICTIONS:
            message = f"prediction_type {prediction!r}; supported: {', '.join(PREDICTIONS)}"
            raise UserError(f"{self.folder / 'scheduler'}: {message}", "unknown-name")
        denoiser = self.backbone.denoiser("vp")(model, self.schedule, prediction, null)
        config = self.config("text_encoder")
        width = config.get("hidden_size", config.get("d_model"))
        if width != denoiser.text_width:
            own = f"its text encoder has width {width}, but its {self.network} expects"
            message = f"{own} {denoiser.text_width}"
            raise UserError(f"{self.folder}: {message}", "shape")
        return denoiser

    def text_encoder(self, device: str = "cpu") -> PipelineTextEncoder:
        """Load the text encoder and its tokenizer."""
        from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

        clip = self.backbone.pipeline.text_encoder == "clip"
        # transformers would keep float16 weights, in which T5 overflows.
        network_class, tokenizer_class = T5EncoderModel, T5Tokenizer
        if clip:
            network_class, tokenizer_class = CLIPTextModel, CLIPTokenizer
        network = self._load(network_class, "text_encoder", dtype=torch.float32)
        tokenizer = tokenizer_class.from_pretrained(self.folder / "tokenizer")
        return PipelineTextEncoder(
            tokenizer,
            network.to(device),
            # As in diffusers: PixArt's pipeline has its own limit and lower-cases the text.
            limit=tokenizer.model_max_length if clip else self.backbone.pipeline.tokens,
            masked=not clip or getattr(network.config, "use_attention_mask", False),
            sha256=self.sha256("text_encoder", "tokenizer"),
            prepare=str if clip else lambda text: text.lower().strip(),
        )

    def config(self, part: str) -> dict:
        """The config of a part, without diffusers' private keys."""
        config = read_json(self.folder / part / "config.json")
        return {key: value for key, value in config.items() if not key.startswith("_")}

    def codec(self) -> Codec:
        """Load the autoencoder."""
        from diffusers import AutoencoderKL

        return Codec(self._load(AutoencoderKL, "vae"))
