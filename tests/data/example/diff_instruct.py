"""Diff-Instruct: Luo et al. 2023 (arXiv 2305.18455), the integral KL divergence.

The gradient of the student's images is the difference of the two scores (here times sigma squared).
Deviation: no dropout and no augmentation in the fake score.
"""

import torch

from harness.fake_score import FakeScoreMethod, ScoreConfig, denoising_phase
from harness.method import OptimizerConfig, Phase, code
from harness.schedules import lognormal_sigma


class DiffInstruct(FakeScoreMethod):
    paper = "Luo et al. 2023, arXiv 2305.18455"

    class Config(ScoreConfig):
        batch: int = code(128, "CIFAR-10", gt=0)
        sigma_init: float = code(1.0, "CIFAR-10", gt=0)
        lr: float = code(1e-5, "generator and fake score", gt=0)

    def phases(self):
        adam = OptimizerConfig(lr=self.config.lr, betas=(0.0, 0.999))
        fake = denoising_phase(adam, self.teacher, self.sigma, dropout=self.config.fake_dropout)
        return [fake, Phase("generator", "student", self.loss, adam)]

    def sigma(self, context):
        return lognormal_sigma(context.normal("sigma"))

    def loss(self, context):
        images, sigma = context.generated(), self.sigma(context)
        noised = context.noised(images.x.detach(), sigma)
        with torch.no_grad():
            teacher = context.networks["teacher"](noised, sigma, images.condition)
            fake = self.fake_x0(context, noised, sigma, images.condition)
        return ((fake - teacher) * images.x).mean()
