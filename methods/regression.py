"""Regression on a teacher's pairs: instance-level distillation, the baseline of all others.

Luhman and Luhman 2021, "Knowledge distillation in iterative generative models for improved sampling
speed" (arXiv 2101.02388). The student repeats what a deterministic sampler of the teacher makes of
the same noise, in squared error: image by image, where the other methods match distributions.

Deviations:
* The settings are those of the other methods here: the paper's were not read.
* The pairs come from EDM's sampler (paper: DDIM's, 100 steps; both are deterministic), and there is
  a limited number of them, which the student sees again and again.
"""

from __future__ import annotations

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
        return {}  # the pairs are all that is used of the teacher

    def phases(self) -> list[Phase]:
        optimizer = OptimizerConfig(lr=self.config.lr, betas=self.config.betas)
        return [Phase("generator", "student", self.loss, optimizer)]

    def loss(self, context: Context) -> Tensor:
        """`mean |G(z, c) - x|²` over a batch and its elements, of pairs (z, c) -> x."""
        z, target, condition = context.pairs()
        made = one_step(context.networks["student"], z, condition, self.config.sigma_init)
        return mse_loss(made, target)
