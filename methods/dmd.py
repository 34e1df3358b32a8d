"""DMD: one-step diffusion with distribution matching distillation.

Yin, Gharbi, Zhang, Shechtman, Durand, Freeman, Park 2024 (arXiv 2311.18828). The student follows
the difference of two scores: the teacher's (of real data) and a fake score's, a denoiser trained
all along on the student's own images (eq. 7, gradient normalised as in eq. 8), and it reproduces
teacher pairs of noise and image. The training code was never released: this is a
re-implementation from the paper.

Deviations:
* LPIPS is the reference implementation's, version 0.1 (paper: PIQ's). `regression: l2` (mean
  squared error per element) is for images that mean nothing to VGG; `none` is the ablation.
* The batch of images that the generator's phase uses serves the fake score too, as in the paper's
  algorithm 1, but the fake score is updated first, so that both can share one forward pass.
* EMA of the generator: the paper does not mention one.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn, no_grad
from torch.nn.functional import mse_loss

from harness.denoiser import Denoiser, one_step
from harness.fake_score import FakeScoreMethod, denoising_phase
from harness.method import (
    Context,
    MethodConfig,
    OptimizerConfig,
    Phase,
    Requirements,
    ours,
    paper,
)
from harness.schedules import karras_sigma


def dmd_gradient(x: Tensor, x0_teacher: Tensor, x0_fake: Tensor) -> Tensor:
    """What the loss adds to ∂L/∂x, before averaging (eqs. 7 and 8): `(B, C, H, W)`, no graph.

    `(x0_fake - x0_teacher) / mean_CHW |x - x0_teacher|`. In denoiser units the weight σ²/α of the
    paper turns a difference of scores into this difference of denoised images.
    """
    x, x0_teacher, x0_fake = x.detach(), x0_teacher.detach(), x0_fake.detach()
    return (x0_fake - x0_teacher) / (x - x0_teacher).abs().mean(dim=(1, 2, 3), keepdim=True)


class DMD(FakeScoreMethod):
    paper = "Yin et al. 2024, arXiv 2311.18828"
    deviations = (
        "re-implementation: no training code was released",
        "fake score first, on the generator's batch; EMA",
    )

    class Config(MethodConfig):
        batch: int = paper(392, "7 GPUs, batch 392, and as many pairs", gt=0)
        sigma_init: float = paper(80.0, "generator = teacher at the last time step", gt=0)
        lr: float = paper(5e-5, "CIFAR-10", gt=0)
        fake_lr: float = paper(5e-5, "CIFAR-10", gt=0)
        betas: tuple[float, float] = paper((0.9, 0.999), "training details")
        weight_decay: float = paper(0.01, "training details", ge=0)
        warmup_steps: int = paper(500, "training details", ge=0)
        clip: float = paper(10.0, "training details", gt=0)
        bins: int = paper(1000, "Karras levels, rho 7", gt=1)
        t_min: float = paper(0.02, "t ~ U(0.02 T, 0.98 T)", ge=0, le=1)
        t_max: float = paper(0.98, "training details", ge=0, le=1)
        regression: Literal["lpips", "l2", "none"] = paper("lpips", "LPIPS-VGG at 224 px")
        regression_weight: float = paper(0.25, "lambda_reg, CIFAR-10 conditional", ge=0)
        pairs: int = paper(100_000, "CIFAR-10 conditional", gt=0)
        pair_steps: int = paper(18, "Heun steps per pair", gt=0)
        ema_half_life: int = ours(500_000, "images, as SiD and GDD; the paper has none", ge=0)

    def __init__(self, config: Config, teacher: Denoiser, features: nn.Module | None = None):
        super().__init__(config, teacher)
        self.lpips = features

    def frozen_networks(self) -> dict[str, nn.Module]:
        return {"teacher": self.teacher} | ({"lpips": self.lpips} if self.lpips else {})

    @classmethod
    def deviations_under(cls, config: Config) -> tuple[str, ...]:
        l2 = ("regression in L2 instead of LPIPS",) if config.regression == "l2" else ()
        return cls.deviations + l2

    @classmethod
    def requirements(cls, config: Config) -> Requirements:
        if config.regression == "none":
            return Requirements()
        return Requirements(
            pairs=config.pairs, pair_steps=config.pair_steps, lpips=config.regression == "lpips"
        )

    def _optimizer(self, lr: float) -> OptimizerConfig:
        c = self.config
        return OptimizerConfig(
            lr=lr,
            betas=c.betas,
            weight_decay=c.weight_decay,
            warmup_steps=c.warmup_steps,
            clip=c.clip,
        )

    def phases(self) -> list[Phase]:
        c = self.config
        return [
            denoising_phase(self._optimizer(c.fake_lr), self.teacher.sigma_data, self.fake_sigma),
            Phase("generator", "student", self.generator_loss, self._optimizer(c.lr)),
        ]

    def _bin(self, u: Tensor, low: float, high: float) -> Tensor:
        """Noise level of a uniformly drawn bin between two fractions of the time axis."""
        last = self.config.bins - 1
        return karras_sigma(((low + u * (high - low)) * last).round() / last)

    def fake_sigma(self, context: Context) -> Tensor:
        """Uniform over all bins; with EDM's weight, which is the paper's SNR + 1/σ_data²."""
        return self._bin(context.uniform("sigma"), 0.0, 1.0)

    def generator_loss(self, context: Context) -> Tensor:
        c, images = self.config, context.generated()
        sigma = self._bin(context.uniform("sigma"), c.t_min, c.t_max)
        noised = context.noised(images.x.detach(), sigma)
        teacher, fake = context.networks["teacher"], context.networks["fake_score"]
        with no_grad():
            gradient = dmd_gradient(
                images.x,
                teacher(noised, sigma, images.condition),
                fake(noised, sigma, images.condition),
            )
        # Half the mean square of x - sg(x - gradient): its derivative is gradient / elements.
        loss = mse_loss(images.x, images.x.detach() - gradient) / 2
        context.log("distribution_matching", loss)
        if c.regression == "none":
            return loss
        z, target, condition = context.pairs()
        made = one_step(context.networks["student"], z, condition, c.sigma_init)
        if c.regression == "lpips":
            pixels = map(self.teacher.codec, (made, target))
            regression = context.networks["lpips"](*pixels).mean()
        else:
            regression = mse_loss(made, target)
        context.log("regression", regression)
        return loss + c.regression_weight * regression
