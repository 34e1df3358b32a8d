"""Text-to-image networks of diffusers' pipelines as denoisers: Stable Diffusion, PixArt.

They were trained on variance-preserving data `x_t = (x0 + σ n) / sqrt(1 + σ²)` at whole times t of
a scheduler, and predict the noise n or the velocity `(n - σ x0) / sqrt(1 + σ²)`. A denoiser takes
any σ: between two of the scheduler's times it asks for a time between them.

`condition`: `embeddings` `(B, L, D)` of the text encoder's last layer and, where padding is masked,
`mask` `(B, L)` (1: a token, 0: padding).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from harness.denoiser import Condition, Denoiser, NullText

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
