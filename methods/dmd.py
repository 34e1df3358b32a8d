"""DMD: one-step diffusion with distribution matching distillation.

Yin, Gharbi, Zhang, Shechtman, Durand, Freeman, Park 2024 (arXiv 2311.18828). The student follows
the difference of two scores: the teacher's, of real data, and the fake score's, a denoiser that is
trained on the student's own images (eq. 7, normalised as in eq. 8). It also regresses teacher pairs
of noise and image. The training code was not released; this is a re-implementation from the paper.

Its ablations (table 2) are settings: `regression: none`, `distribution_matching: false` and
`weighting`.

Deviations:
* LPIPS is the reference implementation, version 0.1 (paper: PIQ's). `regression: l2` (mean squared
  error per element) is for images outside VGG's domain.
* EMA of the generator, which the paper does not mention; `ema_half_life: 0` evaluates the weights
  themselves, as DMD2's code does.

As in the paper's algorithm 1, the generator is updated first, then the fake score on the same
images.
"""

from typing import Literal

from pydantic import field_validator
from torch import Tensor, nn, no_grad
from torch.nn.functional import mse_loss

from harness.context import Context
from harness.denoiser import Denoiser, one_step
from harness.fake_score import FakeScoreMethod, ScoreConfig, denoising_phase
from harness.method import Method, OptimizerConfig, Phase, Requirements, code, ours, paper


def dmd_gradient(x: Tensor, x0_teacher: Tensor, x0_fake: Tensor) -> Tensor:
    """The gradient added to ∂L/∂x before averaging (eqs. 7 and 8): `(B, C, H, W)`, no graph.

    `(x0_fake - x0_teacher) / mean_CHW |x - x0_teacher|`. The paper's weight σ²/α turns a difference
    of scores into this difference of denoised images.
    """
    x, x0_teacher, x0_fake = x.detach(), x0_teacher.detach(), x0_fake.detach()
    return (x0_fake - x0_teacher) / (x - x0_teacher).abs().mean(dim=(1, 2, 3), keepdim=True)


def level_weighted_gradient(
    x0_teacher: Tensor, x0_fake: Tensor, sigma: Tensor, weighting: str
) -> Tensor:
    """The gradient with a weight of the noise level only, the alternatives to eq. 8 (table 2,
    right): `(x0_fake - x0_teacher) / σ` for w = σ/α, `· σ` for w = σ³/α.

    The power of σ is that of w α σ⁻² in eq. 7; α = 1, as noise is added as `x + σ n` (alg. 2).
    """
    power = {"sigma/alpha": -1, "sigma^3/alpha": 1}[weighting]
    return (x0_fake - x0_teacher).detach() * sigma.view(-1, 1, 1, 1) ** power


