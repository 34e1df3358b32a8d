"""GDD and GDD-I: adversarial distillation that uses a diffusion model's innate one-step ability.

Zheng and Yang 2024 (arXiv 2405.20750). The student starts from the teacher's weights under a
consistency model's preconditioning, and learns by a distribution-level loss: a GAN whose
discriminator has heads on random mixtures of frozen pretrained features (Sauer et al. 2021,
projected GAN). GDD-I is this method with the student's option `freeze: innate`.

Deviations:
* The projected discriminator is written from its paper (`harness.discriminators.compact`). Its
  heads use GroupNorm and learn class embeddings; the authors embed ImageNet's classes.
* For images without a suitable pretrained backbone (8 x 8 digits), `features` names a feature
  network of the experiment: two convolutions on each of its maps, without random mixing. It should
  not be used for scoring.
* R1: the authors' adversarial terms are sums over the n = 64 images of one GPU, while R1 is a mean.
  Here all terms are means, so the default is their gamma of 1e-4 divided by n.
"""

import torch
from pydantic import field_validator
from torch import Tensor, nn, no_grad
from torch.nn.functional import softplus

from harness.context import Context
from harness.denoiser import Condition, EDMDenoiser
from harness.discriminators.compact import CompactDiscriminator, CompactFeatures
from harness.discriminators.feature_maps import FeatureDiscriminator
from harness.method import Method, MethodConfig, OptimizerConfig, Phase, Requirements, code, ours


def generator_loss(logits: list[Tensor]) -> Tensor:
    """Non-saturating loss: mean over samples and positions, summed over heads (`(B, ...)` each)."""
    return sum(softplus(-head).mean() for head in logits)


def discriminator_loss(real_logits: list[Tensor], fake_logits: list[Tensor]) -> Tensor:
    """Non-saturating loss that raises real logits and lowers fake ones; averaged as above."""
    real = sum(softplus(-head).mean() for head in real_logits)
    return real + sum(softplus(head).mean() for head in fake_logits)


def r1_penalty(real_logits: list[Tensor], real_images: Tensor, gamma: float) -> Tensor:
    """`gamma/2 ‖∂Σlogits/∂x‖²` per sample, `(B,)`; images unaugmented (Mescheder et al. 2018)."""
    total = sum(head.sum() for head in real_logits)
    (gradient,) = torch.autograd.grad(total, real_images, create_graph=True)
    return gamma / 2 * gradient.square().sum(dim=(1, 2, 3))


class GDD(Method):
    paper = "Zheng and Yang 2024, arXiv 2405.20750"
    data_free = False

    class Config(MethodConfig):
        batch: int = code(256, "CIFAR-10", gt=0)
        sigma_init: float = code(80.0, "80 z at t = 80", gt=0)
        lr: float = code(1e-4, "CIFAR-10", gt=0)
        discriminator_lr: float = code(1e-4, "CIFAR-10; scaled by lazy R1", gt=0)
        betas: tuple[float, float] = code((0.0, 0.99), "Adam")
        r1_gamma: float = code(1e-4 / 64, "1e-4 against sums over one GPU's 64 images", ge=0)
        r1_every: int = code(16, "lazy regularisation, loss x 16, not at step 0", gt=0)
        backbones: tuple[str, ...] = code(
            ("vgg16_bn", "tf_efficientnet_lite0"),
            "CIFAR-10; others: deit_base_distilled_patch16_224, tf_efficientnet_lite0",
            min_length=1,
        )
        resolution: int = code(224, "input of the backbones, pixels", ge=64, multiple_of=32)
        features: str | None = ours(None, "a feature network of the experiment, not backbones")
        width: int = code(64, "cout: channels of the projected discriminator", gt=0)
        epsilon: float = code(0.002, "the student's preconditioning; 0 for EDM's", ge=0)
        ema_half_life: int = code(500_000, "images, CIFAR-10", ge=0)
        ema_ramp_up: float = code(0.05, "CIFAR-10", gt=0)

        @field_validator("features")
        @classmethod
        def _instead_of_backbones(cls, features: str | None, info) -> str | None:
            if features and info.data.get("backbones") != cls.model_fields["backbones"].default:
                raise ValueError("replaces backbones: set one of them only")
            return features

    def __init__(self, config: Config, teacher, features: nn.Module | None = None):
        super().__init__(config, teacher)
        sizes = (teacher.num_classes, config.width, teacher.text_width)
        if config.features:
            self.features = features
            self.discriminator = FeatureDiscriminator(features, *sizes)
        else:
            self.features = CompactFeatures(features, config.width, config.resolution)
            self.discriminator = CompactDiscriminator(self.features, *sizes)

    @classmethod
    def requirements(cls, config: Config) -> Requirements:
        if config.features:
            return Requirements(features=config.features, real_images=True)
        return Requirements(backbones=config.backbones, real_images=True)

    @classmethod
    def deviations_under(cls, config: Config) -> tuple[str, ...]:
        if config.features:
            return ("another feature network and simpler heads in the discriminator",)
        return ("discriminator heads with GroupNorm and learned class embeddings",)

    def prepare_student(self, student) -> None:
        if isinstance(student, EDMDenoiser):
            student.epsilon = self.config.epsilon

    def networks(self) -> dict[str, nn.Module]:
        return {"discriminator": self.discriminator}

    def frozen_networks(self) -> dict[str, nn.Module]:
        return {"features": self.features}

    def phases(self) -> list[Phase]:
        c = self.config
        # Lazy regularisation (Karras et al. 2020, StyleGAN2): the authors make one more update per
        # `r1_every`; Adam's rate and betas are corrected by this ratio.
        ratio = c.r1_every / (c.r1_every + 1)
        betas = tuple(beta**ratio for beta in c.betas)
        lazy = OptimizerConfig(lr=c.discriminator_lr * ratio, betas=betas)
        adam = OptimizerConfig(lr=c.lr, betas=c.betas)
        name, loss = "discriminator", self.discriminator_loss
        return [
            Phase("generator", "student", self.generator_loss, adam),
            Phase(name, name, loss, lazy, variant=self._variant),
        ]

    def _variant(self, step: int) -> str:
        lazy_step = step > 0 and step % self.config.r1_every == 0
        return "r1" if lazy_step and self.config.r1_gamma > 0 else ""

    def _logits(self, context: Context, pixels: Tensor, condition: Condition) -> list[Tensor]:
        return context.networks["discriminator"](context.networks["features"](pixels), condition)

    def generator_loss(self, context: Context) -> Tensor:
        images = context.generated("generator")
        return generator_loss(self._logits(context, self.teacher.codec(images.x), images.condition))

    def discriminator_loss(self, context: Context) -> Tensor:
        c, fake = self.config, context.generated("discriminator")
        real, condition = context.real()
        regularised = bool(self._variant(context.step))
        if regularised:
            # A view: the operation counter cannot follow autograd.grad to a leaf.
            real = real.requires_grad_().view_as(real)
        real_logits = self._logits(context, real, condition)
        with no_grad():
            pixels = self.teacher.codec(fake.x.detach())
        fake_logits = self._logits(context, pixels, fake.condition)
        loss = discriminator_loss(real_logits, fake_logits)
        for name, logits in (("real_logit", real_logits), ("fake_logit", fake_logits)):
            context.log(name, sum(head.mean() for head in logits) / len(logits))
        if not regularised:
            return loss
        penalty = r1_penalty(real_logits, real, c.r1_gamma).mean()
        context.log("r1", penalty)
        return loss + c.r1_every * penalty
