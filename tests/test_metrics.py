"""Metrics against the libraries, brute force and closed forms."""

import math

import numpy as np
import pytest
import torch

from harness.evaluation.aesthetic import AestheticHead, spearman
from harness.evaluation.frechet import Moments, frechet_distance, gaussian_statistics
from harness.evaluation.metrics import METRICS, Reference, Views, jackknife, register


def features(n: int, d: int = 8, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(99))
    return scale * torch.randn(n, d, generator=generator) @ mix


def compute(name: str, views: Views) -> tuple[float, float]:
    return METRICS[name].compute(views)


def test_statistics_are_numpys():
    x = features(50)
    mean, covariance = gaussian_statistics(x)
    np.testing.assert_allclose(mean, x.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(x.double().numpy(), rowvar=False), rtol=1e-10)
    again = Moments.of(x).statistics()
    torch.testing.assert_close(again[1], covariance)


def test_frechet_distance_agrees_with_both_libraries():
    from cleanfid.fid import frechet_distance as clean
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    one, two = (gaussian_statistics(features(300, seed=s, scale=1 + s)) for s in (0, 1))
    ours = frechet_distance(*one, *two)
    a, b = ([t.numpy() for t in pair] for pair in (one, two))
    assert ours == pytest.approx(clean(*a, *b), rel=1e-9)
    theirs = fid_statistics_to_metric(
        {"mu": a[0], "sigma": a[1]}, {"mu": b[0], "sigma": b[1]}, verbose=False
    )
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-9)


def test_frechet_distance_of_known_gaussians():
    mean, eye = torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    assert frechet_distance(mean, eye, mean + 2, 4 * eye) == pytest.approx(12 + 3)
    low_rank = torch.diag(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    assert frechet_distance(mean, low_rank, mean, low_rank) == pytest.approx(0, abs=1e-9)


def test_frechet_error_bar_covers_the_spread_of_repeated_draws():
    reference = features(2000, seed=7)
    results = [compute("fd", Views(features(400, seed=s), Reference(reference))) for s in range(20)]
    spread = torch.tensor([value for value, _ in results]).std().item()
    stated = sum(error for _, error in results) / len(results)
    assert 0.5 < stated / spread < 3


def test_kernel_distance_is_the_unbiased_estimate():
    x, y = features(60), features(45, seed=1) + 0.3
    value, _ = compute("kd", Views(x, Reference(y)))
    mean, std = y.double().mean(0), y.double().std(0)
    a, b = (x.double() - mean) / std, (y.double() - mean) / std

    def k(p, q):
        return (float(p @ q) / 8 + 1) ** 3

    xx = [k(a[i], a[j]) for i in range(60) for j in range(60) if i != j]
    yy = [k(b[i], b[j]) for i in range(45) for j in range(45) if i != j]
    xy = [k(p, q) for p in a for q in b]
    expected = sum(xx) / len(xx) + sum(yy) / len(yy) - 2 * sum(xy) / len(xy)
    assert value == pytest.approx(1000 * expected, rel=1e-9)


def test_kernel_distance_agrees_with_torch_fidelity_on_one_full_subset():
    from torch_fidelity.metric_kid import kernel_mmd

    x, y = features(80), features(80, seed=1) + 0.3
    mean, std = y.double().mean(0), y.double().std(0)
    theirs = kernel_mmd(
        ((x.double() - mean) / std).numpy(),
        ((y.double() - mean) / std).numpy(),
        kid_kernel="poly",
        kid_kernel_poly_degree=3,
        kid_kernel_poly_coef0=1,
    )
    assert compute("kd", Views(x, Reference(y)))[0] == pytest.approx(1000 * theirs, rel=1e-9)


def test_kernel_distance_jackknife_leaves_groups_out():
    x, y = features(40), features(50, seed=1)
    _, error = compute("kd", Views(x, Reference(y)))
    estimates = [
        compute(
            "kd", Views(torch.cat([g for j, g in enumerate(x.chunk(10)) if j != i]), Reference(y))
        )[0]
        for i in range(10)
    ]
    assert error == pytest.approx(jackknife(estimates), rel=1e-9)


def test_jackknife_of_a_mean_is_its_standard_error():
    values = torch.randn(10, dtype=torch.float64)
    estimates = [float(torch.cat([values[:i], values[i + 1 :]]).mean()) for i in range(10)]
    assert jackknife(estimates) == pytest.approx(float(values.std() / math.sqrt(10)))


def test_precision_and_recall_know_generated_from_real():
    """All generated at one real point: precise, no recall. Swapped, it is the other way round."""
    real = features(200)
    collapsed = real[:1].expand(100, -1) + 1e-4 * torch.randn(100, 8)
    one = Views(collapsed, Reference(real))
    assert compute("precision", one)[0] == 1
    assert compute("recall", one)[0] < 0.05
    other = Views(real, Reference(collapsed))
    assert compute("precision", other)[0] < 0.05
    assert compute("recall", other)[0] == 1


def test_precision_and_recall_agree_with_torch_fidelity():
    from torch_fidelity.metric_prc import prc_features_to_metric

    x, y = features(150), features(130, seed=1) + 0.5
    views = Views(x, Reference(y), neighbours=3)
    theirs = prc_features_to_metric(x, y, prc_neighborhood=3, verbose=False)
    assert compute("precision", views)[0] == pytest.approx(float(theirs["precision"]))
    assert compute("recall", views)[0] == pytest.approx(float(theirs["recall"]))


def test_accuracy_and_clip_score():
    probabilities = torch.eye(4)[torch.tensor([0, 1, 2, 3])]
    views = Views(
        torch.randn(4, 2), Reference(torch.randn(9, 2)), torch.tensor([0, 1, 2, 0]), probabilities
    )
    assert compute("accuracy", views)[0] == 75
    views.text_similarity = torch.tensor([0.5, -0.5, 1.0, 0.0])
    assert compute("clip-score", views)[0] == pytest.approx(37.5)


def test_disjoint_subsets():
    views = Views(torch.arange(10.0).view(10, 1), Reference(torch.zeros(3, 1)), torch.arange(10))
    parts = views.disjoint(4)
    assert [p.labels.tolist() for p in parts] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert all(p.reference is views.reference for p in parts)


def test_a_metric_name_is_taken_once():
    with pytest.raises(ValueError, match="registered already"):
        register("fd", "again", False)(lambda views: (0.0, 0.0))


def test_an_aesthetic_head_looks_at_directions_only():
    head, x = AestheticHead(6, hidden=0), torch.randn(5, 6)
    torch.testing.assert_close(head(x), head(3 * x))
    assert head(x).shape == (5,)
    assert spearman(torch.arange(5.0), torch.arange(5.0) ** 3) == pytest.approx(1)
