"""Tables and figures of a finished run."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from harness.data import datasets
from harness.errors import UserError
from harness.evaluation.agreement import write_images
from harness.evaluation.registry import column_name
from harness.evaluation.scorer import Scorer
from harness.evaluation.stage import print_folder, score_folder
from harness.reporting.collect import COLUMNS, SCHEMA, collect, read_metrics
from harness.reporting.figures import samples
from harness.reporting.formatting import spread_text
from harness.reporting.tables import summarise, text_table
from harness.validation import load_experiment
from tests.conftest import DATA, ROOT
from tools.readme_tables import with_tables

COLUMN = "fd_n400_tiny-cnn"


@pytest.fixture(scope="session")
def experiment(finished):
    return load(finished)


def load(workspace):
    path = workspace.root / "configs" / "tiny.yaml"
    return load_experiment(path, results=workspace.root / "results")


def test_metrics_csv_is_tidy(finished, experiment):
    table = pd.read_csv(finished.results / "tables" / "metrics.csv")
    assert tuple(table.columns) == COLUMNS
    assert (table.schema == SCHEMA).all() and (table.experiment == "tiny").all()
    keys = ["student", "seed", "snapshot", "sample_seed", "metric", "extractor", "num_samples"]
    assert not table.duplicated(keys).any()
    # Each column has one protocol.
    per_column = table.groupby(["metric", "extractor", "num_samples"]).protocol.nunique()
    assert (per_column == 1).all()
    protocols = json.loads((finished.results / "manifest.json").read_text())["protocols"]
    assert set(table.protocol) == set(protocols)
    assert set(table.reference) == {"digits-train1438"}
    assert set(table.device) == {"cpu"}
    assert "trained and scored on cpu" in (finished.results / "tables/comparison.md").read_text()


def test_the_last_snapshot_has_all_sampling_seeds_and_the_others_the_first(experiment):
    table, protocols = collect(experiment)
    runs = table[table.seed.notna()]
    seeds = runs.groupby("final").sample_seed.unique().map(sorted)
    assert seeds[True] == [0, 1] and seeds[False] == [0]
    assert sorted(table[table.student == "teacher"].sample_seed.unique()) == [0, 1]
    assert table[table.student == "floor"].sample_seed.isna().all()
    assert all(p["sampling_seeds"] == [0, 1] for p in protocols.values())
    # Sampling seeds give different scores, and the leave-out estimates are around each.
    fd = runs[runs.final & (runs.student == "sid") & (runs.column == COLUMN)]
    assert fd.value.nunique() == 2
    for value, left in zip(fd.value, fd.leave_out, strict=True):
        assert len(left) == 10 and min(left) < 1.1 * value and max(left) > value
    recall = runs[runs.metric == "recall"]
    assert recall[recall.num_samples == 400].leave_out.map(len).max() == 0


def test_a_score_file_of_another_format_is_rejected(workspace):
    experiment = load(workspace)
    path = experiment.paths.scores("sid", 0)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1}))
    assert code_of(collect, experiment) == "format"
    partial, _ = collect(experiment, partial=True)
    assert partial[partial.student == "sid"].status.str.startswith("missing").all()


def test_a_metrics_csv_of_another_schema_is_rejected(workspace):
    csv = workspace.results / "tables" / "metrics.csv"
    assert tuple(read_metrics(csv).columns) == COLUMNS
    text = csv.read_text()
    for changed, code in (
        (text.replace(f"\n{SCHEMA},", "\n1,"), "schema"),
        (text.replace("schema,", "", 1), "schema"),
        (text.replace("sample_seed", "seeds", 1), "damaged"),
        ("", "damaged"),
    ):
        csv.write_text(changed)
        assert code_of(read_metrics, csv) == code


def code_of(function, *arguments) -> str:
    with pytest.raises(UserError) as error:
        function(*arguments)
    assert "\n" not in str(error.value)
    return error.value.code


def test_reference_rows(finished):
    table = pd.read_csv(finished.results / "tables" / "metrics.csv")
    nfe = table.groupby("student").nfe.unique()
    assert list(nfe["teacher"]) == [7] and list(nfe["teacher-1step"]) == [1]
    floor = table[table.student == "floor"]
    assert set(floor.num_samples) == {359}  # the held-out part
    for name in ("teacher", "teacher-1step", "sid"):
        assert set(table[table.student == name].num_samples) == {359, 400}
    accuracy = floor[(floor.metric == "accuracy") & (floor.extractor == "tiny-cnn")].value.item()
    record = json.loads((finished.results / "features/tiny-cnn/features.json").read_text())
    assert accuracy == pytest.approx(100 * record["held_out_accuracy"])


def test_untrained_teacher_is_named_in_the_notes(finished):
    """The tiny teacher's class accuracy is 11% with ten classes."""
    notes = (finished.results / "tables" / "comparison.md").read_text()
    assert "* Warning: teacher edm is near chance: tiny-cnn" in notes


