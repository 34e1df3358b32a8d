"""Metrics against the libraries, brute force and closed forms."""

import math
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.data.datasets import Images
from harness.evaluation import neighbours
from harness.evaluation.accumulator import NEAREST, FeatureAccumulator, NearestImages
from harness.evaluation.checks import minimum_samples
from harness.evaluation.feature_set import FeatureSet, jackknife
from harness.evaluation.frechet import (
    Moments,
    factor,
    frechet_distance,
    frechet_of_few,
    gaussian_statistics,
)
from harness.evaluation.references import Reference
from harness.evaluation.registry import METRICS, register
from harness.features.aesthetic import new_head
from harness.features.base import FeatureExtractor


def features(n: int, d: int = 8, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, generator=torch.Generator().manual_seed(99))
    return scale * torch.randn(n, d, generator=generator) @ mix


def feature_set(
    x: torch.Tensor, reference: Reference, labels: torch.Tensor | None = None, **outputs
) -> FeatureSet:
    return FeatureSet({"features": x, **outputs}, reference, labels)


def compute(name: str, features: FeatureSet) -> tuple[float, float]:
    """Value and standard error."""
    return METRICS[name].estimate(features)[:2]


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


def test_singular_covariances_have_a_path_of_their_own():
    """Dead features, and fewer samples than features: the libraries' value without their noise."""
    x, y = features(60), features(80, seed=1, scale=2)
    x[:, 3] = y[:, 5] = 0
    one, two = gaussian_statistics(x), gaussian_statistics(y)
    assert factor(one[1]).shape == (8, 7)
    root = torch.linalg.eigvals(one[1] @ two[1]).real.clamp_min(0).sqrt().sum()
    expected = (one[0] - two[0]).square().sum() + one[1].trace() + two[1].trace() - 2 * root
    assert frechet_distance(*one, *two) == pytest.approx(expected.item(), rel=1e-6)
    few = gaussian_statistics(y[:5])
    assert frechet_of_few(y[:5], *one) == pytest.approx(frechet_distance(*few, *one), rel=1e-9)
    assert Reference(x).frechet(y[:5]) == frechet_of_few(y[:5], *one)


def test_frechet_distance_without_limit_is_that_of_the_populations():
    """Two populations that are known: the bias of 400 samples goes, and the stated error is about
    the spread."""
    mix = torch.randn(8, 8, generator=torch.Generator().manual_seed(99)).double()
    exact = mix.T @ mix
    reference = Reference(torch.empty(0, 8), (torch.zeros(8, dtype=torch.float64), exact))
    assert reference.statistics[1] is exact
    draws = [feature_set(features(400, seed=s, scale=1.1), reference) for s in range(20)]
    biased, unbiased = ([compute(name, v) for v in draws] for name in ("fd", "fd-inf"))
    truth = frechet_distance(*reference.statistics, torch.zeros(8), 1.1**2 * exact)
    mean = {
        name: torch.tensor([value for value, _ in results]).mean().item()
        for name, results in (("fd", biased), ("fd-inf", unbiased))
    }
    spread = torch.tensor([value for value, _ in unbiased]).std().item()
    assert mean["fd"] - truth > 4 * spread / 20**0.5
    assert abs(mean["fd-inf"] - truth) < 3 * spread / 20**0.5
    stated = sum(error for _, error in unbiased) / len(unbiased)
    assert 0.5 < stated / spread < 3


def test_frechet_error_bar_covers_the_spread_of_repeated_draws():
    reference = features(2000, seed=7)
    results = [
        compute("fd", feature_set(features(400, seed=s), Reference(reference))) for s in range(20)
    ]
    spread = torch.tensor([value for value, _ in results]).std().item()
    stated = sum(error for _, error in results) / len(results)
    assert 0.5 < stated / spread < 3


def test_kernel_distance_is_the_unbiased_estimate():
    x, y = features(60), features(45, seed=1) + 0.3
    value, _ = compute("kd", feature_set(x, Reference(y)))
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
    assert compute("kd", feature_set(x, Reference(y)))[0] == pytest.approx(1000 * theirs, rel=1e-9)


