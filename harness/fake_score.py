"""The denoising loss, as a teacher's training and as the fake-score phase of DMD, SIM and SiD."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from harness.denoiser import Denoiser
from harness.method import Context, Method, MethodConfig, OptimizerConfig, Phase
from harness.networks import clone_denoiser
from harness.schedules import edm_weight


class FakeScoreMethod(Method):
    """A method that trains, beside the student, a denoiser of the student's own images."""

    def __init__(self, config: MethodConfig, teacher: Denoiser, features: nn.Module | None = None):
        super().__init__(config, teacher, features)
        self.fake_score = clone_denoiser(teacher)

    def networks(self) -> dict[str, nn.Module]:
        return {"fake_score": self.fake_score}


def denoising_loss(
    denoiser: Denoiser, clean: Tensor, noised: Tensor, sigma: Tensor, condition, sigma_data: float
) -> Tensor:
    """EDM's loss λ(σ) mean_CHW (D(noised; σ, c) - clean)², averaged over samples: a scalar."""
    squared = (denoiser(noised, sigma, condition) - clean).square().mean(dim=(1, 2, 3))
    return (edm_weight(sigma, sigma_data) * squared).mean()


def denoising_phase(
    optimizer: OptimizerConfig,
    sigma_data: float,
    sigma: Callable[[Context], Tensor],
    repeat: int = 1,
) -> Phase:
    """Teach network `fake_score` to denoise the student's present images; `sigma` draws `(B,)`."""

    def loss(context: Context) -> Tensor:
        images = context.generated()
        clean, levels = images.x.detach(), sigma(context)
        return denoising_loss(
            context.networks["fake_score"],
            clean,
            context.noised(clean, levels),
            levels,
            images.condition,
            sigma_data,
        )

    return Phase("fake_score", "fake_score", loss, optimizer, repeat=repeat)
