"""The denoising loss, as a teacher's training and as the fake-score phase of DMD, SIM and SiD."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from pydantic import model_validator
from torch import Tensor, nn

from harness.augment import LABELS, edm_augment
from harness.context import Context
from harness.denoiser import Condition, Denoiser, clone_denoiser, each_part, guided, set_dropout
from harness.errors import UserError
from harness.method import Method, MethodConfig, OptimizerConfig, Phase, ours
from harness.schedules import lognormal_sigma


class ScoreConfig(MethodConfig):
    """Settings of methods that compare two scores: classifier-free guidance of each, for teachers
    that take texts (or were trained with labels left out)."""

    LATER: ClassVar = frozenset({"teacher_guidance", "fake_guidance", "fake_dropout"})
    teacher_guidance: float = ours(1.0, "scale of the real score's guidance; 1: none", ge=0)
    fake_guidance: float = ours(1.0, "scale of the fake score's guidance; 1: none", ge=0)
    fake_dropout: float = ours(
        0.0, "conditions left out of the fake score's training, for its guidance", ge=0, lt=1
    )

    @model_validator(mode="after")
    def _guidance_needs_dropout(self):
        if self.fake_guidance != 1 and not self.fake_dropout:
            raise ValueError("fake_guidance needs a fake_dropout above 0")
        return self


class FakeScoreMethod(Method):
    """A method that trains, beside the student, a denoiser of the student's own images."""

    def __init__(
        self,
        config: MethodConfig,
        teacher: Denoiser,
        features: nn.Module | None = None,
        dropout: float = 0.0,
        augment: float = 0.0,
    ):
        """`dropout` and `augment`: of the fake score's training, if the method has them."""
        super().__init__(config, teacher, features)
        self.fake_score = clone_denoiser(teacher)
        set_dropout(self.fake_score, dropout)
        if augment and self.fake_score.augment_labels != LABELS:
            raise UserError(
                f"this teacher takes {self.fake_score.augment_labels} augmentation labels, not "
                f"{LABELS}: set augment: 0 under settings"
            )

    def networks(self) -> dict[str, nn.Module]:
        return {"fake_score": self.fake_score}

    def frozen_networks(self) -> dict[str, nn.Module]:
        scale = getattr(self.config, "teacher_guidance", 1.0)
        return {"teacher": guided(self.teacher, scale)}

    def fake(self, context: Context, noised: Tensor, sigma: Tensor, condition) -> Tensor:
        """What the fake score takes the student's noised images for, with its guidance."""
        scale = getattr(self.config, "fake_guidance", 1.0)
        return guided(context.networks["fake_score"], scale)(noised, sigma, condition)


class ScoreIdentityMethod(FakeScoreMethod):
    """SiD's frame, which SIM shares: noise levels, optimisers, the fake score's training. A
    subclass gives `sample_loss`; its `Config` has the settings that are used here."""

    def __init__(self, config: MethodConfig, teacher: Denoiser, features: nn.Module | None = None):
        super().__init__(config, teacher, features, config.dropout, config.augment)

    def sample_loss(self, x: Tensor, x0_teacher: Tensor, x0_fake: Tensor, sigma: Tensor) -> Tensor:
        """The generator's loss of each sample, `(B,)`; gradients flow through all but `sigma`."""
        raise NotImplementedError

    def phases(self) -> list[Phase]:
        c = self.config
        fake = OptimizerConfig(lr=c.fake_lr, betas=c.betas, eps=c.eps)
        generator = OptimizerConfig(lr=c.lr, betas=c.generator_betas or c.betas, eps=c.eps)
        return [
            denoising_phase(
                fake,
                self.teacher,
                self.fake_sigma,
                augment=c.augment,
                summed=True,
                dropout=c.fake_dropout,
            ),
            Phase("generator", "student", self.generator_loss, generator),
        ]

    def fake_sigma(self, context: Context) -> Tensor:
        sigma = lognormal_sigma(context.normal("sigma"), self.config.p_mean, self.config.p_std)
        return self.teacher.within(sigma)

    def generator_loss(self, context: Context) -> Tensor:
        images = context.generated()
        sigma = self.teacher.sigma_at(self.config.t_max * context.uniform("sigma"))
        noised = context.noised(images.x, sigma)
        x0_teacher = context.networks["teacher"](noised, sigma, images.condition)
        x0_fake = self.fake(context, noised, sigma, images.condition)
        return self.sample_loss(images.x, x0_teacher, x0_fake, sigma).mean()


def denoising_loss(
    denoiser: Denoiser,
    clean: Tensor,
    noised: Tensor,
    sigma: Tensor,
    condition,
    weight: Tensor,
    **extras: Tensor,
) -> Tensor:
    """EDM's loss λ mean_CHW (D(noised; σ, c) - clean)², averaged over samples: a scalar. `weight`:
    λ(σ) `(B,)`."""
    squared = (denoiser(noised, sigma, condition, **extras) - clean).square().mean(dim=(1, 2, 3))
    return (weight * squared).mean()


def left_out(context: Context, denoiser: Denoiser, condition: Condition, share: float) -> Condition:
    """Conditions of a batch, a share of them replaced by "none given"."""
    drop = context.uniform("label_dropout") < share

    def choose(none: Tensor, part: Tensor) -> Tensor:
        return torch.where(drop.view(-1, *[1] * (part.dim() - 1)), none, part)

    return each_part(choose, denoiser.null_condition(len(context)), condition)


def denoising_phase(
    optimizer: OptimizerConfig,
    teacher: Denoiser,
    sigma: Callable[[Context], Tensor],
    repeat: int = 1,
    augment: float = 0.0,
    summed: bool = False,
    dropout: float = 0.0,
) -> Phase:
    """Teach network `fake_score` to denoise the student's present images, as `teacher` was taught;
    `sigma` draws `(B,)`.

    `augment`: the probability of EDM's augmentations of these images (`harness.augment`).
    `summed`: the loss over pixels, as EDM and SiD have it, in place of their mean. Adam's steps
    differ by nothing but its eps, which counts the more the smaller the gradients are. `dropout`:
    the share of conditions that are left out.
    """

    def loss(context: Context) -> Tensor:
        images, extras = context.generated(), {}
        clean, levels = images.x.detach(), sigma(context)
        condition = images.condition
        if dropout:
            condition = left_out(context, context.networks["fake_score"], condition, dropout)
        if augment:
            clean, extras["augment_labels"] = edm_augment(context, clean, augment)
        loss = denoising_loss(
            context.networks["fake_score"],
            clean,
            context.noised(clean, levels),
            levels,
            condition,
            teacher.loss_weight(levels),
            **extras,
        )
        return loss * clean[0].numel() if summed else loss

    return Phase("fake_score", "fake_score", loss, optimizer, repeat=repeat)