def test_every_row_has_its_nearest_training_images(experiment):
    train = datasets.load(experiment.paths.data).train.pixels.numpy()
    train = {image.tobytes() for image in train}
    kept = samples.read_samples(experiment, collect(experiment)[0])
    neighbours, description = samples.nearest_neighbours(kept)
    assert list(neighbours) == ["floor", "teacher", *experiment.students]
    assert description == (
        "nearest of 1,438 training images in the features of tiny-cnn; its distance, as a multiple "
        "of the held-out median"
    )
    for name, row in neighbours.items():
        assert row.images.shape == row.training.shape == (10, 1, 8, 8), name
        assert (np.diff(row.distance) >= 0).all() and row.distance[0] < 1, name
        assert {image.tobytes() for image in row.training} <= train, name
    assert not {image.tobytes() for image in neighbours["floor"].images} & train


def test_summary_is_mean_and_std_of_the_scores(experiment):
    table, _ = collect(experiment)
    second = table[table.student == "sid"]
    second = second.assign(seed=second.seed + 1, value=second.value + 2.0)
    summary = summarise(experiment, pd.concat([table, second]))
    rows = summary.scores[summary.scores.column == COLUMN].set_index("student")
    values = table[table.final & (table.student == "sid") & (table.column == COLUMN)].value
    values = values.astype(float)
    assert rows["mean"]["sid"] == pytest.approx(values.mean() + 1)
    assert rows["std"]["sid"] == pytest.approx(2**0.5) and pd.isna(rows["std"]["sim"])
    assert rows.sampling_std["sid"] == pytest.approx(values.std())
    assert rows.best["sid"] == pytest.approx(values.min() + 1)
    recall = summary.scores[summary.scores.metric == "recall"]
    assert recall.best.isna().all()
    assert rows["rank"]["sid"] == "not ranked" and pd.isna(rows["rank"]["teacher"])
    text = text_table(summary, summary.main)
    assert text[f"{COLUMN} best of 2"]["teacher"] != "–"
    assert text[f"{COLUMN} rank"]["sid"] == "not ranked"
    students = summary.students.set_index("student")
    assert students.images["sid"] == 160
    assert students.frozen["gdd-i"] > 0.5 and students.frozen["gdd"] == 0
    assert students.data_free["gdd"] == "no" and students.data_free["sid"] == "yes"
    note = next(n for n in summary.notes if n.startswith("gdd-i:"))
    assert "frozen" in note and "r1_every 4" in note


def test_networks_that_a_student_was_trained_against_are_flagged(experiment):
    scorer = Scorer(experiment.scoring())
    held_out = scorer.dataset.held_out
    blocks = iter([(held_out.pixels, held_out.labels)])
    rows = scorer.score(blocks, [359], trained_against=["tiny-cnn"]).rows
    flags = {row.extractor: row.flag for row in rows}
    assert flags == {"tiny-cnn": "trained-on-extractor", "tiny-clip": ""}


