"""The denoising loss, and methods that train a fake score with it (DMD, SiD, SIM)."""

from collections.abc import Callable
from typing import ClassVar

import torch
from pydantic import field_validator, model_validator
from torch import Tensor, nn

from harness.augment import LABELS, edm_augment
from harness.context import Context
from harness.denoiser import Condition, Denoiser, clone_denoiser, guided, map_condition, set_dropout
from harness.errors import UserError
from harness.method import Method, MethodConfig, OptimizerConfig, Phase, TeacherFacts, ours
from harness.schedules import lognormal_sigma


class ScoreConfig(MethodConfig):
    """Settings of methods that compare two scores: classifier-free guidance of each, for teachers
    that read texts or were trained with label dropout."""

    teacher_guidance: float = ours(1.0, "guidance scale of the real score; 1: none", ge=0)
    fake_guidance: float = ours(1.0, "guidance scale of the fake score; 1: none", ge=0)
    fake_dropout: float = ours(
        0.0, "fraction of conditions dropped in the fake score's training, for guidance", ge=0, lt=1
    )

    @model_validator(mode="after")
    def _guidance_needs_dropout(self):
        if self.fake_guidance != 1 and not self.fake_dropout:
            raise ValueError("fake_guidance needs a fake_dropout above 0")
        return self


class FakeScoreMethod(Method):
    """A method with a fake score: a denoiser trained on the student's own images."""

    Config: ClassVar[type[ScoreConfig]] = ScoreConfig

    def __init_subclass__(cls) -> None:
        if not issubclass(cls.Config, ScoreConfig):
            raise TypeError(f"{cls.__name__}.Config must be a subclass of ScoreConfig")

    def __init__(
        self, config: ScoreConfig, teacher: Denoiser, required=None, dropout=0.0, augment=0.0
    ):
        """`dropout` and `augment`: of the fake score's training, if the method uses them."""
        super().__init__(config, teacher, required)
        self.fake_score = clone_denoiser(teacher)
        set_dropout(self.fake_score, dropout)
        if augment and teacher.augment_labels != LABELS:
            message = f"takes {teacher.augment_labels} augmentation labels, not {LABELS}"
            remedy = "set augment: 0 under settings"
            raise UserError(f"this teacher {message}: {remedy}", "augment-labels")

    @classmethod
    def check(cls, config: ScoreConfig, teacher: TeacherFacts) -> list[tuple[str, str, str]]:
        if config.teacher_guidance == 1 or teacher.unconditional:
            return []
        message = "needs a teacher trained with label_dropout"
        return [("teacher_guidance", "unsupported", message)]

    def networks(self) -> dict[str, nn.Module]:
        return {"fake_score": self.fake_score}

    def frozen_networks(self) -> dict[str, nn.Module]:
        return {"teacher": guided(self.teacher, self.config.teacher_guidance)}

    def fake_x0(self, context: Context, noised: Tensor, sigma: Tensor, condition) -> Tensor:
        """Denoise with the fake score, under its guidance."""
        fake_score = guided(context.networks["fake_score"], self.config.fake_guidance)
        return fake_score(noised, sigma, condition)


class ScoreIdentityConfig(ScoreConfig):
    """Settings of SiD's frame that are not published."""

    share_images: bool = ours(
        False, "fake score and generator use one batch of images; needs generator_dropout: 0"
    )

    @field_validator("share_images")
    @classmethod
    def _shared_images_have_no_dropout(cls, share: bool, info) -> bool:
        if share and info.data.get("generator_dropout"):
            raise ValueError("needs generator_dropout: 0, because images depend on it")
        return share


