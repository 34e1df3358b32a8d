"""Template of a method: copy it to methods/<name>.py. <Title>: one sentence on the idea.

Authors, year (arXiv number). How the student learns, with the equations that the code implements.

Deviations:
* Each difference from the paper or the authors' code, and why.

Checklist: say where each default comes from (`paper`, `code`) or explain it (`ours`); write the
loss as a pure function of tensors, one value per sample; test it against the authors' code or a
closed form (tests/test_losses.py). tests/test_methods.py covers every method in this folder.
"""

from torch import Tensor, no_grad

from harness.context import Context
from harness.fake_score import FakeScoreMethod, ScoreConfig, denoising_phase
from harness.method import OptimizerConfig, Phase, Requirements, code, ours, paper
from harness.schedules import lognormal_sigma


def template_loss(x: Tensor, x0_teacher: Tensor, x0_fake: Tensor) -> Tensor:
    """The generator's loss: `(B,)`, summed over C, H, W; its gradient moves x from fake to real."""
    return ((x0_fake - x0_teacher).detach() * x).sum(dim=(1, 2, 3))


class Template(FakeScoreMethod):  # or `Method`, without a fake score
    paper = "Authors year, arXiv number"
    data_free = True  # False if a loss needs real images
    deviations = ("a difference from the paper, as in the docstring",)

    class Config(ScoreConfig):  # or `MethodConfig`
        batch: int = paper(256, "section or table", gt=0)
        sigma_init: float = code(80.0, "where in the authors' code", gt=0)
        lr: float = ours(1e-5, "why this value", gt=0)

    @classmethod
    def requirements(cls, config: Config) -> Requirements:
        return Requirements()  # pairs=…, features=…, backbones=…, lpips=True, real_images=True

    # More networks: `networks` (trained; here "fake_score") and `frozen_networks` ("teacher").

    def phases(self) -> list[Phase]:
        """The updates of an iteration in order; `every` and `repeat` set how often each runs."""
        adam = OptimizerConfig(lr=self.config.lr, betas=(0.0, 0.999))
        fake = denoising_phase(adam, self.teacher, self.sigma, dropout=self.config.fake_dropout)
        return [fake, Phase("generator", "student", self.generator_loss, adam)]

    def sigma(self, context: Context) -> Tensor:
        """Noise levels `(B,)`; the same name in a phase gives the same numbers."""
        return lognormal_sigma(context.normal("sigma"))

    def generator_loss(self, context: Context) -> Tensor:
        """A scalar. `context.real()` and `context.pairs()` give real images and teacher pairs."""
        images, sigma = context.generated(), self.sigma(context)
        noised = context.noised(images.x.detach(), sigma)
        with no_grad():
            x0_teacher = context.networks["teacher"](noised, sigma, images.condition)
            x0_fake = self.fake_x0(context, noised, sigma, images.condition)
        loss = template_loss(images.x, x0_teacher, x0_fake).mean()
        context.log("my_value", loss)  # becomes a column of train.csv
        return loss
