"""The methods' arithmetic against golden data of the authors' code and against closed forms."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import softplus

from methods.dmd import dmd_gradient
from methods.gdd import discriminator_loss, generator_loss, r1_penalty
from methods.sid import sid_loss
from methods.sim import sim_loss

DATA = Path(__file__).parent / "data"


def golden(name: str) -> dict[str, torch.Tensor]:
    with np.load(DATA / name) as file:
        return {k: torch.from_numpy(file[k]) for k in file.files}


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value - reference).abs().max() / reference.abs().max())


def test_dmd_gradient_is_the_authors():
    g = golden("dmd_gradient.npz")
    gradient = dmd_gradient(g["x"].requires_grad_(), g["x0_teacher"], g["x0_fake"])
    assert not gradient.requires_grad
    assert relative_error(gradient, g["gradient"]) < 1e-6


@pytest.mark.parametrize("alpha", ["0.75", "1.0", "1.2"])
def test_sid_loss_and_its_gradients_are_the_authors(alpha):
    g = golden("sid_loss.npz")
    names = ("x", "x0_teacher", "x0_fake")
    inputs = [g[name].requires_grad_() for name in names]
    loss = sid_loss(*inputs, alpha=float(alpha))
    assert loss.shape == (5,)
    assert relative_error(loss, g[f"loss_alpha{alpha}"]) < 1e-5
    for name, gradient in zip(names, torch.autograd.grad(loss.sum(), inputs), strict=True):
        assert relative_error(gradient, g[f"grad_{name}_alpha{alpha}"]) < 1e-5


def test_sid_weight_is_clipped_and_carries_no_gradient():
    x = torch.zeros(1, 1, 2, 2, requires_grad=True)
    fake = torch.ones(1, 1, 2, 2)
    loss = sid_loss(x, torch.zeros(1, 1, 2, 2), fake, alpha=1.0)
    # difference -1, bracket (0 - 0) - (-1) = 1, so -1 per pixel, over the limit 1e-5
    assert loss.item() == pytest.approx(-4 / 1e-5)


def draws(seed=0, shape=(4, 2, 3, 3)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]


def test_sim_loss_is_its_formula():
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


def test_sim_with_large_c_is_sid_without_its_projection():
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


def test_all_score_losses_stop_where_teacher_and_fake_agree():
    x, teacher, _ = draws(3)
    assert dmd_gradient(x, teacher, teacher).abs().max() == 0
    same = teacher.clone().requires_grad_()
    assert sid_loss(x, teacher, same, 1.2).abs().max() == 0
    assert sim_loss(x, teacher, same, torch.ones(4), 0.1, "one").abs().max() == 0


def test_adversarial_losses_are_mean_over_positions_and_sum_over_heads():
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


@pytest.mark.parametrize("method", ["dmd", "sid", "sim"])
def test_descent_with_exact_scores_reaches_the_teachers_distribution(method):
    """Data N(1, 0.5²) and a linear student a z + b: from (0.2, -1) each loss leads to (±0.5, 1)."""
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
        # The fake score knows the student's distribution, but its own parameters are constants.
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
