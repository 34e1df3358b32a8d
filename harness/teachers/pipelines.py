"""diffusers text-to-image pipelines in local folders, as the parts of a teacher."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from harness.config.jobs import TeacherJob
from harness.errors import UserError
from harness.io.artifacts import read_json
from harness.io.packages import require
from harness.networks import BACKBONES, vp
from harness.teachers import ddpm
from harness.teachers.folders import INDEX, DiffusersFolder, unknown_pipeline
from harness.teachers.tokenizers import load_tokenizer

# The autoencoder of the supported pipelines: 8 x 8 pixels per latent.
STABLE_DIFFUSION_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
PARTS = ("scheduler", "text_encoder", "tokenizer", "vae")  # folders beside the network's


def build_pipeline_denoiser(network: dict) -> vp.VPDenoiser:
    """A pipeline's denoiser with random weights and an empty prompt of zeros. `network`: the
    backbone's class name under `type`, and its arguments."""
    backbone = BACKBONES[network["type"]]
    settings = {key: value for key, value in network.items() if key != "type"}
    denoiser = backbone.denoiser("vp")(backbone.model_class()(**settings), {})
    null = {"embeddings": torch.zeros(1, backbone.pipeline.tokens, denoiser.text_width)}
    if backbone.pipeline.masked:
        null["mask"] = torch.ones(1, backbone.pipeline.tokens, dtype=torch.uint8)
    denoiser.null = vp.EmptyPrompt(null)
    return denoiser


class PipelineTextEncoder:
    """The tokenizer and text encoder of a pipeline (a `harness.features.base.TextEncoder`). As in
    diffusers, PixArt's pipeline has its own limit and lower-cases the texts."""

    def __init__(self, folder: "PipelineFolder", device: str):
        require("transformers", f"{folder.folder}: the text encoder")
        from transformers import CLIPTextModel, T5EncoderModel

        pipeline = folder.backbone.pipeline
        self.clip = pipeline.text_encoder == "clip"
        # transformers would keep float16 weights, in which T5 overflows.
        network_class = CLIPTextModel if self.clip else T5EncoderModel
        network = folder.load(network_class, "text_encoder", dtype=torch.float32)
        self.network, self.device = network.to(device), device
        arguments = pipeline.text_encoder, network.config.vocab_size
        self.tokenizer = load_tokenizer(folder.folder / "tokenizer", *arguments)
        self.limit = pipeline.tokens
        if self.clip:  # transformers' default of the tokenizer's limit is 1e30
            positions = network.config.max_position_embeddings
            self.limit = min(self.tokenizer.model_max_length, positions)
        self.masked = not self.clip or getattr(network.config, "use_attention_mask", False)
        self.sha256 = folder.sha256("text_encoder", "tokenizer")

    def _tokens(self, texts: Sequence[str], **options):
        texts = list(texts) if self.clip else [text.lower().strip() for text in texts]
        return self.tokenizer(texts, **options)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """`embeddings` float `(B, L, D)` and, if masked, `mask` int `(B, L)`, on the host."""
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        tokens = self._tokens(texts, max_length=self.limit, **options)
        mask = tokens.attention_mask.to(self.device) if self.masked else None
        output = self.network(tokens.input_ids.to(self.device), attention_mask=mask)
        masks = {"mask": tokens.attention_mask} if self.masked else {}
        return {"embeddings": output[0].cpu(), **masks}

    def truncated(self, texts: Sequence[str]) -> int:
        """How many of the texts are longer than `limit`."""
        return sum(len(tokens) > self.limit for tokens in self._tokens(texts).input_ids)


class PipelineFolder(DiffusersFolder):
    """A text-to-image pipeline's folder."""

    predictions = ("epsilon", "v_prediction")  # those that a one-step scheduler of diffusers takes

    def __init__(self, folder: Path):
        super().__init__(folder)
        if self.kind is None:
            message = f"{folder} is not a pipeline's folder: it has no {INDEX}"
            raise UserError(message, "missing-file")
        index = read_json(self.folder / INDEX)
        pipelines = {name: BACKBONES[name].pipeline for name in BACKBONES}
        known = {pipeline.name: name for name, pipeline in pipelines.items() if pipeline}
        if self.kind not in known:
            raise unknown_pipeline(folder, self.kind, (*known, *ddpm.PIPELINES))
        self.network_class = known[self.kind]
        self.backbone = BACKBONES[self.network_class]
        self.network = self.backbone.pipeline.folder
        for part in (self.network, *PARTS):
            if not (self.folder / part).is_dir():
                message = f"{folder}: {part}/ is missing; download the whole {self.kind}"
                raise UserError(message, "missing-file")
        self._check_files()
        path = self.folder / "scheduler" / "scheduler_config.json"
        self._read_scheduler(path, index.get("scheduler"))

    def network_config(self) -> dict:
        """The network as in an experiment: its class under `type`, and its arguments."""
        return {"type": self.network_class, **self.config(self.network)}

    def files(self, *parts: str) -> list[Path]:
        """The files of these parts; by default, of those that the teacher is made from."""
        parts = parts or (self.network, *PARTS)
        paths = (path for part in parts for path in (self.folder / part).glob("*.*"))
        return sorted(path for path in paths if not path.is_dir())

    def check(self, job: TeacherJob, image_shape: tuple[int, ...]) -> None:
        """Check the image size and the sampler's largest noise level, before reading weights."""
        vae, network = self.config("vae"), self.config(self.network)
        size = network["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
        shape = (vae.get("out_channels", 3), size, size)
        # Real images may have another size: whatever compares the two resizes them.
        if shape != tuple(image_shape) and not job.data_section.has_images:
            own, data = ("x".join(map(str, s)) for s in (shape, image_shape))
            message = f"teacher {job.name} generates {own} images, but the data has {data} images"
            raise UserError(message, "shape")
        self.check_sampler(job)

    def denoiser(self, null: dict[str, Tensor] | None = None) -> vp.VPDenoiser:
        """Load the denoiser. `null`: the embedding of the empty prompt."""
        model = self.load(self.backbone.model_class(), self.network)
        denoiser = self.backbone.denoiser("vp")(model, self.schedule, self.prediction, null)
        config = self.config("text_encoder")
        width = config.get("hidden_size", config.get("d_model"))
        if width != denoiser.text_width:
            message = f"its text encoder has width {width}, but its {self.network} expects"
            raise UserError(f"{self.folder}: {message} {denoiser.text_width}", "shape")
        return denoiser

    def text_encoder(self, device: str = "cpu") -> PipelineTextEncoder:
        """Load the text encoder and its tokenizer."""
        return PipelineTextEncoder(self, device)

    def codec(self) -> vp.Codec:
        """Load the autoencoder."""
        from diffusers import AutoencoderKL

        return vp.Codec(self.load(AutoencoderKL, "vae"))
