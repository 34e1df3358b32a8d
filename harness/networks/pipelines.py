"""Text-to-image networks of diffusers' pipelines as denoisers: Stable Diffusion, PixArt.

They were trained on variance-preserving data `x_t = (x0 + σ n) / sqrt(1 + σ²)` at whole times t of
a scheduler, and predict the noise n or the velocity `(n - σ x0) / sqrt(1 + σ²)`. A denoiser takes
any σ: between two of the scheduler's times it asks for a time between them.

`condition`: `embeddings` `(B, L, D)` of the text encoder's last layer and, where padding is masked,
`mask` `(B, L)` (1: a token, 0: padding).
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from harness.artifacts import digest, read_json, sha256_file
from harness.denoiser import Condition, Denoiser, NullText
from harness.errors import UserError, did_you_mean
from harness.prompts import TextEncoder

# Of a scheduler's configuration, what decides σ at each time.
SCHEDULE = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "rescale_betas_zero_snr",
)
PREDICTIONS = ("epsilon", "v_prediction")


def schedule_sigmas(schedule: dict) -> Tensor:
    """σ of the whole times 0, 1, … of a scheduler: float64 `(T,)`, increasing.

    A terminal signal of zero is cut off as diffusers' Euler scheduler does it, so σ stays finite.
    """
    from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler

    with torch.device("cpu"):  # also where a plan counts without memory
        alphas = EulerDiscreteScheduler(**schedule).alphas_cumprod.double()
    return ((1 - alphas) / alphas).sqrt()


class VPDenoiser(Denoiser):
    """A backbone that predicts noise or velocity at whole times, as D(x; σ, c).

    `schedule`: keys of `SCHEDULE` as in a scheduler's configuration. `null`: the condition that
    means "no text", batch 1. Latents have about unit variance: `sigma_data` is 1.
    """

    def __init__(
        self,
        backbone: nn.Module,
        schedule: dict,
        prediction: str = "epsilon",
        null: dict[str, Tensor] | None = None,
        sigma_data: float = 1.0,
    ):
        super().__init__()
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction {prediction!r} is not one of {', '.join(PREDICTIONS)}")
        self.backbone, self.schedule, self.prediction = backbone, schedule, prediction
        self.sigma_data = sigma_data
        sigmas = schedule_sigmas(schedule)
        self._levels = sigmas.tolist()  # on the host
        self.register_buffer("log_sigmas", sigmas.log(), persistent=False)
        self.null = NullText(null or {})

    @property
    def image_shape(self) -> tuple[int, int, int]:
        size = self.backbone.config.sample_size
        return (self.backbone.config.in_channels, size, size)

    @property
    def precondition(self) -> dict:
        names = ("schedule", "prediction", "sigma_data")
        return {"preconditioning": "vp"} | {name: getattr(self, name) for name in names}

    def null_condition(self, batch: int) -> Condition:
        return self.null(batch)

    def level(self, sigma: float) -> float:
        """That of the whole time nearest in log σ: a stock scheduler can start there."""
        return min(self._levels, key=lambda level: abs(math.log(level / sigma)))

    def sigma_at(self, u: Tensor) -> Tensor:
        grid = self.log_sigmas
        time = u.double() * (len(grid) - 1)
        low = time.floor().long().clamp(0, len(grid) - 2)
        return torch.lerp(grid[low], grid[low + 1], time - low).exp().float()

    def within(self, sigma: Tensor) -> Tensor:
        return sigma.clamp(self._levels[0], self._levels[-1])

    def loss_weight(self, sigma: Tensor) -> Tensor:
        # The error of a predicted velocity is EDM's with unit variance, (1 + σ²) / σ².
        return sigma**-2 if self.prediction == "epsilon" else super().loss_weight(sigma)

    def time(self, sigma: Tensor) -> Tensor:
        """The time `(B,)` float32 of noise levels `(B,)`, linear in log σ between two whole ones.

        Levels beyond the ends get the time of the end. A level of the grid gets a whole time in
        spite of rounding.
        """
        log, grid = sigma.double().log(), self.log_sigmas
        above = torch.searchsorted(grid, log).clamp(1, len(grid) - 1)
        low, high = grid[above - 1], grid[above]
        time = above - 1 + ((log - low) / (high - low)).clamp(0, 1)
        whole = time.round()
        return torch.where((time - whole).abs() < 1e-3, whole, time).float()

    def run_backbone(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """The raw network: variance-preserving input `(B, C, H, W)` at times `(B,)`."""
        raise NotImplementedError

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition = None) -> Tensor:
        x, sigma = x.float(), sigma.float().view(-1, 1, 1, 1)
        if condition is None:
            condition = self.null_condition(len(x))
        scale = (1 + sigma**2).rsqrt()
        output = self.run_backbone(scale * x, self.time(sigma.flatten()), condition).float()
        if self.prediction == "epsilon":
            return x - sigma * output
        return scale**2 * x - sigma * scale * output


class StableDiffusionDenoiser(VPDenoiser):
    """`UNet2DConditionModel` of a `StableDiffusionPipeline`."""

    @property
    def text_width(self) -> int:
        return self.backbone.config.cross_attention_dim

    def run_backbone(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return self.backbone(
            x,
            time,
            encoder_hidden_states=condition["embeddings"].to(x),
            encoder_attention_mask=condition.get("mask"),
        ).sample


class PixArtDenoiser(VPDenoiser):
    """`PixArtTransformer2DModel` of a `PixArtAlphaPipeline`.

    The learned variance, its second half of channels, is left out. The transformer for images of
    1024 pixels also takes their size and shape: those of a square of its own size.
    """

    PIXELS = 8  # of an image, along each side of a latent's place

    @property
    def text_width(self) -> int:
        return self.backbone.config.caption_channels

    def run_backbone(self, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        size: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if self.backbone.config.sample_size == 128:
            height, width = (self.PIXELS * side for side in x.shape[-2:])
            size["resolution"] = x.new_tensor([height, width]).repeat(len(x), 1)
            size["aspect_ratio"] = x.new_tensor([height / width]).repeat(len(x), 1)
        output = self.backbone(
            x,
            encoder_hidden_states=condition["embeddings"].to(x),
            encoder_attention_mask=condition["mask"],
            timestep=time,
            added_cond_kwargs=size,
        ).sample
        return output[:, : x.shape[1]]


class Codec(nn.Module):
    """A pipeline's autoencoder: latents `(B, C, H, W)` -> pixels in [-1, 1], differentiably."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae.requires_grad_(False)

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents / self.vae.config.scaling_factor).sample


# A network's class -> its denoiser.
VP_DENOISERS = {
    "UNet2DConditionModel": StableDiffusionDenoiser,
    "PixArtTransformer2DModel": PixArtDenoiser,
}
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
