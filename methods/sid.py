"""SiD: score identity distillation.

Zhou, Zheng, Wang, Yin, Huang 2024 (arXiv 2404.04057). The student minimises a model-based Fisher
divergence between the noised distributions of its images and of the data, estimated through two
score identities. The gradient flows through the teacher and the fake score to the student; their
weights are constant in this phase. The fake score trains with EDM's dropout and augmentation and is
evaluated without them. The generator trains with dropout; it makes the fake score's images, and is
averaged and evaluated, without.

Deviations:
* With `share_images`, the fake score and the generator use one batch of generated images per
  iteration; the authors draw a second one.
"""

from typing import Literal

from torch import Tensor

from harness.fake_score import ScoreIdentityConfig, ScoreIdentityMethod
from harness.method import code


def sid_loss(x: Tensor, x0_teacher: Tensor, x0_fake: Tensor, alpha: float) -> Tensor:
    """SiD's generator loss: `(B,)`, summed over C, H, W.

    `Σ (x0_teacher - x0_fake) · [(x0_teacher - x) - α (x0_teacher - x0_fake)] / w`, with
    `w = sg(mean_CHW |x - x0_teacher|)`, at least 1e-5.
    """
    difference = x0_teacher - x0_fake
    weight = (x - x0_teacher).detach().abs().mean(dim=(1, 2, 3)).clamp_min(1e-5)
    return (difference * ((x0_teacher - x) - alpha * difference)).sum(dim=(1, 2, 3)) / weight


class SiD(ScoreIdentityMethod):
    paper = "Zhou et al. 2024, arXiv 2404.04057"

    class Config(ScoreIdentityConfig):
        batch: int = code(256, "CIFAR-10", gt=0)
        sigma_init: float = code(2.5, "initial noise level", gt=0)
        lr: float = code(1e-5, "CIFAR-10", gt=0)
        fake_lr: float = code(1e-5, "CIFAR-10", gt=0)
        betas: tuple[float, float] = code((0.0, 0.999), "CIFAR-10")
        generator_betas: tuple[float, float] | None = code(None, "betas, but for FFHQ")
        alpha: float = code(1.2, "CIFAR-10")
        t_max: float = code(0.8, "tmax 800 of 1000, sigma up to about 24", gt=0, le=1)
        loss_scale: float = code(100.0, "lsg", gt=0)
        p_mean: float = code(-1.2, "fake score's lognormal noise")
        p_std: float = code(1.2, "fake score's lognormal noise", gt=0)
        dropout: float = code(0.13, "fake score, CIFAR-10", ge=0, lt=1)
        generator_dropout: float = code(0.13, "CIFAR-10, while the generator learns", ge=0, lt=1)
        augment: float = code(0.12, "probability, fake score, CIFAR-10", ge=0, le=1)
        eps: float = code(1e-8, "Adam; 1e-6 in half precision", gt=0)
        ema_half_life: int = code(500_000, "images, CIFAR-10", ge=0)
        ema_ramp_up: float = code(0.05, "training settings", gt=0)
        labels: Literal["data", "uniform"] = code("data", "labels of a random batch of images")

    def sample_loss(self, x: Tensor, x0_teacher: Tensor, x0_fake: Tensor, sigma: Tensor) -> Tensor:
        return self.config.loss_scale * sid_loss(x, x0_teacher, x0_fake, self.config.alpha)
