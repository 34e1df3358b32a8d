"""What tables, charts and the page make of scores, on tables of scores as `collect` gives them."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from harness.evaluation.columns import column_name
from harness.evaluation.registry import METRICS
from harness.io.artifacts import write_json
from harness.reporting import figures
from harness.reporting.claims import claims_table
from harness.reporting.collect import COLUMNS
from harness.reporting.manifest import manifest
from harness.reporting.page.page import Report, write_html
from harness.reporting.report import headline
from harness.reporting.tables import compare, to_latex, to_markdown
from harness.validation import parse_experiment
from tests.test_html import Page


def scored(
    experiment, numbers: dict[tuple, dict], flags: dict | None = None, features: int = 64
) -> pd.DataFrame:
    """`numbers`: (metric, extractor) -> row -> one number per training seed, or why there is none.
    `flags`: (row, extractor) -> flag. The last snapshots alone, at the main sample count; the floor
    at 359. `features`: how many an extractor gives."""
    rows = []
    for (metric, extractor), values in numbers.items():
        for student, found in values.items():
            text, real = isinstance(found, str), student in experiment.scale_rows
            floor = student == "floor"
            n = METRICS[metric].count(359 if floor else experiment.evaluation.num_samples)
            for seed, value in enumerate([math.nan] if text else found):
                left = [value + 1e-6 * math.sin(g + len(student)) for g in range(10)]
                for r in [None] if floor else experiment.evaluation.sampling_seeds:
                    row = dict.fromkeys([*COLUMNS, "grid"]) | {
                        "student": student, "method": None if real else "sid",
                        "seed": None if real else seed, "snapshot": "x", "nfe": 1,
                        "images": None if real else 160, "flops": None if real else 1e12,
                        "seconds": 1.0, "sample_seed": r, "metric": metric, "extractor": extractor,
                        "num_samples": n, "reference": "digits", "value": value, "stderr": 0.1,
                        "protocol": column_name(metric, n, extractor),
                        "flag": (flags or {}).get((student, extractor), ""),
                        "status": found if text else "ok", "final": True, "grid": "images flops",
                        "leave_out": [] if text else left, "features": features,
                        "column": column_name(metric, n, extractor),
                    }  # fmt: skip
                    rows.append(row)
    table = pd.DataFrame(rows)
    whole = ("seed", "nfe", "images", "sample_seed", "num_samples")
    return table.astype(dict.fromkeys(whole, "Int64"))


def page(experiment, table) -> Page:
    experiment.root.joinpath("tables").mkdir(parents=True, exist_ok=True)
    made = manifest(experiment, {}, [])
    return Page(write_html(experiment, table, compare(experiment, table), made))


@pytest.fixture
def make(tiny, tmp_path, monkeypatch):
    """A function that makes an experiment of three students and three training seeds, of which no
    images are kept."""
    monkeypatch.setattr(figures, "scored_samples", lambda experiment, table: {})

    def make(*extractors, samples=400, **evaluation):
        tiny["students"] = {name: {"method": "sid"} for name in ("s1", "s2", "s3")}
        tiny["training"]["seeds"] = [0, 1, 2]
        tiny["features"]["inception"] = {"type": "inception"}
        tiny["features"]["clean"] = {"type": "inception", "resize": "clean"}
        tiny["evaluation"] |= {"extractors": list(extractors), "num_samples": samples, **evaluation}
        tiny["claims"] = [
            {"claim": "c", "source": "s", "reported": "r", "better": "s1", "worse": "s2"}
        ]
        return parse_experiment(tiny, "x", tmp_path)

    return make


APART = {"s1": [1.0, 1.1, 1.2], "s2": [2.0, 2.1, 2.2], "s3": [3.0, 3.1, 3.2]}
BACK = {"s1": [3.0, 3.1, 3.2], "s2": [2.0, 2.1, 2.2], "s3": [1.0, 1.1, 1.2]}


def test_every_extractor_has_a_main_metric(make):
    """The experiment's where it is defined, else a Fréchet distance: ranked, tried by the claims and
    drawn, in each."""
    experiment = make("inception", "tiny-cnn", "clean", main_metric="fid-edm")
    teacher = {"teacher": [0.5], "floor": [0.7]}
    table = scored(
        experiment,
        {
            ("fid-edm", "inception"): teacher | APART,
            ("recall", "inception"): teacher | APART,
            ("fd", "tiny-cnn"): teacher | BACK,
            ("fid-clean", "clean"): teacher | APART,
        },
    )
    main = ["fid-edm_n400_inception", "fd_n400_tiny-cnn", "fid-clean_n400_clean"]
    comparison = compare(experiment, table)
    assert comparison.ranked == main
    floors = [column.replace("_n400_", "_n359_") for column in main]
    assert set(comparison.main) == {*main, *floors, "recall_n400_inception"}
    values = comparison.values.set_index("student")
    for column, best in zip(main, ("s1", "s3", "s1"), strict=True):
        assert values[f"{column}_rank"][best] == "1" and values[f"{column}_rank"]["s2"] == "2"
        assert values[f"{column}_best_of_2"][best] == pytest.approx(1.1)
    claims = claims_table(experiment, table)
    assert list(claims.column) == main
    assert list(claims.verdict) == ["supported", "contradicted", "supported"]
    assert figures.quality_metrics(experiment, table) == [
        *(("fid-edm", "inception"), ("fd", "tiny-cnn"), ("fid-clean", "clean"))
    ]
    said = page(experiment, table)
    assert (
        "Lowest FID, EDM's protocol: s1 in inception (1.10 ± 0.10). Lowest Fréchet distance: s3 in "
        "tiny-cnn (1.10 ± 0.10). Lowest FID, clean-fid: s1 in clean (1.10 ± 0.10)." in said.text
    )
    labels = [a["aria-label"] for a in said.all("svg") if "aria-label" in a]
    for column in main:
        assert sum(f"({column}):" in label for label in labels) == 1
    assert sum("against images that received" in label for label in labels) == 3


def test_where_the_first_extractor_is_unavailable_the_other_is_ranked_and_drawn(make):
    experiment = make("inception", "tiny-cnn", main_metric="fid-edm")
    nothing = dict.fromkeys(("teacher", *APART), "unavailable (no weights)")
    numbers = {("fid-edm", "inception"): nothing, ("recall", "inception"): nothing}
    numbers |= {("fd", "tiny-cnn"): APART, ("recall", "tiny-cnn"): APART}
    table = scored(experiment, numbers)
    values = compare(experiment, table).values.set_index("student")
    assert list(values["fd_n400_tiny-cnn_rank"].dropna()) == ["1", "2", "3"]
    assert set(values["fid-edm_n400_inception_rank"].dropna()) == {"not ranked"}
    assert headline(experiment, compare(experiment, table)).startswith(
        "| student   | fd_n400_tiny-cnn ↓   | recall_n400_tiny-cnn ↑   |"
    )
    report = Report(experiment, table, compare(experiment, table), manifest(experiment, {}, []))
    assert [c.title for c in report.summary().columns if c.title.endswith("tiny-cnn")] == [
        *("fd_n400_tiny-cnn", "recall_n400_tiny-cnn")
    ]
    assert [chart["title"] for chart in report.finals()] == ["tiny-cnn"]
    assert report.curves()[0]["charts"][0]["note"] == "tiny-cnn, lower is better"
    assert "Lowest Fréchet distance: s1 in tiny-cnn" in page(experiment, table).text.replace(
        "\n", " "
    )


def test_a_main_metric_of_all_pairs_is_drawn_at_its_own_count(make):
    experiment = make("tiny-cnn", "tiny-clip", samples=50_000, main_metric="kd")
    table = scored(experiment, {("kd", "tiny-cnn"): {"teacher": [0.5]} | APART})
    column = "kd_n10000_tiny-cnn"
    assert compare(experiment, table).ranked == [column]
    figure = figures.quality(experiment, table, "images", [("kd", "tiny-cnn")])
    panel = figure.axes[0]
    assert len(panel.lines) == 3 + 1 and column in panel.get_title()
    said = page(experiment, table)
    curve = next(
        a["aria-label"] for a in said.all("svg") if "at the end" in a.get("aria-label", "")
    )
    assert curve.endswith(
        "at the end: s1 1.1, s2 2.1, s3 3.1, teacher 0.5"
    )  # of two sampling seeds
    assert f"{column} (lower is better)" in said.text


def test_flags_stand_at_the_numbers_and_the_notes_name_the_networks(make):
    experiment = make("tiny-cnn", "tiny-clip")
    flags = {
        ("s1", "tiny-cnn"): "trained-on-extractor",
        ("s2", "tiny-cnn"): "trained-on-extractor contended",
        ("s2", "tiny-clip"): "shares-pretraining contended",
    }
    numbers = {("fd", "tiny-cnn"): APART, ("fd", "tiny-clip"): {"teacher": [0.5]} | APART}
    table = scored(experiment, numbers, flags)
    comparison = compare(experiment, table)
    values = comparison.values.set_index("student")
    cnn, clip = "fd_n400_tiny-cnn", "fd_n400_tiny-clip"
    assert values[f"{cnn}_flag"]["s1"] == values[f"{cnn}_flag"]["s2"] == "trained-on-extractor"
    assert pd.isna(values[f"{cnn}_flag"]["s3"]) and pd.isna(values[f"{clip}_flag"]["s1"])
    assert values.seconds_flag["s2"] == "contended"
    notes = [
        "† trained-on-extractor (s1, s2 in tiny-cnn): trained against the network of that column.",
        "‡ shares-pretraining (s2 in tiny-clip): trained against a network that had seen the same "
        "images as that column's (a lead in it may vanish in other features).",
        "§ contended (s2): timed beside other work: its seconds are not to be compared.",
    ]
    assert comparison.notes[-3:] == notes
    text = to_markdown(comparison, "t", [cnn, clip])
    row = next(line for line in text.splitlines() if line.startswith("| s2"))
    assert "2.10 ± 0.10†" in row and "2.10 ± 0.10‡" in row
    tex = to_latex(comparison, "t", [cnn, clip])
    assert r"2.10 $\pm$ 0.10$\dagger$" in tex and r"0.10$\ddagger$" in tex and r"\S{}" in tex
    assert tex.isascii() and "(s2 in tiny-clip)" in tex
    said = page(experiment, table)
    assert "2.10 ± 0.10†" in said.text and "2.10 ± 0.10‡" in said.text
    assert all(note in said.text for note in notes)
    attributes = [str(value) for _, given, _ in said.elements for value in given.values()]
    assert not [value for value in attributes if value.endswith("_flag")]


def test_without_flags_there_are_no_columns_for_them(make):
    experiment = make("tiny-cnn", "tiny-clip")
    comparison = compare(experiment, scored(experiment, {("fd", "tiny-cnn"): APART}))
    assert not [column for column in comparison.values if column.endswith("_flag")]
    assert "†" not in to_latex(comparison, "t", comparison.main)


def test_of_a_diagnostic_nobody_is_better(make):
    experiment = make("tiny-cnn", "tiny-clip")
    names = ("memorisation", "diversity")
    numbers = {("fd", "tiny-cnn"): APART} | {(name, "tiny-cnn"): APART for name in names}
    table = scored(experiment, numbers)
    comparison = compare(experiment, table)
    assert comparison.ranked == ["fd_n400_tiny-cnn"]
    for name in names:
        column = f"{name}_n400_tiny-cnn"
        assert comparison.heading[column] == column
        pairs = comparison.pairs[comparison.pairs.column == column]
        assert set(pairs.verdict) == {"–"} and (pairs.high < 0).all()
    text = page(experiment, table).text
    assert "Diversity within a class" in text and "Diversity within a class\u00a0" not in text
    assert "Fréchet distance\u00a0↓" in text


def test_a_critic_that_learned_from_the_scoring_networks_images_is_told(make):
    experiment = make("tiny-cnn", "tiny-clip")
    record = {"parameters": 1, "frozen_fraction": 0, "data_free": False, "changed_settings": {}}
    record |= {"ledger": {"images": 1, "flops": 1, "seconds": 1}, "paper": "p", "deviations": []}
    for name, against in (
        ("s1", ["tiny-critic", "lpips-vgg"]),
        ("s2", []),
        ("s3", ["tiny-critic"]),
    ):
        path = experiment.run_dir(name, 0) / "student.json"
        write_json(path, record | {"skipped_steps": {}, "trained_against": against})
    notes = compare(experiment, scored(experiment, {("fd", "tiny-cnn"): APART})).notes
    assert [note for note in notes if "labelled" in note] == [
        "tiny-critic, which s1, s3 were trained against, has learned from the same labelled images "
        "as the networks that score (tiny-cnn, tiny-clip)."
    ]


@pytest.mark.parametrize(
    ("floor", "told"), [(True, "compare with the floor, n 359"), (False, "there is no floor")]
)
def test_a_distance_of_fewer_samples_than_features_is_told_under_the_table(make, floor, told):
    experiment = make("tiny-cnn", "tiny-clip")
    rows = APART | ({"floor": [0.1]} if floor else {})
    numbers = {("fd", "tiny-cnn"): rows, ("recall", "tiny-cnn"): rows}
    few, many = (scored(experiment, numbers, features=d) for d in (2048, 64))
    note = (
        "fd_n400_tiny-cnn: 400 samples are no more than the 2,048 features of tiny-cnn; their "
        f"Fréchet distance is mostly bias; {told}."
    )
    notes = compare(experiment, few).notes
    assert note in notes and sum("mostly bias" in n for n in notes) == 1 + floor
    assert note in page(experiment, few).text
    assert not [n for n in compare(experiment, many).notes if "mostly bias" in n]
