"""Variance-preserving networks of diffusers' pipelines as denoisers.

They were trained on `x_t = (x0 + σ n) / sqrt(1 + σ²)` at integer timesteps t of a scheduler, and
predict the noise n, the velocity `(n - σ x0) / sqrt(1 + σ²)`, or the clean image x0 ("sample").
"""

import math
from collections.abc import Collection

import torch
from torch import Tensor, nn

from harness.denoiser import Condition, Denoiser
from harness.schedules import edm_weight

# Keys of a scheduler's config that decide σ at each timestep.
_BETAS = ("beta_start", "beta_end", "beta_schedule", "trained_betas")
SCHEDULE_KEYS = ("num_train_timesteps", *_BETAS, "rescale_betas_zero_snr")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
# diffusers' variance-preserving schedulers, and their defaults of `beta_start` and `beta_end`. The
# other defaults are 1000 timesteps and a linear schedule.
SCHEDULERS = {
    **dict.fromkeys(
        (
            *("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler"),
            *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
            *("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"),
            *("DEISMultistepScheduler", "UniPCMultistepScheduler"),
        ),
        (0.0001, 0.02),
    ),
    **dict.fromkeys(
        (
            *("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler"),
            "DPMSolverSDEScheduler",
        ),
        (0.00085, 0.012),
    ),
}
# Those that apply `rescale_betas_zero_snr`. The others ignore it.
ZERO_SNR_SCHEDULERS = (
    *("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler"),
    *("EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"),
)


def read_scheduler(
    kind: str, config: dict, predictions: Collection[str] = PREDICTIONS
) -> tuple[dict, str]:
    """The schedule (`SCHEDULE_KEYS`) and the prediction of a network with this scheduler class and
    config. The class's defaults replace absent keys. predictions: those that are accepted. Raises a
    `ValueError` if the network is not one that `VPDenoiser` describes."""
    if kind not in SCHEDULERS:
        raise ValueError(f"{kind!r} is not one of the supported ones: {', '.join(SCHEDULERS)}")
    start, end = SCHEDULERS[kind]
    schedule: dict = {"num_train_timesteps": 1000, "beta_start": start, "beta_end": end}
    schedule |= {key: config[key] for key in SCHEDULE_KEYS if key in config}
    prediction, betas = config.get("prediction_type", "epsilon"), schedule.get("trained_betas")
    if prediction not in predictions:
        message = f"prediction_type {prediction!r}; supported: {', '.join(predictions)}"
        raise ValueError(message)
    for key, value in (("use_flow_sigmas", True), ("timestep_type", "continuous")):
        if config.get(key) == value:
            raise ValueError(f"{key}: {value} is not a variance-preserving schedule of timesteps")
    name = schedule.setdefault("beta_schedule", "linear")
    if betas is None and name not in BETA_SCHEDULES:
        message = f"beta_schedule {name!r}; supported: {', '.join(BETA_SCHEDULES)}"
        raise ValueError(message)
    rescaled = schedule.get("rescale_betas_zero_snr")
    if rescaled and kind not in ZERO_SNR_SCHEDULERS:
        message = f"{kind} ignores rescale_betas_zero_snr: true; name a scheduler that applies it"
        message += f", such as {ZERO_SNR_SCHEDULERS[0]}, here and in model_index.json, or set the"
        raise ValueError(f"{message} key to false if the network was trained without it")
    zero = rescaled or (betas and betas[-1] == 1)
    if zero and prediction == "epsilon":
        message = "at the last timestep of a schedule with zero terminal SNR, predicted noise says"
        message += " nothing about the image; set rescale_betas_zero_snr: false if the network was"
        raise ValueError(f"{message} trained without it, or prediction_type: v_prediction")
    return schedule, prediction


def _betas(schedule: dict) -> Tensor:
    """The β of each timestep, float32 `(T,)`, bit for bit those of diffusers' schedulers, whose
    module takes seconds to import."""
    count = schedule.get("num_train_timesteps", 1000)
    low, high = schedule.get("beta_start", 0.0001), schedule.get("beta_end", 0.02)
    name = schedule.get("beta_schedule", "linear")
    if (trained := schedule.get("trained_betas")) is not None:
        betas = torch.tensor(trained, dtype=torch.float32)
    elif name == "linear":
        betas = torch.linspace(low, high, count, dtype=torch.float32)
    elif name == "scaled_linear":
        betas = torch.linspace(low**0.5, high**0.5, count, dtype=torch.float32) ** 2
    else:  # squaredcos_cap_v2: Nichol and Dhariwal 2021, eq. 17
        angles = [(i / count + 0.008) / 1.008 * math.pi / 2 for i in range(count + 1)]
        signal = [math.cos(angle) ** 2 for angle in angles]
        values = [min(1 - signal[i + 1] / signal[i], 0.999) for i in range(count)]
        betas = torch.tensor(values, dtype=torch.float32)
    if schedule.get("rescale_betas_zero_snr"):  # Lin et al. 2023 (arXiv 2305.08891), algorithm 1
        roots = (1 - betas).cumprod(0).sqrt()
        first, last = roots[0].clone(), roots[-1].clone()
        signals = ((roots - last) * (first / (first - last))) ** 2
        betas = 1 - torch.cat([signals[:1], signals[1:] / signals[:-1]])
    return betas


