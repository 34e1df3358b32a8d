"""GDD and GDD-I: adversarial distillation that uses a diffusion model's innate one-step ability.

Zheng and Yang 2024 (arXiv 2405.20750). The student starts from the teacher's weights under a
consistency model's preconditioning, and learns by a distribution-level loss: a GAN whose
discriminator has heads on random mixtures of frozen pretrained features (Sauer et al. 2021,
projected GAN). GDD-I is this method with the student's option `freeze: innate`.

`discriminator: authors` is the network of the authors' code (`harness.discriminators.projected`),
in float32 and, because of its batch normalisation, in training mode in every phase. A `ghost_batch`
is the batch of one of their processes: its images are normalised together, and see one random
projection. R1: their adversarial terms are sums over a ghost batch of n and means over the four
heads of a backbone, and R1 is a mean; here the terms are means, summed over heads, so that
`r1_gamma` is 4/n times their 1e-4.

Deviations:
* `class_table: random` starts from random class embeddings.
* `discriminator: compact` follows the papers' text instead: GroupNorm, 3x3 mixing across scales,
  learned embeddings of classes or texts.
* `discriminator: features` is for images without a suitable pretrained backbone (8 x 8 digits):
  two convolutions on each map of a feature network of the experiment, without random mixing. This
  network should not be used for scoring.
"""

from typing import Literal

import torch
from pydantic import field_validator
from torch import Tensor, nn, no_grad
from torch.nn.functional import softplus