class ScoreIdentityMethod(FakeScoreMethod):
    """SiD's noise levels, optimisers and fake-score training, which SIM shares. The generator has
    dropout while it learns, but not while it makes images for the fake score.

    A subclass defines `sample_loss`, and its `Config` the settings that are used here.
    """

    def __init__(self, config: ScoreIdentityConfig, teacher: Denoiser, required=None):
        super().__init__(config, teacher, required, config.dropout, config.augment)

    @classmethod
    def deviations_under(cls, config: ScoreIdentityConfig) -> tuple[str, ...]:
        shared = ("fake score and generator share a batch of images",)
        return cls.deviations + (shared if config.share_images else ())

    def sample_loss(self, x: Tensor, x0_teacher: Tensor, x0_fake: Tensor, sigma: Tensor) -> Tensor:
        """The generator's loss per sample, `(B,)`, differentiable in all arguments but `sigma`."""
        raise NotImplementedError

    def phases(self) -> list[Phase]:
        c = self.config
        shared = {"eps": c.eps, "nonfinite": "replace"}  # as SiD's code
        fake = OptimizerConfig(lr=c.fake_lr, betas=c.betas, **shared)
        generator = OptimizerConfig(lr=c.lr, betas=c.generator_betas or c.betas, **shared)
        options = {"augment": c.augment, "summed": True, "dropout": c.fake_dropout}
        options["shared"] = c.share_images
        denoise = denoising_phase(fake, self.teacher, self.fake_sigma, **options)
        return [denoise, Phase("generator", "student", self.generator_loss, generator)]

    def fake_sigma(self, context: Context) -> Tensor:
        sigma = lognormal_sigma(context.normal("sigma"), self.config.p_mean, self.config.p_std)
        return self.teacher.within(sigma)

    def generator_loss(self, context: Context) -> Tensor:
        images = context.generated()
        sigma = self.teacher.sigma_at(self.config.t_max * context.uniform("sigma"))
        noised = context.noised(images.x, sigma)
        x0_teacher = context.networks["teacher"](noised, sigma, images.condition)
        x0_fake = self.fake_x0(context, noised, sigma, images.condition)
        return self.sample_loss(images.x, x0_teacher, x0_fake, sigma).mean()


def drop_condition(context: Context, denoiser: Denoiser, condition, probability) -> Condition:
    """Replace each sample's condition by the null condition with a probability."""
    drop = context.uniform("label_dropout") < probability

    def choose(null: Tensor, part: Tensor) -> Tensor:
        return torch.where(drop.view(-1, *[1] * (part.dim() - 1)), null, part)

    return map_condition(choose, denoiser.null_condition(len(context)), condition)


def denoising_loss(
    denoiser: Denoiser, clean: Tensor, noised: Tensor, sigma: Tensor, condition, weight, **extras
) -> Tensor:
    """EDM's loss λ mean_CHW (D(noised; σ, c) - clean)², averaged over samples: a scalar. `weight`:
    λ(σ) `(B,)`."""
    squared = (denoiser(noised, sigma, condition, **extras) - clean).square().mean(dim=(1, 2, 3))
    return (weight * squared).mean()


def augmented_loss(
    context: Context, denoiser: Denoiser, clean, condition, sigma, weight, augment, dropout
) -> Tensor:
    """`denoising_loss` of clean images with fresh noise and, with probability `augment`, EDM's
    augmentations (`harness.augment`), with a fraction `dropout` of conditions dropped."""
    extras = {}
    if dropout:
        condition = drop_condition(context, denoiser, condition, dropout)
    if augment:
        clean, extras["augment_labels"] = edm_augment(context, clean, augment)
    noised = context.noised(clean, sigma)
    return denoising_loss(denoiser, clean, noised, sigma, condition, weight, **extras)


def denoising_phase(
    optimizer: OptimizerConfig,
    teacher: Denoiser,
    sigma: Callable[[Context], Tensor],
    repeat: int = 1,
    augment: float = 0.0,
    summed: bool = False,
    dropout: float = 0.0,
    shared: bool = True,
) -> Phase:
    """Train network `fake_score` to denoise the student's current images, with the teacher's loss
    weight. `sigma`: context -> noise levels `(B,)`. `augment`, `dropout`: of `augmented_loss`.
    `shared`: use the images that the generator's phase uses, otherwise images of its own, which the
    student makes in evaluation mode.

    `summed`: sum the loss over pixels, as EDM and SiD do, instead of averaging; to Adam this only
    changes the effect of eps.
    """

    def loss(context: Context) -> Tensor:
        images, levels = context.generated(), sigma(context)
        clean, c, weight = images.x.detach(), images.condition, teacher.loss_weight(levels)
        network = context.networks["fake_score"]
        loss = augmented_loss(context, network, clean, c, levels, weight, augment, dropout)
        return loss * clean[0].numel() if summed else loss

    images = {"images": "shared", "modes": {"student": "train"}} if shared else {"images": "fake"}
    return Phase("fake_score", "fake_score", loss, optimizer, repeat=repeat, **images)