class DMD(FakeScoreMethod):
    paper = "Yin et al. 2024, arXiv 2311.18828"
    deviations = ("re-implementation: no training code was released",)

    class Config(ScoreConfig):
        batch: int = paper(392, "7 GPUs, batch 392, and as many pairs", gt=0)
        sigma_init: float = paper(80.0, "generator = teacher at the last time step", gt=0)
        lr: float = paper(5e-5, "CIFAR-10", gt=0)
        fake_lr: float = paper(5e-5, "CIFAR-10", gt=0)
        betas: tuple[float, float] = paper((0.9, 0.999), "training details")
        weight_decay: float = paper(0.01, "training details", ge=0)
        warmup_steps: int = paper(500, "training details", ge=0)
        clip: float = paper(10.0, "training details", gt=0)
        bins: int = paper(1000, "Karras levels, rho 7; or a scheduler's times", gt=1)
        t_min: float = paper(0.02, "t ~ U(0.02 T, 0.98 T)", ge=0, le=1)
        t_max: float = paper(0.98, "training details", ge=0, le=1)
        regression: Literal["lpips", "l2", "none"] = paper("lpips", "LPIPS-VGG at 224 px")
        regression_weight: float = paper(0.25, "lambda_reg, CIFAR-10 conditional", ge=0)
        pairs: int = paper(100_000, "CIFAR-10 conditional", gt=0)
        pair_steps: int = paper(18, "Heun steps per pair", gt=0)
        ema_half_life: int = ours(500_000, "images, as SiD and GDD; the paper has none", ge=0)
        labels: Literal["data", "uniform"] = code("uniform", "DMD2's code; the paper has none")
        distribution_matching: bool = paper(True, "false: an ablation, the regression alone")
        weighting: Literal["eq8", "sigma/alpha", "sigma^3/alpha"] = paper(
            "eq8", "of the distribution matching gradient; others: ablations"
        )

        @field_validator("distribution_matching")
        @classmethod
        def _some_loss_remains(cls, matching: bool, info) -> bool:
            if not matching and info.data.get("regression") == "none":
                raise ValueError("must be true with regression: none")
            return matching

    def __init__(self, config: Config, teacher: Denoiser, required=None):
        # Without distribution matching there is no fake score, which saves a second network.
        parent = FakeScoreMethod if config.distribution_matching else Method
        parent.__init__(self, config, teacher, required)
        self.lpips = self.required.get("lpips")

    def networks(self) -> dict[str, nn.Module]:
        return super().networks() if self.config.distribution_matching else {}

    def frozen_networks(self) -> dict[str, nn.Module]:
        teacher = super().frozen_networks() if self.config.distribution_matching else {}
        return teacher | ({"lpips": self.lpips} if self.lpips else {})

    @classmethod
    def deviations_under(cls, config: Config) -> tuple[str, ...]:
        l2 = ("regression in L2 instead of LPIPS",) if config.regression == "l2" else ()
        ema = ("EMA of the generator",) if config.ema_half_life else ()
        return cls.deviations + l2 + ema

    @classmethod
    def requirements(cls, config: Config) -> Requirements:
        pairs, steps, lpips = config.pairs, config.pair_steps, config.regression == "lpips"
        if config.regression == "none":
            return Requirements()
        return Requirements(pairs=pairs, pair_steps=steps, lpips=lpips)

    def _optimizer(self, lr: float) -> OptimizerConfig:
        shared = {"betas", "weight_decay", "warmup_steps", "clip"}
        return OptimizerConfig(lr=lr, **self.config.model_dump(include=shared))

    def phases(self) -> list[Phase]:
        c = self.config
        generator = Phase("generator", "student", self.generator_loss, self._optimizer(c.lr))
        if not c.distribution_matching:
            return [generator]
        adam = self._optimizer(c.fake_lr)
        fake = denoising_phase(adam, self.teacher, self.fake_sigma, dropout=c.fake_dropout)
        return [generator, fake]

    def _bin(self, u: Tensor, low: float, high: float) -> Tensor:
        """Noise level of a bin between two fractions of the time axis, uniform over bins."""
        last = self.config.bins - 1
        first, steps = round(low * last), round(high * last) - round(low * last)
        bins = first + (u * (steps + 1)).floor().clamp_max(steps)
        return self.teacher.sigma_at(bins / last)

    def fake_sigma(self, context: Context) -> Tensor:
        """Uniform over all bins. The teacher's loss weight is the paper's: SNR + 1/σ_data² for EDM,
        SNR for networks that predict noise."""
        return self._bin(context.uniform("sigma"), 0.0, 1.0)

    def generator_loss(self, context: Context) -> Tensor:
        c = self.config
        matching = self.distribution_matching(context) if c.distribution_matching else 0.0
        if c.regression == "none":
            return matching
        return matching + c.regression_weight * self.regression(context)

    def distribution_matching(self, context: Context) -> Tensor:
        """A surrogate loss with the gradient of eq. 7 over the elements of a batch."""
        c, images = self.config, context.generated()
        sigma = self._bin(context.uniform("sigma"), c.t_min, c.t_max)
        noised = context.noised(images.x.detach(), sigma)
        with no_grad():
            teacher = context.networks["teacher"](noised, sigma, images.condition)
            fake = self.fake_x0(context, noised, sigma, images.condition)
        if c.weighting == "eq8":
            gradient = dmd_gradient(images.x, teacher, fake)
        else:
            gradient = level_weighted_gradient(teacher, fake, sigma, c.weighting)
        # Half the mean square of x - sg(x - gradient): its derivative is gradient / elements.
        loss = mse_loss(images.x, images.x.detach() - gradient) / 2
        context.log("distribution_matching", loss)
        return loss

    def regression(self, context: Context) -> Tensor:
        """Distance of student and teacher images from the same noise."""
        c = self.config
        z, target, condition = context.pairs()
        x = one_step(context.networks["student"], z, condition, c.sigma_init)
        if c.regression == "lpips":
            codec, lpips = self.teacher.codec, context.networks["lpips"]
            distance = lpips(codec(x), codec(target)).mean()
        else:
            distance = mse_loss(x, target)
        context.log("regression", distance)
        return distance
