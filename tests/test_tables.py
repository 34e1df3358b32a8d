"""Summary, tables, figures and page from synthetic scores."""

from __future__ import annotations

import pandas as pd
import pytest

from harness.reporting.claims import claims_table
from harness.reporting.figures import quality
from harness.reporting.tables import (
    COLUMNS,
    headline,
    summarise,
    text_table,
    to_latex,
    to_markdown,
    wide,
)
from harness.validation import parse_experiment
from tests.reports import page, tidy_table, write_run


@pytest.fixture
def make(tiny, tmp_path):
    """A function that makes an experiment of three students and three training seeds."""

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


ASCENDING = {"s1": [1.0, 1.1, 1.2], "s2": [2.0, 2.1, 2.2], "s3": [3.0, 3.1, 3.2]}
DESCENDING = {"s1": [3.0, 3.1, 3.2], "s2": [2.0, 2.1, 2.2], "s3": [1.0, 1.1, 1.2]}


def by_student(summary, column: str) -> pd.DataFrame:
    return summary.scores[summary.scores.column == column].set_index("student")


def test_every_extractor_has_a_main_metric(make):
    """The experiment's metric where it is defined, else a Fréchet distance: ranked, used by the
    claims and drawn."""
    experiment = make("inception", "tiny-cnn", "clean", main_metric="fid-edm")
    reference = {"teacher": [0.5], "floor": [0.7]}
    table = tidy_table(
        experiment,
        {
            ("fid-edm", "inception"): reference | ASCENDING,
            ("recall", "inception"): reference | ASCENDING,
            ("fd", "tiny-cnn"): reference | DESCENDING,
            ("fid-clean", "clean"): reference | ASCENDING,
        },
        curve=True,
    )
    main = ["fid-edm_n400_inception", "fd_n400_tiny-cnn", "fid-clean_n400_clean"]
    summary = summarise(experiment, table)
    assert list(summary.columns.index[summary.columns.ranked]) == main
    floors = [column.replace("_n400_", "_n359_") for column in main]
    assert set(summary.main) == {*main, *floors, "recall_n400_inception"}
    for column, best in zip(main, ("s1", "s3", "s1"), strict=True):
        rows = by_student(summary, column)
        assert rows["rank"][best] == "1" and rows["rank"]["s2"] == "2"
        assert rows.best[best] == pytest.approx(1.1)
        assert pd.isna(rows["rank"]["teacher"])
    claims = claims_table(experiment, table)
    assert list(claims.column) == main
    assert list(claims.verdict) == ["supported", "contradicted", "supported"]
    assert quality.drawn_metrics(experiment, table, "images") == [
        *(("fid-edm", "inception"), ("fd", "tiny-cnn"), ("fid-clean", "clean"))
    ]
    content = page(experiment, table)
    assert (
        "s1 – FID, EDM's protocol 1.10 ± 0.10 in inception s3 – Fréchet distance 1.10 ± 0.10 in "
        "tiny-cnn s1 – FID, clean-fid 1.10 ± 0.10 in clean" in content.words
    )
    assert "The feature networks disagree about the best student." in content.words
    descriptions = [chart["description"] for chart in content.charts]
    for column in main:
        assert sum(f"({column}):" in text for text in descriptions) == 1
    assert sum("against images that received" in text for text in descriptions) == 3


def test_summary_is_tidy_and_comparison_is_its_pivot(make):
    experiment = make("tiny-cnn", "tiny-clip")
    scores = {("fd", "tiny-cnn"): {"teacher": [0.5]} | ASCENDING, ("fd", "tiny-clip"): ASCENDING}
    summary = summarise(experiment, tidy_table(experiment, scores))
    assert set(COLUMNS) < set(summary.scores)
    assert not summary.scores.duplicated(["student", "metric", "extractor", "num_samples"]).any()
    comparison = wide(summary).set_index("student")
    assert list(comparison.index) == ["teacher", "s1", "s2", "s3"]
    rows = by_student(summary, "fd_n400_tiny-cnn")
    assert comparison["fd_n400_tiny-cnn"].equals(rows["mean"].rename("fd_n400_tiny-cnn"))
    assert comparison["fd_n400_tiny-cnn_std"]["s1"] == pytest.approx(0.1)
    assert comparison.seeds["s1"] == 3 and (comparison.status == "ok").all()


