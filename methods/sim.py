"""SIM: one-step diffusion distillation through score implicit matching.

Luo, Huang, Geng, Kolter, Qi 2024 (arXiv 2410.16794). The student minimises a score-based
divergence `E d(s_fake - s_teacher)` by the score-gradient theorem, without the derivative of the
fake score with respect to the student's weights. With the squared distance the loss is SiD's at
α = 1 up to the normaliser; here `d` is the pseudo-Huber distance.

Deviations:
* Only inference code was released, and no CIFAR-10 training setting was confirmed: a
  re-implementation in SiD's frame (noise levels, optimiser, EMA), whose settings are tagged `ours`.
* `weight: one` is the plain divergence, whose gradient d' has bounded length; `sid` divides each
  sample's loss as SiD does.
* With `share_images`, the fake score and the generator use one batch of generated images.
"""

from typing import Literal

from torch import Tensor

from harness.fake_score import ScoreIdentityConfig, ScoreIdentityMethod
from harness.method import code, ours


def sim_loss(
    x: Tensor, x0_teacher: Tensor, x0_fake: Tensor, sigma: Tensor, c: float, weight: str
) -> Tensor:
    """SIM's generator loss with the pseudo-Huber distance: `(B,)`, summed over C, H, W.

    `-w(σ) Σ d'(y) · (x0_fake - x)`, `y = x0_fake - x0_teacher`, `d'(y) = y / sqrt(‖y‖² + c²)`; `y`
    and `c` are in denoiser units (σ² times the score difference). weight: "one" (w = 1) or "sid"
    (w = 1 / sg(mean_CHW |x - x0_teacher|), the mean at least 1e-5). Gradients flow through `y` too.
    """
    y = x0_fake - x0_teacher
    norm = (y.square().sum(dim=(1, 2, 3), keepdim=True) + c**2).sqrt()
    loss = -(y / norm * (x0_fake - x)).sum(dim=(1, 2, 3))
    if weight == "one":
        return loss
    if weight == "sid":
        return loss / (x - x0_teacher).detach().abs().mean(dim=(1, 2, 3)).clamp_min(1e-5)
    raise ValueError(f"weight is 'one' or 'sid', not {weight!r}")


class SIM(ScoreIdentityMethod):
    paper = "Luo et al. 2024, arXiv 2410.16794"
    deviations = ("re-implementation in SiD's frame: no training code was released",)

    class Config(ScoreIdentityConfig):
        batch: int = ours(256, "as SiD; not published", gt=0)
        sigma_init: float = code(2.5, "text-to-image inference code", gt=0)
        lr: float = ours(1e-5, "as SiD; not published", gt=0)
        fake_lr: float = ours(1e-5, "as SiD; not published", gt=0)
        betas: tuple[float, float] = ours((0.0, 0.999), "as SiD; not published")
        generator_betas: tuple[float, float] | None = ours(None, "betas; not published")
        c: float = code(0.001, "the author, in an issue of the repository", ge=0)
        weight: Literal["one", "sid"] = ours("one", "the plain divergence; not published")
        t_max: float = ours(0.8, "as SiD; not published", gt=0, le=1)
        p_mean: float = ours(-1.2, "as SiD; not published")
        p_std: float = ours(1.2, "as SiD; not published", gt=0)
        dropout: float = ours(0.13, "fake score, as SiD; not published", ge=0, lt=1)
        generator_dropout: float = ours(0.13, "as SiD; not published", ge=0, lt=1)
        augment: float = ours(0.12, "fake score, as SiD; not published", ge=0, le=1)
        eps: float = ours(1e-8, "Adam, as SiD; not published", gt=0)
        ema_half_life: int = ours(500_000, "images, as SiD; not published", ge=0)
        ema_ramp_up: float = ours(0.05, "as SiD; not published", gt=0)

    def sample_loss(self, x: Tensor, x0_teacher: Tensor, x0_fake: Tensor, sigma: Tensor) -> Tensor:
        return sim_loss(x, x0_teacher, x0_fake, sigma, self.config.c, self.config.weight)
