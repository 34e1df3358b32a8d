"""Intervals of differences: closed forms, coverage on simulated data, and why not a bootstrap."""

import json
import math
import re

import numpy as np
import pandas as pd
import pytest
import torch

from harness.evaluation.feature_set import FeatureSet, jackknife
from harness.evaluation.references import Reference
from harness.evaluation.registry import METRICS
from harness.reporting import claims, intervals
from harness.reporting.claims import claims_table, write_claims
from harness.reporting.intervals import (
    Interval,
    SeedScores,
    interval,
    pairwise,
    ranks,
    sampling_variance,
    seed_scores,
    training_variance,
    verdict,
    write_pairwise,
)
from harness.reporting.published.match import published
from harness.validation import load_experiment, parse_experiment


def of_groups(groups: np.ndarray, shift: np.ndarray | float = 0.0) -> SeedScores:
    """A mean over images with group means `(T, R, G)`, plus the effect of training `(T,)`."""
    shift = np.broadcast_to(shift, len(groups))[:, None]
    count = groups.shape[2]
    left = (groups.sum(axis=2, keepdims=True) - groups) / (count - 1)
    return SeedScores(groups.mean(axis=2) + shift, left + shift[..., None])


def simulate(rng, training=3, sampling=3, own=0.5, between=0.2, shared=0.0, truth=0.0):
    """Two students: the noise has a common effect and a separate one in each student (`own`); a
    training seed moves a whole run (`between`), and the other student's run `shared` times as far."""
    both = rng.standard_normal((1, sampling, 10))
    first = between * rng.standard_normal(training)
    second = shared * first + between * rng.standard_normal(training)
    students = []
    for seeds in (truth + first, second):
        separate = own * rng.standard_normal((1, sampling, 10))
        students.append(of_groups(np.repeat(both + separate, training, axis=0), seeds))
    return students


def test_pairing_cancels_the_common_effect_of_the_noise():
    a, b = simulate(np.random.default_rng(0), own=0.0, between=0.0, truth=0.3)
    result = interval(a, b)
    assert result.difference == pytest.approx(0.3)
    assert result.low == pytest.approx(0.3) and result.high == pytest.approx(0.3)
    assert result.sampling_se == pytest.approx(0, abs=1e-9)
    # A single student has a large error.
    assert sampling_variance(a, of_groups(np.zeros((1, 3, 10))))[0] > 0.005


def test_the_jackknife_of_a_mean_is_its_closed_form():
    """s² / G over the group means of one range of noise, averaged over R disjoint ranges."""
    x = np.random.default_rng(1).standard_normal((1, 3, 10))
    variance, freedom = sampling_variance(of_groups(x), of_groups(np.zeros_like(x)))
    expected = (x[0].var(axis=1, ddof=1) / 10).sum() / 9
    assert variance == pytest.approx(expected) and freedom == 27
    one = of_groups(x[:, :1])
    assert sampling_variance(one, of_groups(np.zeros((1, 1, 10))))[0] == pytest.approx(
        jackknife(one.leave_out[0, 0].tolist()) ** 2
    )


def test_without_groups_the_sampling_error_is_the_spread_over_sampling_seeds():
    a, b = SeedScores(np.array([[1.0, 2.0, 6.0]])), SeedScores(np.array([[0.0, 0.0, 0.0]]))
    assert sampling_variance(a, b) == (pytest.approx(7 / 3), 2.0)
    assert math.isnan(
        sampling_variance(SeedScores(a.values[:, :1]), SeedScores(b.values[:, :1]))[0]
    )


def test_without_noise_the_interval_is_a_paired_t_test():
    from scipy.stats import ttest_rel

    x, y = [1.0, 1.3, 0.8, 1.1], [1.5, 2.5, 1.7, 1.6]
    still = np.zeros((4, 2, 10))
    a, b = of_groups(still, np.array(x)), of_groups(still, np.array(y))
    result, paired = interval(a, b), ttest_rel(x, y).confidence_interval(0.95)
    assert (result.low, result.high) == pytest.approx((paired.low, paired.high))
    assert result.training_seeds == 4