from harness.context import Context, GeneratedBatch
from harness.denoiser import Condition, EDMDenoiser
from harness.discriminators.factory import DEVIATIONS, UNUSED, build_discriminator
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
    with torch.autocast(real_images.device.type.replace("meta", "cpu"), enabled=False):
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
        discriminator: Literal["authors", "compact", "features"] = code("authors", "see above")
        backbones: tuple[str, ...] = code(
            ("vgg16_bn", "tf_efficientnet_lite0"),
            "CIFAR-10; others: deit_base_distilled_patch16_224, tf_efficientnet_lite0",
            min_length=1,
        )
        resolution: int = code(224, "input of the backbones, pixels", ge=64, multiple_of=32)
        ghost_batch: int = code(64, "images per process, ImageNet 128", gt=0)
        projection_seed: Literal["rank", "shared"] = code("rank", "a projection per ghost batch")
        class_table: str | None = ours(None, "file of the authors' class embeddings, or random")
        features: str | None = ours(None, "the network of discriminator: features")
        width: int = ours(64, "channels of the other discriminators", gt=0)
        r1_gamma: float | None = code(None, "4e-4/ghost_batch", ge=0, validate_default=True)
        r1_every: int = code(16, "lazy regularisation, loss x 16, not at step 0", gt=0)
        epsilon: float = code(0.002, "the student's preconditioning; 0 for EDM's", ge=0)
        labels: Literal["data", "uniform"] = code("data", "labels of the real images")
        ema_half_life: int = code(500_000, "images, CIFAR-10", ge=0)
        ema_ramp_up: float = code(0.05, "CIFAR-10", gt=0)

        @field_validator("r1_gamma")
        @classmethod
        def _gamma_of_a_ghost_batch(cls, gamma: float | None, info) -> float | None:
            return 4e-4 / info.data.get("ghost_batch", 64) if gamma is None else gamma

    def __init__(self, config: Config, teacher, required=None):
        super().__init__(config, teacher, required)
        networks = build_discriminator(config.discriminator, config, teacher, self.required)
        self.features, self.discriminator = networks

    @classmethod
    def requirements(cls, config: Config) -> Requirements:
        if config.discriminator == "features":
            return Requirements(features=config.features, real_images=True)
        if config.discriminator == "compact":
            return Requirements(backbones=config.backbones, real_images=True)
        table = config.class_table if config.class_table != "random" else None
        ghost = {"class_table": table, "ghost_batch": config.ghost_batch}
        return Requirements(backbones=config.backbones, real_images=True, **ghost)

    @classmethod
    def check(cls, config: Config, teacher) -> list[tuple[str, str, str]]:
        kind, table = config.discriminator, config.class_table
        problems = config.without_effect(UNUSED[kind], f"discriminator: {kind}")
        if kind == "features" and not config.features:
            problems.append(("features", "missing-key", "required: a feature network"))
        if kind == "authors" and teacher.text:
            message = "authors has no text condition; set compact"
            problems.append(("discriminator", "unsupported", message))
        elif kind == "authors" and teacher.classes and table is None:
            message = "required with classes: the file of the authors' table, or random"
            problems.append(("class_table", "missing-key", message))
        elif kind == "authors" and not teacher.classes:
            problems += config.without_effect(["class_table"], "a teacher without classes")
        return problems

    @classmethod
    def deviations_under(cls, config: Config) -> tuple[str, ...]:
        if config.discriminator == "authors":
            return ("random class embeddings",) if config.class_table == "random" else ()
        return (DEVIATIONS[config.discriminator],)

    def prepare_student(self, student) -> None:
        if isinstance(student, EDMDenoiser):
            student.epsilon = self.config.epsilon

    def networks(self) -> dict[str, nn.Module]:
        return {"discriminator": self.discriminator}

    def frozen_networks(self) -> dict[str, nn.Module]:
        return {"features": self.features}

    def phases(self) -> list[Phase]:
        c = self.config
        # Lazy regularisation (Karras et al. 2020, StyleGAN2): one more update per `r1_every`;
        # Adam's rate and betas are corrected by this ratio.
        ratio = c.r1_every / (c.r1_every + 1) if c.r1_gamma else 1.0
        betas = tuple(beta**ratio for beta in c.betas)
        lazy = OptimizerConfig(lr=c.discriminator_lr * ratio, betas=betas, nonfinite="replace")
        adam = OptimizerConfig(lr=c.lr, betas=c.betas, nonfinite="replace")
        fp32 = {"features": "fp32", "discriminator": "fp32"}
        # Batch normalisation uses the statistics of the batch in every phase.
        train = {"discriminator": "train"} if c.discriminator == "authors" else {}
        name, options = "discriminator", {"modes": {"student": "train"}, "precision": fp32}
        generator = {"images": "generator", "modes": train, "precision": fp32}
        phases = [
            Phase("generator", "student", self.generator_loss, adam, **generator),
            Phase(name, name, self.discriminator_loss, lazy, images=name, **options),
        ]
        if c.r1_gamma:
            options |= {"every": c.r1_every, "start": c.r1_every}
            phases.append(Phase("r1", name, self.r1_loss, lazy, **options))
        return phases

    def _logits(self, context: Context, pixels: Tensor, condition: Condition) -> list[Tensor]:
        features, discriminator = (context.networks[n] for n in ("features", "discriminator"))
        if self.config.discriminator != "authors":
            return discriminator(features(pixels), condition)
        # The ghost batches of this micro-batch, by their numbers in the batch.
        ghost, batch = self.config.ghost_batch, self.config.batch
        first, count = context.samples.start % batch // ghost, len(context) // ghost
        maps = features(pixels, range(first, first + count))
        return discriminator(maps, condition, count, iterate=context.first)

    def _generated(self, context: Context) -> GeneratedBatch:
        """Generated images, with the labels of this iteration's real images."""
        own = self.config.labels == "data"
        return context.generated(context.real_condition(shared=True) if own else None)

    def generator_loss(self, context: Context) -> Tensor:
        images = self._generated(context)
        return generator_loss(self._logits(context, self.teacher.codec(images.x), images.condition))

    def discriminator_loss(self, context: Context) -> Tensor:
        fake = self._generated(context)
        with no_grad():
            pixels = self.teacher.codec(fake.x.detach())
        fake_logits = self._logits(context, pixels, fake.condition)
        real_logits = self._logits(context, *context.real(shared=True))
        for name, logits in (("real_logit", real_logits), ("fake_logit", fake_logits)):
            context.log(name, sum(head.mean() for head in logits) / len(logits))
        return discriminator_loss(real_logits, fake_logits)

    def r1_loss(self, context: Context) -> Tensor:
        """R1 on this iteration's real images, as an update of its own."""
        real, condition = context.real(shared=True)
        # A view: the operation counter cannot follow autograd.grad to a leaf.
        real = real.requires_grad_().view_as(real)
        logits = self._logits(context, real, condition)
        penalty = r1_penalty(logits, real, self.config.r1_gamma).mean()
        context.log("r1", penalty)
        return self.config.r1_every * penalty
