"""diffusers text-to-image pipelines in local folders, as the parts of a teacher."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from harness.config.jobs import TeacherJob
from harness.config.schema import ImportedTeacher
from harness.errors import UserError, did_you_mean
from harness.io.artifacts import digest, read_json, reject_lfs_pointer, sha256_file
from harness.networks import BACKBONES, vp
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


def is_pipeline(section: ImportedTeacher, files: bool = False) -> bool:
    """Whether a teacher is a pipeline, by its folder or, if that need not be complete, by its
    network. files: what exists must be complete."""
    if section.pipeline or (files and Path(section.source).expanduser().exists()):
        return section.pipeline
    kind = (section.network or {}).get("type")
    return kind in BACKBONES and BACKBONES[kind].pipeline is not None


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


class PipelineFolder:
    """A pipeline's folder, read part by part: weights from safetensors only, and no code."""

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        if not (self.folder / "model_index.json").is_file():
            message = f"{folder} is not a pipeline's folder: it has no model_index.json"
            raise UserError(message, "missing-file")
        index = read_json(self.folder / "model_index.json")
        self.kind = index.get("_class_name", "")
        pipelines = {name: BACKBONES[name].pipeline for name in BACKBONES}
        known = {pipeline.name: name for name, pipeline in pipelines.items() if pipeline}
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
        for path in self.files():
            if not path.exists():
                message = f"{path} is a link to {os.readlink(path)}, which does not exist"
                raise UserError(message, "dangling-link")
            reject_lfs_pointer(path)
        self.schedule, self.prediction = self._read_scheduler(index.get("scheduler"))

    def _read_scheduler(self, named: Sequence[str] | None) -> tuple[dict, str]:
        """The schedule and the prediction. diffusers uses the class that model_index.json names;
        the config may come from another, which must be supported, too. Sets `other_scheduler`: that
        class, if it is not the config's."""
        path = self.folder / "scheduler" / "scheduler_config.json"
        config = read_json(path)
        kinds = list(filter(None, (config.get("_class_name"), named and named[1]))) or [None]
        self.other_scheduler = kinds[-1] if kinds[-1] != config.get("_class_name") else None
        try:
            return [vp.read_scheduler(kind, config) for kind in kinds][-1]
        except ValueError as error:
            raise UserError(f"{path}: {error}", "scheduler") from None

    def files(self, *parts: str) -> list[Path]:
        """The files of these parts; by default, of those that the teacher is made from."""
        parts = parts or (self.network, *PARTS)
        paths = (path for part in parts for path in (self.folder / part).glob("*.*"))
        return sorted(path for path in paths if not path.is_dir())

    def load(self, model_class, part: str, **options) -> nn.Module:
        """Load a network. Weights that are missing would be random, so they are errors."""
        from safetensors import SafetensorError

        folder, options = self.folder / part, {**options, "output_loading_info": True}
        try:
            model, info = model_class.from_pretrained(folder, use_safetensors=True, **options)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{folder}: {' '.join(str(error).split())}", "damaged") from None
        if missing := sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"]))):
            message = f"{len(missing)} weights of {model_class.__name__} are missing: {missing[0]}"
            raise UserError(f"{folder}: {message}, …; download it again", "damaged")
        return model.eval()

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
        try:
            sigmas = vp.schedule_sigmas(self.schedule)
        except (TypeError, ValueError, RuntimeError) as error:
            message = f"{self.folder / 'scheduler'}: {' '.join(str(error).split())}"
            raise UserError(message, "scheduler") from None
        if not (sigmas[0] > 0 and (sigmas.diff() > 0).all()):
            message = "noise levels are not positive and increasing, or not finite"
            raise UserError(f"{self.folder / 'scheduler'}: {message}", "scheduler")
        largest = sigmas[-1].item()
        sigma_max = job.section.sampler.sigma_max
        if sigma_max > 1.01 * largest:
            message = f"{sigma_max:g} exceeds the pipeline's largest noise level, {largest:.4g}"
            raise UserError(f"teachers.{job.name}.sampler.sigma_max: {message}", "noise-level")

    def sha256(self, *parts: str) -> str:
        """Hash of all files in these parts; by default, of what the teacher is made from: those
        files, and the scheduler's class."""
        files = self.files(*parts)
        facts = [(str(path.relative_to(self.folder)), sha256_file(path)) for path in files]
        if self.other_scheduler and not parts:  # the config's own class is in its file
            facts.append(("model_index.json", self.other_scheduler))
        return digest(facts)

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

    def config(self, part: str) -> dict:
        """The config of a part, without diffusers' private keys."""
        config = read_json(self.folder / part / "config.json")
        return {key: value for key, value in config.items() if not key.startswith("_")}

    def codec(self) -> vp.Codec:
        """Load the autoencoder."""
        from diffusers import AutoencoderKL

        return vp.Codec(self.load(AutoencoderKL, "vae"))