def schedule_sigmas(schedule: dict) -> Tensor:
    """σ at timesteps 0, 1, … of a scheduler: float64 `(T,)`, increasing. With zero terminal SNR the
    last one would be infinite; it is 4096, as in diffusers, or, if the one before is larger than
    that, twice the one before."""
    with torch.device("cpu"):  # values are needed even under the meta device
        alphas = (1 - _betas(schedule)).cumprod(0).double()
    if schedule.get("rescale_betas_zero_snr") or alphas[-1] == 0:  # 0: trained betas that end at 1
        alphas[-1] = 2**-24 if alphas[-2] > 2**-24 else alphas[-2] / 4
    return ((1 - alphas) / alphas).sqrt()


class VPDenoiser(Denoiser):
    """A network that predicts noise, velocity or the clean image, as D(x; σ, c). A subclass
    defines `null_condition` and `run_backbone(x, time, condition)` for variance-preserving `x` and
    timesteps `(B,)`. schedule: `SCHEDULE_KEYS` of the scheduler's config.
    """

    preconditioning = "vp"
    settings = ("schedule", "prediction", "sigma_data")

    def __init__(
        self, backbone: nn.Module, schedule: dict, prediction="epsilon", sigma_data: float = 1.0
    ):
        super().__init__()
        self.backbone, self.schedule, self.prediction = backbone, schedule, prediction
        self.sigma_data = sigma_data
        sigmas = schedule_sigmas(schedule)
        self._levels = sigmas.tolist()  # on the host: comparisons do not wait for the device
        self.register_buffer("log_sigmas", sigmas.log(), persistent=False)

    def level(self, sigma: float) -> float:
        """The level of an integer timestep nearest in log σ, where a stock scheduler can start."""
        return min(self._levels, key=lambda level: abs(math.log(level / sigma)))

    def sigma_at(self, u: Tensor) -> Tensor:
        grid = self.log_sigmas
        time = u.double() * (len(grid) - 1)
        low = time.floor().long().clamp(0, len(grid) - 2)
        return torch.lerp(grid[low], grid[low + 1], time - low).exp().float()

    def within(self, sigma: Tensor) -> Tensor:
        return sigma.clamp(self._levels[0], self._levels[-1])

    def loss_weight(self, sigma: Tensor) -> Tensor:
        weights = {"epsilon": sigma**-2, "sample": torch.ones_like(sigma)}
        # The error of a predicted velocity has EDM's weight with unit variance, (1 + σ²) / σ².
        return weights.get(self.prediction, edm_weight(sigma, 1.0))

    def time(self, sigma: Tensor) -> Tensor:
        """Timesteps, float32 `(B,)`, of noise levels `(B,)`: integers for levels of the schedule,
        otherwise interpolated in log σ and clipped."""
        log, grid = sigma.double().log(), self.log_sigmas
        above = torch.searchsorted(grid, log).clamp(1, len(grid) - 1)
        low, high = grid[above - 1], grid[above]
        time = above - 1 + ((log - low) / (high - low)).clamp(0, 1)
        whole = time.round()
        return torch.where((time - whole).abs() < 1e-3, whole, time).float()

    def forward(self, x: Tensor, sigma: Tensor, condition: Condition = None) -> Tensor:
        x, sigma = x.float(), sigma.float().view(-1, 1, 1, 1)
        if condition is None:
            condition = self.null_condition(len(x))
        scale = (1 + sigma**2).rsqrt()
        output = self.run_backbone(scale * x, self.time(sigma.flatten()), condition).float()
        if self.prediction == "epsilon":
            return x - sigma * output
        if self.prediction == "sample":
            return output
        return scale**2 * x - sigma * scale * output


class EmptyPrompt(nn.Module):
    """Embedding of the empty prompt: tensors `(1, ...)` that are not part of the state dict."""

    def __init__(self, tensors: dict[str, Tensor] | None):
        super().__init__()
        for name, tensor in (tensors or {}).items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, batch: int) -> dict[str, Tensor]:
        tensors = dict(self.named_buffers())
        if not tensors:
            raise ValueError("classifier-free guidance needs the empty prompt (null.safetensors)")
        return {name: part.expand(batch, *part.shape[1:]) for name, part in tensors.items()}


class TextVPDenoiser(VPDenoiser):
    """A text-conditional `VPDenoiser` on latents.

    condition: `embeddings` `(B, L, D)` of the text encoder's last layer and, if padding is masked,
    `mask` `(B, L)` (1: token, 0: padding). null: the condition of the empty prompt, batch 1.
    sigma_data: latents have about unit variance.
    """

    def __init__(
        self, backbone: nn.Module, schedule: dict, prediction="epsilon", null=None, sigma_data=1.0
    ):
        super().__init__(backbone, schedule, prediction, sigma_data)
        self.null = EmptyPrompt(null)

    def null_condition(self, batch: int) -> Condition:
        return self.null(batch)


class Codec(nn.Module):
    """Decoder of an autoencoder: latents `(B, C, H, W)` -> pixels in [-1, 1], differentiable."""

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae.requires_grad_(False)

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents / self.vae.config.scaling_factor).sample
