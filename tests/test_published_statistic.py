"""The statistic of a published FID, and the same statistic of a run here."""

import pytest

from harness.reporting.published import tables as paper
from harness.reporting.published.match import published
from harness.reporting.published.statistic import (
    fid_rows,
    measure,
    quotes,
    statistic_differences,
    statistic_of,
)
from tests.test_paper import paper_experiment, rows_of, scores

# Ten evaluations of the best of 100 snapshots (1.0 to 1.9) and of the last one (2.0 to 2.9).
TEN = [("sid", 0, "fid-edm", 2 + k / 10, {"sample_seed": k}) for k in range(10)]
TEN += [(*row[:3], row[3] - 1, {"final": False, "selected": 100}) for row in TEN]


def test_the_paper_table_has_the_papers_statistic():
    experiment = paper_experiment("cifar10-uncond")
    teacher = [("teacher/vp", None, "fid-edm", value) for value in (2.1, 2.3, 2.2, 1.0)]
    gdd = [(name, *row[1:]) for name in ("gdd-i", "dmd") for row in TEN[9:11]]
    table = paper.paper_table(experiment, scores(*TEN, *teacher, *gdd))
    row = rows_of(table, "SiD", "SiD").query("reproduced != ''").iloc[0]
    assert row.reproduced_is == "the mean of 10 evaluations of the best of 100 snapshots"
    assert (row.reproduced, row.snapshots, row["last"]) == ("1.45", 100, "2.45")
    assert row.difference == pytest.approx(1.45 - 1.923) and row.setting_match == "exact"
    assert "another statistic" not in row.note and "different from" not in row.note
    # The first three evaluations, as many as EDM's.
    row = rows_of(table, "EDM", "EDM (teacher)").iloc[0]
    assert (row.reproduced, row["last"]) == ("2.10", "1.90")
    assert row.reproduced_is == "the minimum of 3 evaluations" and row.snapshots == 1
    row = rows_of(table, "GDD", "GDD-I").iloc[0]
    assert row.reported_is.startswith("one evaluation of the snapshot with the lowest FID")
    assert (row.reproduced, row.snapshots, row["last"]) == ("1.00", 100, "2.90")
    # The DMD paper does not state its statistic.
    row = rows_of(table, "DMD", "DMD").iloc[0]
    assert (row.reported_is, row.reproduced, row.snapshots) == ("", "2.90", 1)


def test_exact_requires_a_selected_snapshot():
    table = paper.paper_table(paper_experiment("cifar10-uncond"), scores(*TEN[:10]))
    row = rows_of(table, "SiD", "SiD").query("reproduced != ''").iloc[0]
    assert row.reproduced_is == "the mean of 10 evaluations of the last snapshot"
    assert row.setting_match == "changed" and "no snapshot was selected" in row.note


@pytest.mark.parametrize(
    ("overrides", "phrases"),
    [
        ({}, []),
        ({"evaluation": {"sampling_seeds": [0, 1]}}, ["2 sampling seeds instead of 10"]),
        ({"evaluation": {"selection_seed": None}},
         ["the last snapshot instead of that with the lowest FID"]),
        ({"evaluation": {"main_metric": "kd"}},
         ["the snapshot is selected by kd instead of the published FID"]),
        ({"training": {"snapshots": {"images": {"every": 6e6}}}},
         ["snapshots every 6,000,000 images instead of 500,000"]),
        ({"training": {"snapshots": {"images": {"every": 4e5}}}},
         ["snapshots every 400,000 images instead of 500,000"]),
        ({"training": {"snapshots": {"images": {"every": None, "first": 1e6}}}},
         ["snapshots not every 500,000 images"]),
        ({"training": {"snapshots": {"flops": {"every": 1e18}}}},
         ["snapshots not every 500,000 images"]),
    ],
)  # fmt: skip
def test_the_statistic_selection_and_grid_are_compared(overrides, phrases):
    experiment = paper_experiment("cifar10-uncond", **overrides)
    (entry,) = (e for e in published() if (e["paper"], e["value"]) == ("SiD", 1.923))
    assert statistic_differences(experiment, "sid", entry) == phrases


def test_quoted_numbers_have_the_statistic_of_the_original():
    def statistic(paper: str, method: str, value: float):
        found = {
            statistic_of(entry)
            for entry in published()
            if (entry["paper"], entry["method"], entry["value"]) == (paper, method, value)
        }
        (one,) = found
        return one

    assert statistic("IMM", "SiD", 1.92) == statistic("SiD", "SiD", 1.923)
    assert statistic("GDD", "SiD", 1.52) == statistic("SiD", "SiD", 1.524)
    # GDD's README does not have the original rounded, which is 1.63.
    assert statistic("GDD", "SiD", 1.62) is None and statistic("SiD", "SiD", 1.628) is not None
    assert statistic("SiD", "SiD", 1.524).every[0] == 1_000_000  # ImageNet
    assert statistic("SiD", "SiD", 1.923).every[0] == 500_000
    assert statistic("EDM", "EDM (teacher)", 1.97).kind == "minimum"
    assert statistic("DMD", "EDM (teacher)", 1.84) is None  # EDM's is 1.79
    assert statistic("DMD", "DMD", 2.66) is None


@pytest.mark.parametrize(
    ("number", "original", "same"),
    [
        (1.92, 1.923, True),
        (1.63, 1.628, True),
        (1.62, 1.628, False),
        (1.93, 1.923, False),  # within 0.0099
        (3.6, 3.604, True),  # 3.60
        (3.6, 3.64, False),
        (1.923, 1.9234, True),
        (1.923, 1.924, False),
        (1.93, 1.925, True),  # half a unit, whichever way it was rounded
    ],
)
def test_a_quotation_is_the_original_rounded_to_its_own_digits(number, original, same):
    assert quotes(number, original) == same


def test_fids_are_of_the_extractor_with_the_published_statistics():
    """Of several with one resize: the first that the experiment names."""
    names = {"a-inception": {"type": "inception"}, "inception": {"type": "inception"}}
    evaluation = {"extractors": ["inception", "a-inception", "vit-b-32-quickgelu-openai"]}
    experiment = paper_experiment("cifar10-uncond", features=names, evaluation=evaluation)
    both = [("sid", 0, "fid-edm", k, {"extractor": name}) for k, name in enumerate(names)]
    rows, label = fid_rows(experiment, scores(*both), "sid")
    assert set(rows.extractor) == {"inception"} and label == "fid-edm_n50000_inception"


def test_sampling_seeds_are_averaged_before_training_seeds():
    rows = [("sid", seed, "fid-edm", value) for seed, value in ((0, 1.0), (0, 3.0), (1, 5.0))]
    fids, _ = fid_rows(paper_experiment("cifar10-uncond"), scores(*rows), "sid")
    assert list(measure(fids, None).values) == [2.0, 5.0]
