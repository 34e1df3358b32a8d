"""The denoising loss, as a teacher's training and as the fake-score phase of DMD, SIM and SiD."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from harness.augment import LABELS, edm_augment
from harness.denoiser import Denoiser
from harness.errors import UserError
from harness.method import Context, Method, MethodConfig, OptimizerConfig, Phase
from harness.networks import clone_denoiser, set_dropout
from harness.schedules import edm_weight, karras_sigma, lognormal_sigma


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
                fake, self.teacher.sigma_data, self.fake_sigma, augment=c.augment, summed=True
            ),
            Phase("generator", "student", self.generator_loss, generator),
        ]

    def fake_sigma(self, context: Context) -> Tensor:
        return lognormal_sigma(context.normal("sigma"), self.config.p_mean, self.config.p_std)

    def generator_loss(self, context: Context) -> Tensor:
        images = context.generated()
        sigma = karras_sigma(self.config.t_max * context.uniform("sigma"))
        noised = context.noised(images.x, sigma)
        x0_teacher = context.networks["teacher"](noised, sigma, images.condition)
        x0_fake = context.networks["fake_score"](noised, sigma, images.condition)
        return self.sample_loss(images.x, x0_teacher, x0_fake, sigma).mean()


def denoising_loss(
    denoiser: Denoiser,
    clean: Tensor,
    noised: Tensor,
    sigma: Tensor,
    condition,
    sigma_data: float,
    **extras: Tensor,
) -> Tensor:
    """EDM's loss λ(σ) mean_CHW (D(noised; σ, c) - clean)², averaged over samples: a scalar."""
    squared = (denoiser(noised, sigma, condition, **extras) - clean).square().mean(dim=(1, 2, 3))
    return (edm_weight(sigma, sigma_data) * squared).mean()


def denoising_phase(
    optimizer: OptimizerConfig,
    sigma_data: float,
    sigma: Callable[[Context], Tensor],
    repeat: int = 1,
    augment: float = 0.0,
    summed: bool = False,
) -> Phase:
    """Teach network `fake_score` to denoise the student's present images; `sigma` draws `(B,)`.

    `augment`: the probability of EDM's augmentations of these images (`harness.augment`).
    `summed`: the loss over pixels, as EDM and SiD have it, in place of their mean. Adam's steps
    differ by nothing but its eps, which counts the more the smaller the gradients are.
    """

    def loss(context: Context) -> Tensor:
        images, extras = context.generated(), {}
        clean, levels = images.x.detach(), sigma(context)
        if augment:
            clean, extras["augment_labels"] = edm_augment(context, clean, augment)
        loss = denoising_loss(
            context.networks["fake_score"],
            clean,
            context.noised(clean, levels),
            levels,
            images.condition,
            sigma_data,
            **extras,
        )
        return loss * clean[0].numel() if summed else loss

    return Phase("fake_score", "fake_score", loss, optimizer, repeat=repeat)