def test_an_unavailable_extractor_leaves_the_others(make):
    experiment = make("inception", "tiny-cnn", main_metric="fid-edm")
    nothing = dict.fromkeys(("teacher", *ASCENDING), "unavailable (no weights)")
    numbers = {("fid-edm", "inception"): nothing, ("recall", "inception"): nothing}
    numbers |= {("fd", "tiny-cnn"): ASCENDING, ("recall", "tiny-cnn"): ASCENDING}
    table = tidy_table(experiment, numbers, curve=True)
    summary = summarise(experiment, table)
    assert list(by_student(summary, "fd_n400_tiny-cnn")["rank"]) == ["1", "2", "3"]
    rows = by_student(summary, "fid-edm_n400_inception")
    assert set(rows["rank"].dropna()) == {"not ranked"}
    assert set(rows.status) == {"unavailable (no weights)"}
    assert (summary.students.status == "ok").all()
    assert headline(experiment, summary).startswith(
        "| student   | fd_n400_tiny-cnn ↓   | recall_n400_tiny-cnn ↑   |"
    )
    text = text_table(summary, ["fid-edm_n400_inception"])
    assert text.loc["s1", "fid-edm_n400_inception ↓"] == "unavailable (no weights)"
    content = page(experiment, table)
    headings = [h.get("class") for h in content.all("h3")]
    assert len(content.charts) == 1 + 3 + 2 and headings
    assert "s1 Fréchet distance 1.10 ± 0.10 in tiny-cnn" in content.words


def test_a_metric_with_a_sample_limit_is_drawn_at_its_limit(make):
    experiment = make("tiny-cnn", "tiny-clip", samples=50_000, main_metric="kd")
    scores = {("kd", "tiny-cnn"): {"teacher": [0.5]} | ASCENDING}
    table = tidy_table(experiment, scores, curve=True)
    column = "kd_n10000_tiny-cnn"
    summary = summarise(experiment, table)
    assert list(summary.columns.index[summary.columns.ranked]) == [column]
    figure = quality.figure(experiment, table, "images").to_dict()
    assert [panel["title"][1] for panel in figure["hconcat"]] == [f"in tiny-cnn, n {10_000:,}"]
    curve = quality.chart(experiment, table, "images", "kd", "tiny-cnn").to_dict()["description"]
    assert curve.endswith("at the end: s1 1.1, s2 2.1, s3 3.1, teacher, 35 NFE 0.5")


def test_flags_mark_the_scores_and_have_notes(make):
    experiment = make("tiny-cnn", "tiny-clip")
    flags = {
        ("s1", "tiny-cnn"): "trained-on-extractor",
        ("s2", "tiny-cnn"): "trained-on-extractor contended",
        ("s2", "tiny-clip"): "shares-pretraining contended",
    }
    numbers = {("fd", "tiny-cnn"): ASCENDING, ("fd", "tiny-clip"): {"teacher": [0.5]} | ASCENDING}
    table = tidy_table(experiment, numbers, flags)
    summary = summarise(experiment, table)
    cnn, clip = (by_student(summary, f"fd_n400_{name}").flag for name in ("tiny-cnn", "tiny-clip"))
    assert cnn["s1"] == cnn["s2"] == "trained-on-extractor" and clip["s2"] == "shares-pretraining"
    assert cnn["s3"] == clip["s1"] == ""
    assert summary.students.set_index("student").flag["s2"] == "contended"
    assert [note.split(":")[0] for note in summary.notes[-3:]] == [
        "† trained-on-extractor (s1, s2 in tiny-cnn)",
        "‡ shares-pretraining (s2 in tiny-clip)",
        "§ contended (s2)",
    ]
    row = next(line for line in to_markdown(summary, "t").splitlines() if line.startswith("| s2"))
    assert "2.10 ± 0.10†" in row and "2.10 ± 0.10‡" in row
    tex = to_latex(summary, "t")
    assert r"2.10 $\pm$ 0.10$\dagger$" in tex and r"0.10$\ddagger$" in tex and r"\S{}" in tex
    assert tex.isascii() and "(s2 in tiny-clip)" in tex
    words = page(experiment, table).words
    assert "2.10 ± 0.10†" in words and "2.10 ± 0.10‡" in words
    assert all(note in words for note in summary.notes[-3:])


