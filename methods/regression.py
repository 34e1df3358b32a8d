"""Regression on teacher pairs: instance-level distillation, the baseline of the other methods.

Luhman and Luhman 2021, "Knowledge distillation in iterative generative models for improved sampling
speed" (arXiv 2101.02388). The student minimises the squared error to the images that a
deterministic sampler of the teacher computes from the same noise.

Deviations:
* The settings are those of the other methods here, not the paper's.
* The pairs come from EDM's sampler (paper: DDIM, 100 steps; both are deterministic). Their number
  is limited, so that the student sees each pair many times.
"""

from torch import Tensor
from torch.nn.functional import mse_loss

from harness.context import Context
from harness.denoiser import one_step
from harness.method import Method, MethodConfig, OptimizerConfig, Phase, Requirements, ours


class Regression(Method):
    paper = "Luhman and Luhman 2021, arXiv 2101.02388"
    deviations = ("pairs of EDM's sampler, a limited number; settings as the other methods",)

    class Config(MethodConfig):
        batch: int = ours(256, "as SiD", gt=0)
        sigma_init: float = ours(80.0, "generator = teacher at the last time step, as DMD", gt=0)
        lr: float = ours(5e-5, "as DMD", gt=0)
        betas: tuple[float, float] = ours((0.9, 0.999), "as DMD")
        pairs: int = ours(100_000, "as DMD", gt=0)
        pair_steps: int = ours(18, "Heun steps per pair, as DMD", gt=0)

    @classmethod
    def requirements(cls, config: Config) -> Requirements:
        return Requirements(pairs=config.pairs, pair_steps=config.pair_steps)

    def frozen_networks(self) -> dict:
        return {}  # the pairs replace the teacher

    def phases(self) -> list[Phase]:
        optimizer = OptimizerConfig(lr=self.config.lr, betas=self.config.betas)
        return [Phase("generator", "student", self.loss, optimizer)]

    def loss(self, context: Context) -> Tensor:
        """`mean |G(z, c) - x|²` over a batch and its elements, of pairs (z, c) -> x."""
        z, target, condition = context.pairs()
        x = one_step(context.networks["student"], z, condition, self.config.sigma_init)
        return mse_loss(x, target)
