"""The tables say what the score files say."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from harness.data import datasets
from harness.errors import UserError
from harness.evaluation.agreement import write_images
from harness.evaluation.folder import print_folder, score_folder
from harness.reporting import figures
from harness.reporting.collect import COLUMNS, collect, read_metrics
from harness.reporting.tables import cell, compare, formatted
from harness.validation import load_experiment
from tests.conftest import DATA, ROOT


@pytest.fixture(scope="session")
def experiment(finished):
    from pathlib import Path

    path = Path(finished.root)
    return load_experiment(path / "configs" / "tiny.yaml", results=path / "results")


def test_metrics_csv_is_tidy(finished, experiment):
    table = pd.read_csv(finished.results / "tables" / "metrics.csv")
    assert tuple(table.columns) == COLUMNS
    assert (table.schema == 2).all() and (table.experiment == "tiny").all()
    keys = ["student", "seed", "snapshot", "sample_seed", "metric", "extractor", "num_samples"]
    assert not table.duplicated(keys).any()
    # Every number that a column would hold was made by one protocol.
    per_column = table.groupby(["metric", "extractor", "num_samples"]).protocol.nunique()
    assert (per_column == 1).all()
    protocols = json.loads((finished.results / "manifest.json").read_text())["protocols"]
    assert set(table.protocol) == set(protocols)
    assert set(table.reference) == {"digits-train1438"}


def test_the_last_snapshot_gets_every_sampling_seed_and_the_others_the_first(experiment):
    table, protocols = collect(experiment)
    runs = table[table.seed.notna()]
    seeds = runs.groupby("final").sample_seed.unique().map(sorted)
    assert seeds[True] == [0, 1] and seeds[False] == [0]
    assert sorted(table[table.student == "teacher"].sample_seed.unique()) == [0, 1]
    assert table[table.student == "floor"].sample_seed.isna().all()
    assert all(p["sampling_seeds"] == [0, 1] for p in protocols.values())
    # Other noise, other numbers; the leave-out estimates lie around each.
    fd = runs[runs.final & (runs.student == "sid") & (runs.column == "fd_n400_tiny-cnn")]
    assert fd.value.nunique() == 2
    for value, left in zip(fd.value, fd.leave_out, strict=True):
        assert len(left) == 10 and min(left) < 1.1 * value and max(left) > value
    recall = runs[runs.metric == "recall"]
    assert recall[recall.num_samples == 400].leave_out.map(len).max() == 0


def test_a_score_file_or_csv_of_an_older_schema_is_one_clear_line(workspace):
    experiment = load_experiment(
        workspace.root / "configs" / "tiny.yaml", results=workspace.root / "results"
    )
    path = experiment.score_path("sid", 0)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 1}))
    expected = (
        r"seed0.json was written by an older version of the harness \(schema 1, here 4\); run"
    )
    with pytest.raises(UserError, match=expected):
        collect(experiment)
    partial, _ = collect(experiment, partial=True)
    assert partial[partial.student == "sid"].status.str.startswith("missing").all()
    csv = workspace.results / "tables" / "metrics.csv"
    assert tuple(read_metrics(csv).columns) == COLUMNS
    old = csv.read_text().replace("\n2,", "\n1,")
    for text, message in (
        (old, r"metrics.csv was written by an older version of the harness \(schema 1, here 2\)"),
        (old.replace("schema,", "", 1), "older version"),
        (csv.read_text().replace("sample_seed", "seeds", 1), "has no column sample_seed"),
        ("", "is no table"),
    ):
        csv.write_text(text)
        with pytest.raises(UserError, match=message) as error:
            read_metrics(csv)
        assert "\n" not in str(error.value)


def test_scale_rows(finished):
    table = pd.read_csv(finished.results / "tables" / "metrics.csv")
    nfe = table.groupby("student").nfe.unique()
    assert list(nfe["teacher"]) == [7] and list(nfe["teacher-1step"]) == [1]
    floor = table[table.student == "floor"]
    assert set(floor.num_samples) == {359}  # the held-out part, never a redraw of the reference
    for name in ("teacher", "teacher-1step", "sid"):
        assert set(table[table.student == name].num_samples) == {359, 400}
    accuracy = floor[(floor.metric == "accuracy") & (floor.extractor == "tiny-cnn")].value.item()
    record = json.loads((finished.results / "features/tiny-cnn/features.json").read_text())
    assert accuracy == pytest.approx(100 * record["held_out_accuracy"])


def test_nearest_training_images_are_shown_of_every_row(experiment):
    train = datasets.load(experiment.data_dir()).train.pixels.numpy()
    known = {image.tobytes() for image in train}
    scored = figures.scored_samples(experiment, collect(experiment)[0])
    pairs, reading = figures.closest(scored)
    assert list(pairs) == ["floor", "teacher", *experiment.students]
    assert reading == (
        "nearest of 1,438 training images in the features of tiny-cnn; its distance, as a multiple "
        "of the held-out median"
    )
    for name, pair in pairs.items():
        assert pair.images.shape == pair.training.shape == (10, 1, 8, 8), name
        assert (np.diff(pair.distance) >= 0).all() and pair.distance[0] < 1, name
        assert {image.tobytes() for image in pair.training} <= known, name
    # Held-out images are no training images, and some look like one.
    assert not {image.tobytes() for image in pairs["floor"].images} & known


def test_comparison_is_mean_and_std_of_the_scores(experiment):
    table, _ = collect(experiment)
    doubled = table.copy()
    doubled["seed"] = doubled.seed + 1
    doubled["value"] = doubled.value + 2.0
    comparison = compare(experiment, pd.concat([table, doubled[doubled.student == "sid"]]))
    values = comparison.values.set_index("student")
    column = "fd_n400_tiny-cnn"
    ours = table[table.final & (table.student == "sid") & (table.column == column)].value
    assert values[column]["sid"] == pytest.approx(ours.mean() + 1)
    assert values[f"{column}_std"]["sid"] == pytest.approx(2**0.5)
    # The spread over sampling seeds stands by itself, and so does the best of them.
    assert values[f"{column}_sampling_std"]["sid"] == pytest.approx(ours.astype(float).std())
    assert values[f"{column}_best_of_2"]["sid"] == pytest.approx(ours.min() + 1)
    assert "recall_n400_tiny-cnn_best_of_2" not in values
    assert values[f"{column}_rank"]["sid"] == "not ranked"
    assert pd.isna(values[f"{column}_rank"]["teacher"])
    text = formatted(comparison).set_index("student")
    assert text[f"{column} best of 2"]["teacher"] != "–"
    assert text[f"{column} best of 2"]["floor"] == "–"
    assert text[f"{column} rank"]["sid"] == "not ranked"
    assert values.images["sid"] == 160
    assert pd.isna(values[f"{column}_std"]["sim"])
    assert values.frozen["gdd-i"] > 0.5 and values.frozen["gdd"] == 0
    assert values.data_free["gdd"] == "no" and values.data_free["sid"] == "yes"
    note = next(n for n in comparison.notes if n.startswith("gdd-i:"))
    assert "frozen" in note and "r1_every 4" in note


def test_a_network_trained_against_is_flagged(finished, experiment, tmp_path):
    from harness.evaluation.score import Scorer

    scorer = Scorer(experiment)
    held = scorer.dataset.held_out
    rows = scorer.score(iter([(held.pixels, held.labels)]), [359], against=["tiny-cnn"])
    flags = {row["extractor"]: row["flag"] for row in rows}
    assert flags == {"tiny-cnn": "trained-on-extractor", "tiny-clip": ""}


def test_scores_of_other_weights_are_not_reported(workspace):
    experiment = load_experiment(
        workspace.root / "configs" / "tiny.yaml", results=workspace.root / "results"
    )
    path = experiment.score_path("sid", 0)
    score = json.loads(path.read_text())
    path.write_text(json.dumps(score | {"weights": "0" * 64}))
    with pytest.raises(UserError, match="belongs to other weights"):
        collect(experiment)


def test_mixed_protocols_are_refused(workspace):
    experiment = load_experiment(
        workspace.root / "configs" / "tiny.yaml", results=workspace.root / "results"
    )
    path = experiment.score_path("sid", 0)
    score = json.loads(path.read_text())
    old = score["entries"][0]["rows"][0]["protocol"]
    score["protocols"]["f" * 16] = score["protocols"][old]
    score["entries"][0]["rows"][0]["protocol"] = "f" * 16
    path.write_text(json.dumps(score))
    with pytest.raises(UserError, match="would mix 2 protocols"):
        collect(experiment)


@pytest.mark.parametrize(
    ("value", "std", "text"),
    [(3.14159, None, "3.14"), (42.6, 1.26, "42.6 ± 1.3"), (0.00123, 0.0004, "0.00123 ± 0.00040"),
     (None, None, "–"), (1234.5, 10.4, "1234 ± 10")],
)  # fmt: skip
def test_cells(value, std, text):
    assert cell(value, std) == text


def test_latex_uses_booktabs(finished):
    text = (finished.results / "tables" / "comparison.tex").read_text()
    assert r"\toprule" in text and r"\bottomrule" in text
    assert "±" not in text and "↓" not in text


def test_manifest_holds_what_made_the_results(finished):
    manifest = json.loads((finished.results / "manifest.json").read_text())
    assert manifest["config"]["name"] == "tiny"
    assert manifest["packages"]["torch"]
    assert len(manifest["runs"]) == 6
    written = {path.relative_to(finished.results) for path in finished.results.glob("tables/*")}
    assert set(map(str, written)) <= set(manifest["outputs"])
    assert 0 <= manifest["features"]["tiny-cnn"]["held_out_accuracy"] <= 1
    assert manifest["features"]["tiny-clip"]["aesthetic"]["rank_correlation_unseen"]


def test_a_folder_of_images_is_scored_as_the_floor_is(finished, experiment, tmp_path, capsys):
    """The held-out images as files have the floor's numbers; other folders are told off in a line."""
    held_out = datasets.load(experiment.data_dir()).held_out
    folder = tmp_path / "samples"
    write_images(held_out.pixels, folder)
    names = sorted(path.name for path in folder.iterdir())
    entries = [[name, int(y)] for name, y in zip(names, held_out.labels, strict=True)]
    (folder / "dataset.json").write_text(json.dumps({"labels": entries}))
    table, _ = collect(experiment)
    floor = table[table.student == "floor"].set_index("column").value.astype(float)
    found = {
        f"{r['metric']}_n{r['num_samples']}_{r['extractor']}": r["value"]
        for r in score_folder(experiment, folder)
    }
    assert set(found) == set(floor.index)
    assert all(found[name] == pytest.approx(floor[name], rel=1e-5) for name in found)
    print_folder(experiment, folder)
    assert "| fd_n359_tiny-cnn" in capsys.readouterr().out

    def refused(message):
        with pytest.raises(UserError, match=message):
            score_folder(experiment, folder)

    Image.new("RGB", (8, 8)).save(folder / names[5])
    refused(f"{names[5]} is 8 x 8 RGB, but {names[0]} is 8 x 8 grey")
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / name)
    refused("its images are 3x8x8, those of data digits 1x8x8")
    for name in names:
        (folder / name).unlink()
    refused("has no images")


def test_readme_tells_the_verdicts_of_the_reference_run():
    claims = pd.read_csv(ROOT / "results/reference/digits-claims/tables/claims.csv")
    readme = (ROOT / "README.md").read_text()
    for claim, rows in claims.groupby("claim"):
        assert [c.rsplit("_", 1)[1] for c in rows.column] == ["digits-cnn", "digits-clip"]
        assert f"| {claim} | {' | '.join(rows.verdict)} |" in readme


def test_readme_shows_the_example_that_is_tested_and_the_reference_table():
    readme = (ROOT / "README.md").read_text()
    assert (DATA / "example" / "diff_instruct.py").read_text() in readme
    table = ROOT / "results" / "reference" / "digits" / "tables" / "headline.md"
    if table.exists():
        assert table.read_text() in readme