def test_pairing_cancels_the_common_effect_of_a_training_seed():
    seeds, still = np.array([0.0, 5.0, -3.0]), np.zeros((3, 2, 10))
    a, b = of_groups(still, seeds + 0.1), of_groups(still, seeds)
    assert training_variance(a, b) == (pytest.approx(0, abs=1e-20), 2.0)
    assert interval(a, b).low == pytest.approx(0.1)


@pytest.mark.parametrize("shared", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize(("own", "between"), [(0.5, 0.05), (0.5, 0.2), (0.1, 0.5)])
def test_the_interval_has_its_nominal_coverage(own, between, shared):
    rng, inside = np.random.default_rng(2), 0
    for _ in range(1000):
        result = interval(*simulate(rng, own=own, between=between, shared=shared, truth=0.7))
        inside += result.low <= 0.7 <= result.high
    # At least 0.95 within three standard errors, for any correlation of the students of a seed.
    assert 0.93 < inside / 1000 < 0.99


def test_one_training_seed_has_no_interval_and_two_have_no_rank():
    rng = np.random.default_rng(3)
    one, two = simulate(rng, training=1, truth=9.0), simulate(rng, training=2, truth=99.0)
    assert math.isnan(interval(*one).low) and math.isnan(interval(*one).training_se)
    assert interval(*two).low < 99 < interval(*two).high
    assert verdict(interval(*one), True) == verdict(interval(*two), True) == "not ranked"


@pytest.mark.parametrize(
    ("low", "high", "higher", "expected"),
    [(1, 3, True, "a better"), (1, 3, False, "b better"), (-3, -1, True, "b better"),
     (-3, -1, False, "a better"), (-1, 1, True, "tie"), (0, 2, False, "tie"), (1, 3, None, "–")],
)  # fmt: skip
def test_verdicts(low, high, higher, expected):
    assert verdict(Interval((low + high) / 2, low, high, 0.1, 0.1, 3), higher) == expected


def test_the_jackknife_estimates_the_error_of_a_frechet_difference_and_a_bootstrap_does_not():
    """Two generators with the same noise, many times: the paired jackknife's error against the
    spread of the difference; and the bootstrap distribution of one sample against its distance."""
    generator = torch.Generator().manual_seed(0)
    reference = Reference(torch.randn(4000, 6, generator=generator))
    fd, n = METRICS["fd"], 600
    differences, errors = [], []
    for _ in range(60):
        noise = torch.randn(n, 6, generator=generator)
        a, b = (
            fd.estimate(FeatureSet({"features": s * noise + 0.3}, reference)) for s in (1.0, 1.1)
        )
        differences.append(a.value - b.value)
        left = [SeedScores(np.array([[e.value]]), np.array([[e.leave_out]])) for e in (a, b)]
        errors.append(math.sqrt(sampling_variance(*left)[0]))
    spread = np.std(differences, ddof=1)
    assert 0.75 < np.mean(errors) / spread < 1.35
    assert np.mean(errors) < math.hypot(a.stderr, b.stderr) / 1.5  # as independent samples

    x = torch.randn(n, 6, generator=generator)
    estimate = fd.estimate(FeatureSet({"features": x}, reference))
    redrawn = [
        fd.estimate(FeatureSet({"features": x[rows]}, reference)).value
        for rows in (torch.randint(n, (n,), generator=generator) for _ in range(40))
    ]
    assert np.mean(redrawn) > 1.5 * estimate.value
    assert np.quantile(redrawn, 0.025) > estimate.value  # a "95 %" interval without the estimate


def test_leave_out_estimates_of_a_mean_are_means_of_the_rest():
    similarity = torch.rand(50)
    features = FeatureSet({"text_similarity": similarity}, Reference(None))
    left = METRICS["clip-score"].estimate(features).leave_out
    assert left[0] == pytest.approx(100 * similarity[5:].mean().item())
    assert left[9] == pytest.approx(100 * similarity[:45].mean().item())


# -- tables --------------------------------------------------------------------------------------


def tidy(values: dict[str, list[float]], column="fd_n400_tiny-cnn", sampling=2) -> pd.DataFrame:
    """`collect`'s table of students with one score per training seed and almost no noise."""
    metric, _, extractor = column.split("_")
    rows = []
    for student, numbers in values.items():
        for seed, value in enumerate(numbers):
            for r in range(sampling):
                left = [value + 1e-6 * math.sin(g + r + len(student)) for g in range(10)]
                rows.append((student, seed, r, value + 1e-6 * r, left))
    table = pd.DataFrame(rows, columns=["student", "seed", "sample_seed", "value", "leave_out"])
    facts = {"column": column, "metric": metric, "extractor": extractor}
    return table.assign(final=True, num_samples=400, status="ok", **facts)


def students(tiny: dict, *names: str) -> object:
    tiny["students"] = {name: {"method": "sid"} for name in names}
    return parse_experiment(tiny, "x")


def test_pairwise_has_all_pairs_and_gives_the_ranks(tiny, tmp_path):
    experiment = students(tiny, "s1", "s2", "s3", "s4")
    table = tidy(
        {"s1": [1.0, 1.01, 0.99], "s2": [2.0, 2.9, 1.6], "s3": [2.2, 2.6, 2.0], "s4": [5.0, 5.1]}
    )
    column = "fd_n400_tiny-cnn"
    pairs = pairwise(experiment, table, [column])
    assert list(pairs.columns) == list(intervals.COLUMNS) and len(pairs) == 6
    by = pairs.set_index(["a", "b"])
    assert by.verdict["s1", "s3"] == "a better" and by.verdict["s2", "s3"] == "tie"
    assert by.verdict["s1", "s4"] == "not ranked" and by.training_seeds["s1", "s4"] == 2
    assert by.low["s1", "s3"] < by.difference["s1", "s3"] < by.high["s1", "s3"] < 0
    assert by.training_se["s1", "s3"] > 1000 * by.sampling_se["s1", "s3"] > 0
    rank = ranks(pairs, column, list(experiment.students))
    assert rank["s4"] == "not ranked" and rank["s3"] == "tie 2–3"
    assert rank["s1"] == ("1" if by.verdict["s1", "s2"] == "a better" else "tie 1–2")
    for path in write_pairwise(pairs, tmp_path, "x"):
        assert path.stat().st_size
    assert list(pd.read_csv(tmp_path / "pairwise.csv").columns) == list(intervals.COLUMNS)


def test_a_failed_student_does_not_affect_the_ranks_of_others(tiny):
    experiment = students(tiny, "s1", "s2", "s3")
    table = tidy({"s1": [1.0, 1.1, 1.2], "s2": [3.0, 3.1, 3.2]})
    failed = {"student": "s3", "seed": 0, "status": "failed (x)", "final": True, "column": ""}
    table = pd.concat([table, pd.DataFrame([failed])])
    pairs = pairwise(experiment, table, ["fd_n400_tiny-cnn"])
    assert list(pairs.verdict) == ["a better", "not ranked", "not ranked"]
    assert pairs.difference.isna().tolist() == [False, True, True]
    rank = ranks(pairs, "fd_n400_tiny-cnn", ["s1", "s2", "s3"])
    assert rank == {"s1": "1", "s2": "2", "s3": "not ranked"}


def test_scores_with_other_sampling_seeds_are_not_ranked():
    table = tidy({"s1": [1.0, 1.1, 1.2], "s2": [3.0, 3.1, 3.2]})
    column = "fd_n400_tiny-cnn"
    assert seed_scores(table, column)["s1"].leave_out.shape == (3, 2, 10)
    assert seed_scores(table, column)["s1"].leave_out[1, 0, 0] == table.leave_out[2][0]
    table["leave_out"] = [[] for _ in range(len(table))]
    assert seed_scores(table, column)["s1"].leave_out is None
    table.loc[table.student == "s2", "sample_seed"] += 7
    numbers = seed_scores(table, column)
    assert intervals.decide(numbers, "s1", "s2", False)["verdict"] == "not ranked"


def test_claims_are_supported_contradicted_or_undecided(tiny, tmp_path):
    tiny["students"] = {name: {"method": "sid"} for name in ("low", "mid", "high", "few")}
    common = {"claim": "c", "source": "s", "reported": "5.58 -> 2.66"}
    pairs = [("low", "high"), ("high", "low"), ("mid", "low"), ("few", "high")]
    tiny["claims"] = [common | {"better": a, "worse": b} for a, b in pairs]
    tiny["claims"][1]["metric"] = "accuracy"  # not defined for a clip network
    experiment = parse_experiment(tiny, "x")
    numbers = {"low": [1.0, 1.1, 1.2], "mid": [1.0, 1.2, 1.3], "high": [3.0, 3.1, 3.2]}
    table = tidy(numbers | {"few": [0.0, 0.1]})
    table = pd.concat([table, table.assign(metric="accuracy", column="accuracy_n400_tiny-cnn")])
    rows = claims_table(experiment, table)
    assert list(rows.columns) == list(claims.COLUMNS)
    assert list(rows.column) == [
        *("fd_n400_tiny-cnn", "fd_n400_tiny-clip", "accuracy_n400_tiny-cnn"),
        *("fd_n400_tiny-cnn", "fd_n400_tiny-clip") * 2,
    ]
    first = rows[rows.column.str.endswith("cnn")]
    assert list(first.verdict) == ["supported", "supported", "undecided", "undecided"]
    assert first.difference.iloc[0] == pytest.approx(-2.0, abs=1e-4)
    assert first.low.iloc[0] < -2 < first.high.iloc[0] < 0
    assert set(rows[rows.column.str.endswith("clip")].verdict) == {"undecided"}  # no scores
    tiny["claims"] = [common | {"better": "high", "worse": "low"}]
    swapped = claims_table(parse_experiment(tiny, "x"), table)
    assert swapped.verdict[0] == "contradicted"
    write_claims(experiment, table, tmp_path)
    assert list(pd.read_csv(tmp_path / "claims.csv").columns) == list(claims.COLUMNS)
    text = (tmp_path / "claims.md").read_text()
    assert "contradicted" in text
    assert "chance would decide about" in text


def test_the_shipped_claims_cite_published_numbers():
    """Every number in `reported` is in numbers.yaml, and the seeds suffice for a verdict."""
    experiment = load_experiment("configs/digits-claims.yaml")
    assert len(experiment.training.seeds) >= intervals.TRAINING_SEEDS
    values = {f"{entry['value']:g}" for entry in published()}
    for claim in experiment.claims:
        for word in claim.reported.replace(",", " ").replace("(", " ").split():
            if "." in word and word[0].isdigit():
                assert word in values, claim


def test_the_workflow_writes_pairwise_and_claims(workspace):
    tables = workspace.results / "tables"
    pairs = pd.read_csv(tables / "pairwise.csv")
    assert set(pairs.verdict) == {"not ranked", "–"}  # one training seed; diagnostics
    assert len(pairs[pairs.column == "fd_n400_tiny-cnn"]) == 15
    assert pairs.sampling_se.notna().all() and pairs.low.isna().all()
    assert not (tables / "claims.csv").exists()
    config = workspace.config()
    config["claims"] = [{"claim": "c", "source": "s", "reported": "r"}]
    config["claims"][0] |= {"better": "dmd", "worse": "dmd-noreg"}
    workspace.write_config(config)
    planned = workspace.snakemake("-n")
    assert re.search(r"^report +1$", planned.stdout, re.M), planned.stdout
    assert "tables/claims.csv" in planned.stdout and "tables/paper.csv" not in planned.stdout
    done = workspace.stage("report")
    assert done.returncode == 0, done.stderr
    assert list(pd.read_csv(tables / "claims.csv").verdict) == ["undecided", "undecided"]
    outputs = json.loads((workspace.results / "manifest.json").read_text())["outputs"]
    assert {"tables/pairwise.csv", "tables/claims.md"} <= set(outputs)
