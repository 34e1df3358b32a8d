"""Losses of the methods against golden values of the authors' code and against closed forms."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import softplus

from methods.dmd import DMD, dmd_gradient, level_weighted_gradient
from methods.gdd import discriminator_loss, generator_loss, r1_penalty
from methods.regression import Regression
from methods.sid import sid_loss
from methods.sim import sim_loss

DATA = Path(__file__).parent / "data"


def golden(name: str) -> dict[str, torch.Tensor]:
    with np.load(DATA / name) as file:
        return {k: torch.from_numpy(file[k]) for k in file.files}


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value - reference).abs().max() / reference.abs().max())


def test_dmd_gradient_equals_the_authors():
    g = golden("dmd_gradient.npz")
    gradient = dmd_gradient(g["x"].requires_grad_(), g["x0_teacher"], g["x0_fake"])
    assert not gradient.requires_grad
    assert relative_error(gradient, g["gradient"]) < 1e-6


@pytest.mark.parametrize("alpha", ["0.75", "1.0", "1.2"])
def test_sid_loss_and_gradients_equal_the_authors(alpha):
    g = golden("sid_loss.npz")
    names = ("x", "x0_teacher", "x0_fake")
    inputs = [g[name].requires_grad_() for name in names]
    loss = sid_loss(*inputs, alpha=float(alpha))
    assert loss.shape == (5,)
    assert relative_error(loss, g[f"loss_alpha{alpha}"]) < 1e-5
    for name, gradient in zip(names, torch.autograd.grad(loss.sum(), inputs), strict=True):
        assert relative_error(gradient, g[f"grad_{name}_alpha{alpha}"]) < 1e-5


class FormulaDenoiser:
    """A denoiser given by a formula, at any noise level."""

    def __init__(self, formula):
        self.formula = formula

    def level(self, sigma):
        return sigma

    def __call__(self, x, sigma, condition):
        return self.formula(x)


def test_regression_is_the_mean_squared_error():
    """A student 2 z on pairs x = 3 z has the error z."""
    context = SimpleNamespace(networks={"student": FormulaDenoiser(lambda x: 2 * x / 80.0)})
    z = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    context.pairs = lambda: (z, 3 * z, None)
    method = Regression(Regression.Config(), None)
    assert method.loss(context).item() == pytest.approx(z.square().mean().item())


def test_sid_weight_is_clipped_and_carries_no_gradient():
    x = torch.zeros(1, 1, 2, 2, requires_grad=True)
    fake = torch.ones(1, 1, 2, 2)
    loss = sid_loss(x, torch.zeros(1, 1, 2, 2), fake, alpha=1.0)
    # Difference -1, bracket (0 - 0) - (-1) = 1: -1 per pixel, divided by the limit 1e-5.
    assert loss.item() == pytest.approx(-4 / 1e-5)


def draws(seed=0, shape=(4, 2, 3, 3)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]


def test_sim_loss_equals_its_formula():
    x, teacher, fake = draws()
    sigma = torch.ones(4)
    expected = []
    for i in range(4):
        y = fake[i] - teacher[i]
        expected.append(-(y / math.sqrt((y**2).sum() + 0.3**2) * (fake[i] - x[i])).sum())
    one = sim_loss(x, teacher, fake, sigma, 0.3, "one")
    torch.testing.assert_close(one, torch.stack(expected))
    mean = (x - teacher).abs().mean(dim=(1, 2, 3))
    torch.testing.assert_close(sim_loss(x, teacher, fake, sigma, 0.3, "sid"), one / mean)
    with pytest.raises(ValueError, match="'one' or 'sid'"):
        sim_loss(x, teacher, fake, sigma, 0.3, "two")


def test_sim_with_large_c_equals_sid_with_alpha_one():
    """For c -> ∞, c d'(y) -> y: the squared distance, whose loss is SiD's at α = 1 (w = 1):
    (T - F)·[(T - x) - (T - F)] = -y·(F - x)."""
    x, teacher, fake = draws(1)
    c = 1e6
    sim = c * sim_loss(x, teacher, fake, torch.ones(4), c, "sid")
    torch.testing.assert_close(sim, sid_loss(x, teacher, fake, alpha=1.0), rtol=1e-8, atol=1e-8)


def test_sim_gradient_flows_through_everything():
    inputs = [t.requires_grad_() for t in draws(2)]
    loss = sim_loss(*inputs, torch.ones(4), 0.1, "one").sum()
    assert torch.autograd.gradcheck(
        lambda *a: sim_loss(*a, torch.ones(4), 0.1, "one"), tuple(inputs)
    )
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(loss, inputs))


def test_score_losses_vanish_where_teacher_and_fake_agree():
    x, teacher, _ = draws(3)
    assert dmd_gradient(x, teacher, teacher).abs().max() == 0
    same = teacher.clone().requires_grad_()
    assert sid_loss(x, teacher, same, 1.2).abs().max() == 0
    assert sim_loss(x, teacher, same, torch.ones(4), 0.1, "one").abs().max() == 0


def test_adversarial_losses_average_positions_and_sum_heads():
    real = [torch.tensor([[1.0, -2.0]]), torch.tensor([[[3.0]]])]
    fake = [torch.tensor([[0.5, 0.0]]), torch.tensor([[[-1.0]]])]
    s = softplus
    t = torch.tensor
    assert generator_loss(fake) == pytest.approx(
        float((s(t(-0.5)) + s(t(0.0))) / 2 + s(t(1.0))), rel=1e-6
    )
    assert discriminator_loss(real, fake) == pytest.approx(
        float((s(t(-1.0)) + s(t(2.0))) / 2 + s(t(-3.0)) + (s(t(0.5)) + s(t(0.0))) / 2 + s(t(-1.0))),
        rel=1e-6,
    )


def test_r1_of_a_linear_discriminator_is_its_squared_weight():
    weight = torch.randn(3, 4, 4, dtype=torch.float64)
    images = torch.randn(5, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    logits = [(images * weight).sum(dim=(1, 2, 3)), 2 * (images * weight).sum(dim=(1, 2))]
    penalty = r1_penalty(logits, images, gamma=0.5)
    expected = 0.25 * (3 * weight).square().sum().expand(5)
    torch.testing.assert_close(penalty, expected)


def gaussian_denoiser(x, sigma, mean, std):
    """Exact denoiser of data N(mean, std²)."""
    return (std**2 * x + sigma**2 * mean) / (std**2 + sigma**2)


class Quadrature:
    """Expectations over z and n, both standard normal, for a linear student x = a z + b: with
    Gaussian data all scores are linear, and Gauss-Hermite sums are exact or nearly so."""

    def __init__(self, a: float, b: float, sigma: float, mean=1.0, std=0.5, nodes=96):
        points, weights = np.polynomial.hermite_e.hermegauss(nodes)
        weights = weights / weights.sum()
        z, n = (torch.from_numpy(g).view(-1, 1, 1, 1) for g in np.meshgrid(points, points))
        self.weights = torch.from_numpy(np.outer(weights, weights)).flatten()
        self.a, self.b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (a, b))
        self.sigma = torch.full((len(z),), sigma, dtype=torch.float64)
        level = self.sigma.view(-1, 1, 1, 1)
        self.x = self.a * z + self.b
        noised = self.x + level * n
        self.teacher = gaussian_denoiser(noised, level, mean, std)
        # The fake score knows the student's distribution; its own parameters are constants.
        self.fake = gaussian_denoiser(noised, level, self.b.detach(), self.a.detach())
        # The difference that a divergence measures, as a function of the student's parameters
        # while the points at which it is looked at, the sampling law, are held fixed.
        fixed = noised.detach()
        self.difference = gaussian_denoiser(fixed, level, self.b, self.a) - self.teacher.detach()
        self.normaliser = (self.x - self.teacher).detach().abs().mean(dim=(1, 2, 3))

    def gradient(self, per_sample: torch.Tensor) -> torch.Tensor:
        loss = (self.weights * per_sample.flatten()).sum()
        return torch.stack(torch.autograd.grad(loss, (self.a, self.b), retain_graph=True))


POINTS = [(0.3, -0.4, 0.2), (0.3, -0.4, 1.5), (0.9, 1.7, 0.7), (0.5, 0.2, 5.0)]


@pytest.mark.parametrize(("a", "b", "sigma"), POINTS)
def test_dmd_gradient_times_its_normaliser_is_that_of_the_kl_divergence(a, b, sigma):
    """... of the noised distributions N(b, a² + σ²) and N(m, s² + σ²), times σ²."""
    q, mean, std = Quadrature(a, b, sigma), 1.0, 0.5
    surrogate = dmd_gradient(q.x, q.teacher, q.fake) * q.normaliser.view(-1, 1, 1, 1) * q.x
    mine, data = a**2 + sigma**2, std**2 + sigma**2
    divergence = torch.tensor([a / data - a / mine, (b - mean) / data], dtype=torch.float64)
    torch.testing.assert_close(q.gradient(surrogate), sigma**2 * divergence, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("a", "b", "sigma"), POINTS)
@pytest.mark.parametrize(("weighting", "power"), [("sigma/alpha", 1), ("sigma^3/alpha", 3)])
def test_dmd_weightings_scale_the_gradient(a, b, sigma, weighting, power):
    """Eq. 7 with w = σ or σ³ (α = 1), the ablation of eq. 8."""
    q = Quadrature(a, b, sigma)
    plain = dmd_gradient(q.x, q.teacher, q.fake) * q.normaliser.view(-1, 1, 1, 1) / sigma**2
    weighted = level_weighted_gradient(q.teacher, q.fake, q.sigma, weighting)
    torch.testing.assert_close(weighted, sigma**power * plain, rtol=1e-12, atol=0)
    assert not weighted.requires_grad


def test_dmd_without_distribution_matching_is_regression():
    """A student w z on pairs x = 3 z: λ mean (w z - 3 z)², so 2 λ (w - 3) mean z²."""
    w = torch.tensor(2.0, requires_grad=True)
    context = SimpleNamespace(log=lambda *_: None)
    context.networks = {"student": FormulaDenoiser(lambda x: w * x / 80.0)}
    z = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    context.pairs = lambda: (z, 3 * z, None)
    config = DMD.Config(regression="l2", regression_weight=0.25, distribution_matching=False)
    (gradient,) = torch.autograd.grad(DMD(config, None).generator_loss(context), w)
    assert gradient.item() == pytest.approx(-2 * 0.25 * z.square().mean().item())


@pytest.mark.parametrize(("a", "b", "sigma"), POINTS)
@pytest.mark.parametrize("c", [0.5, 2.0])
def test_sim_gradient_equals_the_divergence_gradient(a, b, sigma, c):
    """E d(y), d pseudo-Huber, with the sampling law held fixed (score-gradient theorem)."""
    q = Quadrature(a, b, sigma)
    loss = sim_loss(q.x, q.teacher, q.fake, q.sigma, c, "one")
    divergence = (q.difference.square() + c**2).sqrt() - c
    torch.testing.assert_close(q.gradient(loss), q.gradient(divergence), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("a", "b", "sigma"), POINTS)
def test_sid_gradient_equals_the_squared_distance_gradient(a, b, sigma):
    """α = 1, w = 1: E y²/2 with the sampling law held fixed."""
    q = Quadrature(a, b, sigma)
    loss = sid_loss(q.x, q.teacher, q.fake, alpha=1.0) * q.normaliser.clamp_min(1e-5)
    expected = q.gradient(q.difference.square() / 2)
    torch.testing.assert_close(q.gradient(loss), expected, rtol=1e-9, atol=1e-12)


def test_all_gradients_vanish_at_the_teachers_distribution():
    q = Quadrature(0.5, 1.0, 0.8)
    for loss in (
        dmd_gradient(q.x, q.teacher, q.fake) * q.x,
        sid_loss(q.x, q.teacher, q.fake, alpha=1.2),
        sim_loss(q.x, q.teacher, q.fake, q.sigma, 0.1, "one"),
    ):
        assert q.gradient(loss).abs().max() < 1e-10


@pytest.mark.parametrize("method", ["dmd", "sid", "sim"])
def test_descent_with_exact_scores_reaches_the_teachers_distribution(method):
    """Data N(1, 0.5²), a linear student a z + b: from (0.2, -1) each loss leads to (±0.5, 1)."""
    mean, std = 1.0, 0.5
    a = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    b = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([a, b], lr=0.02, betas=(0.0, 0.99))
    generator = torch.Generator().manual_seed(0)
    tail = []
    for step in range(1200):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 1200)
        z, n = (torch.randn(256, 1, 1, 1, generator=generator, dtype=torch.float64) for _ in "zn")
        sigma = torch.rand(256, generator=generator, dtype=torch.float64).view(-1, 1, 1, 1) + 0.2
        x = a * z + b
        noised = x + sigma * n
        teacher = gaussian_denoiser(noised, sigma, mean, std)
        # The fake score is exact for the student's distribution; its parameters are constants.
        fake = gaussian_denoiser(noised, sigma, b.detach(), a.detach().abs())
        if method == "dmd":
            loss = (dmd_gradient(x, teacher, fake) * x).mean()
        elif method == "sid":
            loss = sid_loss(x, teacher, fake, alpha=1.0).mean()
        else:
            loss = sim_loss(x, teacher, fake, sigma.flatten(), 0.1, "sid").mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= 1000:
            tail.append((abs(a.item()), b.item()))
    final_a, final_b = (sum(v) / len(tail) for v in zip(*tail, strict=True))
    assert final_b == pytest.approx(mean, abs=0.03)
    assert final_a == pytest.approx(std, abs=0.05)