def test_tables_without_flags_have_no_marks(make):
    experiment = make("tiny-cnn", "tiny-clip")
    summary = summarise(experiment, tidy_table(experiment, {("fd", "tiny-cnn"): ASCENDING}))
    assert set(summary.scores.flag) == {""}
    assert "†" not in to_latex(summary, "t")


def test_diagnostics_are_not_ranked(make):
    experiment = make("tiny-cnn", "tiny-clip")
    names = ("memorisation", "diversity")
    numbers = {("fd", "tiny-cnn"): ASCENDING} | {(name, "tiny-cnn"): ASCENDING for name in names}
    table = tidy_table(experiment, numbers)
    summary = summarise(experiment, table)
    assert list(summary.columns.index[summary.columns.ranked]) == ["fd_n400_tiny-cnn"]
    for name in names:
        column = f"{name}_n400_tiny-cnn"
        assert column in text_table(summary, [column])  # without an arrow
        pairs = summary.pairs[summary.pairs.column == column]
        assert set(pairs.verdict) == {"–"} and (pairs.high < 0).all()
    text = page(experiment, table).text
    assert "Diversity within a class" in text and "Diversity within a class\u00a0" not in text
    assert "Fréchet distance\u00a0↓" in text


def test_a_network_trained_on_the_same_images_has_a_note(make):
    experiment = make("tiny-cnn", "tiny-clip")
    networks = {"s1": ["tiny-critic", "lpips-vgg"], "s2": [], "s3": ["tiny-critic"]}
    for name, against in networks.items():
        write_run(experiment, name, 0, trained_against=against)
    table = tidy_table(experiment, {("fd", "tiny-cnn"): ASCENDING})
    notes = [note for note in summarise(experiment, table).notes if "labelled" in note]
    assert len(notes) == 1 and notes[0].startswith(
        "s1 and s3 were trained against tiny-critic, which"
    )
    assert "(tiny-cnn, tiny-clip)" in notes[0]


@pytest.mark.parametrize("floor", [True, False])
def test_a_distance_of_fewer_samples_than_features_has_a_note(make, floor):
    experiment = make("tiny-cnn", "tiny-clip")
    rows = ASCENDING | ({"floor": [0.1]} if floor else {})
    numbers = {("fd", "tiny-cnn"): rows, ("recall", "tiny-cnn"): rows}
    few, many = (tidy_table(experiment, numbers, features=d) for d in (2048, 64))

    def notes(table):
        return [
            n for n in summarise(experiment, table).notes if n.startswith("fd_n") and "2,048" in n
        ]

    assert len(notes(few)) == 1 + floor and notes(many) == []
    if floor:
        words = page(experiment, few).words
        assert all(note in words for note in notes(few))


def test_tables_name_the_devices_of_runs(make):
    """One sentence if all are the same, otherwise the device of every run."""
    experiment = make("tiny-cnn", "tiny-clip")
    scores = {("fd", "tiny-cnn"): {"teacher": [0.5]} | ASCENDING}
    summary = summarise(experiment, tidy_table(experiment, scores))
    assert "All networks were trained and scored on cpu." in summary.notes
    assert "device" not in text_table(summary, ["fd_n400_tiny-cnn"])
    assert set(wide(summary).device) == {"cpu"}

    gpus = {"teacher": "NVIDIA H200", "s1": "NVIDIA H200", "s2": "NVIDIA H100, scored on cpu"}
    table = tidy_table(experiment, scores, devices=gpus)
    summary = summarise(experiment, table)
    (note,) = (note for note in summary.notes if note.startswith("Devices"))
    assert "teacher, s1: NVIDIA H200; s2: NVIDIA H100, scored on cpu; s3: cpu." in note
    expected = [*gpus.values(), "cpu"]
    assert list(text_table(summary, ["fd_n400_tiny-cnn"]).device) == expected
    assert list(wide(summary).device) == expected
    assert "device" in headline(experiment, summary).splitlines()[0]
    assert note.replace("`", "") in page(experiment, table).words