def test_scores_of_other_weights_are_rejected(workspace):
    experiment = load(workspace)
    path = experiment.paths.scores("sid", 0)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"weights": "0" * 64}))
    assert code_of(collect, experiment) == "missing-scores"


def test_mixed_protocols_are_rejected(workspace):
    experiment = load(workspace)
    path = experiment.paths.scores("sid", 0)
    score = json.loads(path.read_text())
    row = score["entries"][0]["rows"][0]
    score["protocols"]["f" * 16] = score["protocols"][row["protocol"]]
    row["protocol"] = "f" * 16
    path.write_text(json.dumps(score))
    assert code_of(collect, experiment) == "mixed-protocols"


@pytest.mark.parametrize(
    ("value", "std", "text"),
    [(3.14159, None, "3.14"), (42.6, 1.26, "42.6 ± 1.3"), (0.00123, 0.0004, "0.00123 ± 0.00040"),
     (None, None, "–"), (1234.5, 10.4, "1234 ± 10")],
)  # fmt: skip
def test_values_are_rounded_with_their_spread(value, std, text):
    assert spread_text(value, std) == text


def test_latex_uses_booktabs(finished):
    text = (finished.results / "tables" / "comparison.tex").read_text()
    assert r"\toprule" in text and r"\bottomrule" in text
    assert "±" not in text and "↓" not in text


def test_manifest_lists_inputs_and_outputs(finished):
    manifest = json.loads((finished.results / "manifest.json").read_text())
    assert manifest["config"]["name"] == "tiny"
    assert manifest["packages"]["torch"]
    assert len(manifest["runs"]) == 6
    written = {path.relative_to(finished.results) for path in finished.results.glob("tables/*")}
    assert set(map(str, written)) <= set(manifest["outputs"])
    assert 0 <= manifest["features"]["tiny-cnn"]["held_out_accuracy"] <= 1
    assert manifest["features"]["tiny-clip"]["aesthetic"]["rank_correlation_unseen"]


def test_a_folder_of_images_is_scored_like_the_floor(experiment, tmp_path, capsys):
    """The held-out images as files have the floor's scores; invalid folders are rejected."""
    held_out = datasets.load(experiment.paths.data).held_out
    folder, scoring = tmp_path / "samples", experiment.scoring()
    write_images(held_out.pixels, folder)
    names = sorted(path.name for path in folder.iterdir())
    entries = [[name, int(y)] for name, y in zip(names, held_out.labels, strict=True)]
    (folder / "dataset.json").write_text(json.dumps({"labels": entries}))
    table, _ = collect(experiment)
    floor = table[table.student == "floor"].set_index("column").value.astype(float)
    scores = {
        column_name(row.metric, row.num_samples, row.extractor): row.value
        for row in score_folder(scoring, folder)
    }
    assert set(scores) == set(floor.index)
    # fd-inf is of subsets, which depend on the order.
    compared = [name for name in scores if not name.startswith("fd-inf_")]
    assert all(scores[name] == pytest.approx(floor[name], rel=1e-5) for name in compared)
    print_folder(scoring, folder)
    assert "| fd_n359_tiny-cnn" in capsys.readouterr().out
    Image.new("RGB", (8, 8)).save(folder / names[5])
    code_of(score_folder, scoring, folder)
    for name in names:
        Image.new("RGB", (8, 8)).save(folder / name)
    code_of(score_folder, scoring, folder)
    for name in names:
        (folder / name).unlink()
    code_of(score_folder, scoring, folder)


def test_readme_has_the_tables_of_the_reference_results():
    readme = (ROOT / "README.md").read_text()
    assert with_tables(readme) == readme
    # A table with another number is replaced.
    number = re.search(r"^\| dmd .*?\| ([\d.]+ ± [\d.]+)", readme, re.MULTILINE)[1]
    other = readme.replace(number, "9" * len(number)).replace("| contradicted |", "| supported |")
    assert other != readme and with_tables(other) == readme


def test_readme_has_the_tested_example():
    assert (DATA / "example" / "diff_instruct.py").read_text() in (ROOT / "README.md").read_text()