def test_kernel_distance_jackknife_leaves_groups_out():
    x, y = features(40), features(50, seed=1)
    _, error = compute("kd", feature_set(x, Reference(y)))
    estimates = [
        compute(
            "kd",
            feature_set(torch.cat([g for j, g in enumerate(x.chunk(10)) if j != i]), Reference(y)),
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
    one = feature_set(collapsed, Reference(real))
    assert compute("precision", one)[0] == 1
    assert compute("recall", one)[0] < 0.05
    other = feature_set(real, Reference(collapsed))
    assert compute("precision", other)[0] < 0.05
    assert compute("recall", other)[0] == 1


def test_precision_and_recall_agree_with_torch_fidelity():
    from torch_fidelity.metric_prc import prc_features_to_metric

    x, y = features(150), features(130, seed=1) + 0.5
    views = feature_set(x, Reference(y))
    theirs = prc_features_to_metric(x, y, prc_neighborhood=3, verbose=False)
    assert compute("precision", views)[0] == pytest.approx(float(theirs["precision"]))
    assert compute("recall", views)[0] == pytest.approx(float(theirs["recall"]))


def test_density_and_coverage_are_their_definition():
    x, y = features(70), features(50, seed=1)
    views = feature_set(x, Reference(y))
    d = np.linalg.norm(x.numpy()[:, None] - y.numpy()[None], axis=2)
    within = np.linalg.norm(y.numpy()[:, None] - y.numpy()[None], axis=2)
    inside = d <= np.sort(within, axis=1)[:, 5]
    assert compute("density", views)[0] == pytest.approx(inside.sum() / (5 * 70))
    assert compute("coverage", views)[0] == pytest.approx(inside.any(axis=0).mean())


def test_rows_of_distances_change_nothing(monkeypatch):
    views = [feature_set(features(70), Reference(features(50, seed=1))) for _ in range(2)]
    names = ("precision", "recall", "density", "coverage")
    whole = [compute(name, views[0])[0] for name in names]
    monkeypatch.setattr(neighbours, "ROWS", 16)
    assert [compute(name, views[1])[0] for name in names] == whole


def test_memorisation_tells_copies_from_new_images():
    train, held_out = features(300), features(100, seed=1)
    reference = Reference(train, held_out=held_out)
    new = compute("memorisation", feature_set(features(200, seed=2), reference))
    assert new[0] == pytest.approx(1, abs=0.1) and 0 < new[1] < 0.05
    assert compute("memorisation", feature_set(held_out, reference))[0] == pytest.approx(
        1, rel=1e-6
    )
    assert compute("memorisation", feature_set(train[:200], reference))[0] == 0


def test_without_a_unit_memorisation_is_no_number():
    """Held-out images of which half duplicate training images; the figure's distances stay."""
    train = features(60)
    held_out = torch.cat([train[:30], features(20, seed=1)])
    reference = Reference(train, held_out=held_out, index=torch.arange(60))
    assert reference.typical_nearest is None
    value, error = compute("memorisation", feature_set(features(40, seed=2), reference))
    assert math.isnan(value) and math.isnan(error)
    images = Images(torch.zeros(60, 1, 1, 1, dtype=torch.uint8), torch.zeros(60))
    search = NearestImages("x", reference, images)
    x = features(40, seed=2)
    search.add(torch.zeros(40, 1, 1, 1, dtype=torch.uint8), x)
    nearest = torch.cdist(x, train).amin(dim=1).sort().values[:NEAREST]
    torch.testing.assert_close(search.tensors()["closest_distance"], nearest, rtol=1e-4, atol=0)


@pytest.mark.parametrize("neighbours", [3, 20])
def test_every_metric_is_a_number_on_the_fewest_samples(neighbours):
    train, samples = minimum_samples(neighbours)
    reference = Reference(features(train), held_out=features(samples, seed=1))
    x, each = features(samples, seed=2), torch.linspace(0.1, 0.9, samples)
    ratings = (
        "text_similarity",
        "prefixed_similarity",
        "aesthetic",
        "aesthetic_v1",
        "aesthetic_v2",
    )
    correct = dict.fromkeys(
        ("attributes_correct", "ink_correct", "ground_correct", "side_correct"),
        torch.ones(samples).bool(),
    )
    outputs = {"features": x, "probabilities": x.softmax(dim=1)} | correct
    outputs |= dict.fromkeys(ratings, each)
    views = FeatureSet(outputs, reference, torch.arange(samples) % 2, neighbours=neighbours)
    for name in METRICS:
        if samples >= METRICS[name].samples_per_dim * x.shape[1]:
            assert math.isfinite(compute(name, views)[0]), name


def test_the_pairs_of_the_figure_are_the_nearest_of_all():
    """Whatever the blocks; copies first, at distance 0, in units of the held-out median."""
    train, x = features(120), features(90, seed=2)
    x[70], x[11] = train[33], train[4]
    images = torch.arange(120).view(-1, 1, 1, 1).to(torch.uint8)
    drawn = torch.arange(0, 120)[train[:, 0].argsort()]  # a reference in an order of its own
    reference = Reference(train[drawn], held_out=features(50, seed=1), index=drawn)
    found = []
    for block in (90, 7):
        search = NearestImages("x", reference, Images(images, torch.zeros(120)))
        for part in torch.arange(90).split(block):
            search.add(part.view(-1, 1, 1, 1), x[part])
        found.append(search.tensors())
    distance = torch.cdist(x.double(), train.double())
    order = distance.amin(dim=1).argsort()[:NEAREST]
    for tensors in found:
        assert set(tensors["closest"][:2].flatten().tolist()) == {11, 70}
        assert tensors["closest"][2:].flatten().tolist() == order[2:].tolist()
        neighbour = distance[tensors["closest"].flatten()].argmin(dim=1)
        assert tensors["closest_training"].flatten().tolist() == neighbour.tolist()
        scaled = tensors["closest_distance"] * reference.typical_nearest
        assert scaled[:2].tolist() == [0, 0]
        np.testing.assert_allclose(scaled[2:], distance.amin(dim=1)[order[2:]], rtol=1e-5)


class Wide:
    """An extractor of 256 random features."""

    name, start, provided = "wide", FeatureExtractor.start, frozenset({"features"})
    plugin, captions = None, ()

    def extract(self, pixels, labels):
        return {"features": torch.randn(len(pixels), 256)}


def peak_over_features() -> float:
    """Peak of memory from the first block to the distance, divided by the size of the features."""

    def memory(key: str) -> int:
        return 1024 * int(Path("/proc/self/status").read_text().split(key)[1].split()[0])

    reference = Reference(torch.randn(600, 256))
    assert reference.frechet(torch.randn(20_000, 256)) > 0  # loads libraries and fills caches
    before = memory("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    accumulator, labels = FeatureAccumulator([Wide()]), torch.zeros(256, dtype=torch.int64)
    for _ in range(300):
        accumulator.add(labels, labels)
    features = accumulator.feature_set("wide", reference, 3).features
    assert features.shape == (76_800, 256)
    assert reference.frechet(features) > 0
    return (memory("VmHWM:") - before) / features.nbytes


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak memory")
def test_features_are_never_held_twice(record_property):
    """50,000 x 2,048 features take 410 MB; two copies would take 0.8 GB."""
    spawn = multiprocessing.get_context("spawn")  # memory that other tests freed would be reused
    with ProcessPoolExecutor(1, spawn) as pool:
        ratio = pool.submit(peak_over_features).result()
    record_property("times the features' memory", round(ratio, 2))
    assert 0.9 < ratio < 2


def test_diversity_is_the_mean_distance_within_a_class():
    x, labels = features(40), torch.arange(40) % 3
    value, error = compute("diversity", feature_set(x, Reference(None), labels))
    means = []
    for c in range(3):
        own = x[labels == c].double().numpy()
        pairs = [np.linalg.norm(a - b) for i, a in enumerate(own) for b in own[:i]]
        means.append(np.mean(pairs))
    assert value == pytest.approx(np.mean(means), rel=1e-6)
    draws = [
        compute("diversity", feature_set(features(40, seed=s), Reference(None), labels))[0]
        for s in range(30)
    ]
    assert 0.5 < error / np.std(draws) < 2
    collapsed = feature_set(x[:1].expand(40, -1), Reference(None), labels)
    assert compute("diversity", collapsed) == (0, 0)


def test_class_scores_of_known_probabilities():
    sure = torch.eye(4).repeat(25, 1)  # 100 samples, evenly spread over 4 classes, no doubt
    unsure = torch.full((100, 4), 0.25)
    for name in ("class-score", "inception-score"):
        views = feature_set(features(100), Reference(None), probabilities=unsure)
        assert compute(name, views) == pytest.approx((1, 0))
    assert compute(
        "class-score", feature_set(features(100), Reference(None), probabilities=sure)
    ) == (
        pytest.approx(4),
        pytest.approx(0, abs=0.01),
    )


def test_inception_score_agrees_with_torch_fidelity():
    from torch_fidelity.metric_isc import isc_features_to_metric

    logits = 3 * features(205)
    views = feature_set(features(205), Reference(None), probabilities=logits.softmax(dim=1))
    theirs = isc_features_to_metric(logits, splits=10, shuffle=False)
    value, error = compute("inception-score", views)
    assert value == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    std = error * 10**0.5 * (9 / 10) ** 0.5  # theirs divides by the number of splits
    assert std == pytest.approx(theirs["inception_score_std"], rel=1e-4)
    one = isc_features_to_metric(logits, splits=1)["inception_score_mean"]
    assert compute("class-score", views)[0] == pytest.approx(one, rel=1e-5)


def test_cmmd_is_its_formula_and_torch_fidelitys_kernel():
    from torch_fidelity.metric_kid import kernel_mmd

    x, y = features(60), features(60, seed=1) + 0.5
    value, error = compute("cmmd", feature_set(x, Reference(y)))
    a, b = (t.double().numpy() / np.linalg.norm(t.double(), axis=1, keepdims=True) for t in (x, y))
    theirs = kernel_mmd(a, b, kid_kernel="rbf", kid_kernel_rbf_sigma=10)
    assert value == pytest.approx(1000 * theirs, rel=1e-8)

    def mean(p, q, same):
        values = [
            math.exp(-float(((u - v) ** 2).sum()) / 200)
            for i, u in enumerate(p)
            for j, v in enumerate(q)
            if not (same and i == j)
        ]
        return sum(values) / len(values)

    expected = mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)
    assert value == pytest.approx(1000 * expected, rel=1e-8)
    assert 0 < error < value


def test_accuracy_and_clip_score():
    probabilities = torch.eye(4)[torch.tensor([0, 1, 2, 3])]
    views = feature_set(
        torch.randn(4, 2),
        Reference(torch.randn(9, 2)),
        torch.tensor([0, 1, 2, 0]),
        probabilities=probabilities,
        text_similarity=torch.tensor([0.5, -0.5, 1.0, 0.0]),
    )
    assert compute("accuracy", views)[0] == 75
    assert compute("clip-score", views)[0] == pytest.approx(37.5)


def test_disjoint_subsets():
    views = feature_set(
        torch.arange(10.0).view(10, 1), Reference(torch.zeros(3, 1)), torch.arange(10)
    )
    parts = views.subsets(4)
    assert [p.labels.tolist() for p in parts] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert all(p.reference is views.reference for p in parts)
    assert views.subsets(4) is parts  # metrics share what they keep


def test_a_metric_name_is_taken_once():
    with pytest.raises(ValueError, match="already registered"):
        register("fd", "again", False)(lambda views: (0.0, 0.0))


def test_an_aesthetic_head_looks_at_directions_only():
    head, x = new_head(6), torch.randn(5, 6)
    torch.testing.assert_close(head(x), head(3 * x))
    assert head(x).shape == (5,)
