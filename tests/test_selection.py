"""The selection of a run's best snapshot, and `harness prune`."""
# ruff: noqa: F811 -- an imported fixture is an argument of the tests

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from harness.errors import UserError
from harness.evaluation import stage
from harness.evaluation.fingerprints import fingerprint
from harness.evaluation.prune import prune
from harness.evaluation.selection import Criterion, best, criterion, scores_of
from harness.evaluation.stage import score_run
from harness.io.artifacts import digest, write_json
from harness.io.records import ScoreRecord, StudentRecord, TeacherRecord
from harness.networks import WEIGHTS, save_denoiser
from harness.reporting.collect import _score_rows
from harness.reporting.figures.quality import curves
from harness.reporting.tables import summarise, text_table, to_markdown, wide
from harness.validation import parse_experiment
from tests.reports import tidy_table
from tests.test_config import problems, put
from tests.test_denoiser import tiny_denoiser
from tests.test_scoring import DIM, scoring  # noqa: F401

SETTINGS = {"num_samples": 60, "sampling_seeds": [0, 1], "block": 32, "grid_samples": 4}
SELECT = SETTINGS | {"selection_seed": 7}


@pytest.fixture
def job(tmp_path):
    """A function that writes a run with one snapshot for each scale of the network's weights."""

    def make(*scales: float) -> SimpleNamespace:
        folder, teacher, snapshots = tmp_path / "run", tmp_path / "teacher", []
        for step, scale in enumerate(scales, 1):
            denoiser = tiny_denoiser()
            with torch.no_grad():
                for parameter in denoiser.parameters():
                    parameter.mul_(scale)
            name = f"images-{step}"
            path = folder / "snapshots" / name
            sha256 = save_denoiser(denoiser, path, {"sigma_init": 2.5})
            ledger = {"images": step, "flops": step}
            record = {"name": name, "sha256": sha256, "step": step, "before": {}, "ledger": ledger}
            snapshots.append(record | {"grid": ["images"]})
            write_json(path / "snapshot.json", record)
        run = SimpleNamespace(
            name="sid/seed0", folder=folder, teacher=teacher, student=SimpleNamespace(name="sid"),
            seed=0, fingerprint={"a": 1}, budget=[],
        )  # fmt: skip
        facts = {"student": "sid", "seed": 0, "method": "sid", "sha256": snapshots[-1]["sha256"]}
        StudentRecord(
            **facts, fingerprint=digest([{"a": 1}, []]), experiment="x", paper="p", data_free=True,
            deviations=[], settings={}, changed_settings={}, freeze="none", teacher="edm",
            trained_against=[], pretraining=[], device="cpu", processes=1, nfe=1, parameters=1,
            frozen_fraction=0.0, inputs={}, snapshots=snapshots, contended=False,
        ).write(folder / "student.json")  # fmt: skip
        TeacherRecord(teacher="edm", sha256="0", fingerprint="0", parameters=1).write(
            teacher / "teacher.json"
        )
        return run

    return make


def score(scoring, run, path: Path) -> ScoreRecord:
    score_run(scoring, run, path)
    return ScoreRecord.read(path)


def test_the_best_snapshot_is_selected_by_other_noise(scoring, job, tmp_path):
    run, made = job(1.0, 0.2, 0.6, 0.1), scoring(**SELECT, main_metric="fid-edm")
    record = score(made, run, tmp_path / "scores.json")
    *looked, selected, last = record.entries
    assert [entry.snapshot for entry in looked] == [f"images-{k}" for k in (1, 2, 3, 4)]
    for entry in looked:
        assert entry.selection and not entry.final and entry.selected is None
        (row,) = entry.rows
        assert (row.metric, row.extractor, row.num_samples) == ("fid-edm", "inception", 60)
        assert row.sample_seed == 7
    values = {entry.snapshot: entry.rows[0].value for entry in looked}
    assert selected.snapshot == min(values, key=values.get) != last.snapshot == "images-4"
    assert selected.selected == 4 and not selected.final and last.final and last.selected is None
    for entry in (selected, last):
        assert {row.sample_seed for row in entry.rows} == {0, 1}
        assert {row.extractor for row in entry.rows} == {"cnn", "inception"}
    # The reported numbers are those of scores without a selection, in the same protocols.
    plain = score(scoring(**SETTINGS, main_metric="fid-edm"), run, tmp_path / "plain.json")
    assert [entry.selection for entry in plain.entries] == [None] * 4
    assert plain.entries[-1] == last and plain.protocols == record.protocols
    rows = [row for row in selected.rows if row.metric == "fid-edm"]
    same = [row for row in plain.entries[int(selected.snapshot[-1]) - 1].rows if row in rows]
    assert rows == same
    flags = pd.DataFrame(_score_rows(record, {None: "sid"})).groupby("snapshot").flag.unique()
    assert set(flags[selected.snapshot]) == {"selection", "selected-among-4"}
    assert set(flags["images-4"]) == {"selection", ""}


def test_the_last_snapshot_can_be_the_best(scoring, job, tmp_path):
    run = job(0.1, 1.0)
    made = scoring(**SELECT)
    values = scores_of(score(made, run, tmp_path / "s.json").entries[:2], criterion(made))
    worst = max(values, key=values.get)
    run = job(1.0, 0.1) if worst == "images-2" else job(0.1, 1.0)
    *looked, last = score(made, run, tmp_path / "s.json").entries
    assert len(looked) == 2 and last.final and last.selected == 2 and len(last.rows) > 2


def test_one_snapshot_is_selected_without_a_comparison(scoring, job, tmp_path):
    (entry,) = score(scoring(**SELECT), job(1.0), tmp_path / "s.json").entries
    assert entry.final and entry.selected == 1 and {r.sample_seed for r in entry.rows} == {0, 1}


def test_equal_snapshots_tie_for_the_first(scoring, job, tmp_path):
    record = score(scoring(**SELECT), job(0.3, 0.3, 0.3), tmp_path / "s.json")
    assert [e.snapshot for e in record.entries if e.selected] == ["images-1"]
    chosen = criterion(scoring(**SELECT, main_metric="accuracy"))
    assert chosen.key == ("cnn", "accuracy", 60)
    assert best({"a": 1.0, "b": 2.0, "c": 2.0}, chosen) == "b"


def test_interrupted_selection_scores_nothing_twice(scoring, job, tmp_path, monkeypatch):
    run, made, path = job(1.0, 0.2, 0.6, 0.1), scoring(**SELECT), tmp_path / "scores.json"
    whole = score(made, run, tmp_path / "whole.json")
    sampled, original = [], stage.sample

    def sample(*arguments, **options):
        if len(sampled) == 3:
            raise KeyboardInterrupt
        sampled.append(arguments[4])
        yield from original(*arguments, **options)

    monkeypatch.setattr(stage, "sample", sample)
    with pytest.raises(KeyboardInterrupt):
        score_run(made, run, path)
    assert sampled == [7, 7, 7] and len(list(path.with_suffix(".parts").glob("*.json"))) == 3
    sampled.clear()
    monkeypatch.setattr(stage, "sample", lambda *a, **k: sampled.append(a[4]) or original(*a, **k))
    again = score(made, run, path)
    assert sampled == [7, 0, 1, 0, 1]
    assert again.entries == whole.entries and not path.with_suffix(".parts").exists()


def test_an_unavailable_network_cannot_select(scoring, job, tmp_path, monkeypatch):
    made = scoring(
        facts={"inception": {"unavailable": "no weights"}}, **SELECT, main_metric="fid-edm"
    )
    monkeypatch.setattr(stage, "sample", None)
    with pytest.raises(UserError, match=r"evaluation\.selection_seed") as error:
        score_run(made, job(1.0, 0.2), tmp_path / "s.json")
    assert error.value.code == "unavailable"


def test_changed_statistics_are_not_mixed_with_an_interrupted_selection(
    scoring, job, tmp_path, monkeypatch, sampled
):
    """Their path is the same; what counts is their content."""
    file, path = tmp_path / "s.npz", tmp_path / "scores.json"
    settings = SELECT | {"statistics": str(file), "main_metric": "fid-edm"}
    run = job(1.0, 0.2)
    for mean in (0, 1):
        np.savez(file, mu=np.full(DIM, mean), sigma=np.eye(DIM))
        sampled.clear()
        with monkeypatch.context() as context:  # interrupted after the selection
            context.setattr(stage.ScoreFile, "add", None)
            with pytest.raises(TypeError):
                score_run(scoring(**settings), run, path)
        assert sampled == [7, 7]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"main_metric": "fd"}, "no-criterion"),  # the statistics are Inception's
        ({"main_metric": "fid-edm"}, None),
        ({"main_metric": "fd-inf", "extractors": ["inception"]}, "no-criterion"),
        ({"main_metric": "fd-inf", "extractors": ["inception"], "num_samples": 20_480}, None),
    ],
)
def test_a_selection_without_a_reference_or_enough_samples_is_refused(tiny, change, code):
    """Before any work: there would be no number to compare snapshots by."""
    tiny["data"] = {"name": "noise", "image_shape": [3, 16, 16], "num_classes": 5}
    clip = {"type": "open-clip", "model": "ViT-L-14-quickgelu"}
    tiny["features"] = {"clip": clip, "inception": {"type": "inception"}}
    tiny["evaluation"] = {
        "extractors": ["clip", "inception"], "statistics": "s.npz", "selection_seed": 7,
        "num_samples": 400, "sampling_seeds": [0],
    } | change  # fmt: skip
    found = [p.code for p in problems(tiny) if p.key == "evaluation.selection_seed"]
    assert found == ([code] if code else [])


def test_a_selection_without_a_number_is_an_error_before_samples(scoring, job, tmp_path, sampled):
    made = scoring(**SELECT, main_metric="fd-inf")  # 6 features need 60 samples
    assert score(made, job(1.0, 0.2), tmp_path / "s.json").entries
    sampled.clear()
    made = scoring(**SELECT | {"num_samples": 50}, main_metric="fd-inf")
    with pytest.raises(UserError, match="needs 60 samples") as error:
        score_run(made, job(1.0, 0.2), tmp_path / "t.json")
    assert error.value.code == "unavailable" and not sampled
    clip = {"type": "open-clip", "model": "ViT-L-14-quickgelu", "aesthetic": ["v1"]}
    missing = {"clip": {"missing": {"aesthetic_v1": "no weights"}}}
    made = scoring({"clip": clip}, missing, **SELECT, main_metric="aesthetic-v1")
    with pytest.raises(UserError, match="aesthetic-v1 in clip") as error:
        score_run(made, job(1.0, 0.2), tmp_path / "u.json")
    assert error.value.code == "unavailable" and not sampled


def test_selection_settings_are_checked(tiny):
    put(tiny, "evaluation.selection_seed", 1)
    found = [(p.key, p.code) for p in problems(tiny)]
    assert ("evaluation.selection_seed", "duplicate") in found  # of sampling_seeds [0, 1]
    assert ("evaluation.snapshot_seeds", "conflict") in found


@pytest.mark.parametrize(
    ("grid", "code"),
    [
        ({"every": 64, "first": 64}, "invalid-value"),
        ({"every": 64, "per_octave": 2}, "invalid-value"),
        ({"evry": 64}, "unknown-key"),
        ({}, "invalid-value"),
    ],
)
def test_a_grid_is_linear_or_logarithmic(tiny, grid, code):
    put(tiny, "students.sid.snapshots", {"images": grid})
    (problem,) = problems(tiny)
    assert problem.key.startswith("students.sid.snapshots.images") and problem.code == code


def test_students_have_grids_of_their_own(tiny):
    before = parse_experiment(tiny, "x")
    put(tiny, "students.sid.snapshots", {"images": {"every": 64}})
    after = parse_experiment(tiny, "x")
    assert before.run_fingerprint("sid", 0)["snapshots"] == {
        "images": {"first": 64.0, "per_octave": 1.0}
    }
    assert after.run_fingerprint("sid", 0)["snapshots"] == {"images": {"every": 64.0}}
    assert before.run_fingerprint("sim", 0) == after.run_fingerprint("sim", 0)
    put(tiny, "students.sid.snapshots", {})
    assert parse_experiment(tiny, "x").run_fingerprint("sid", 0)["snapshots"] == {}


# -- the tables ---------------------------------------------------------------------------------


def test_tables_show_the_selected_snapshot_beside_the_last(tiny, tmp_path):
    tiny["students"] = {name: {"method": "sid"} for name in ("s1", "s2")}
    tiny["training"]["seeds"] = [0, 1]
    tiny["evaluation"] |= {"selection_seed": 7}
    del tiny["evaluation"]["snapshot_seeds"]
    experiment = parse_experiment(tiny, "x", tmp_path)
    last = tidy_table(experiment, {("fd", "tiny-cnn"): {"s1": [2.0, 4.0], "s2": [5.0, 5.0]}})
    rows = last[last.student == "s1"]
    looked = rows[rows.sample_seed == 0].assign(sample_seed=7, final=False, flag="selection")
    selected = rows.assign(
        value=rows.value - 1, snapshot="best", images=80, final=False, selected=20,
        flag="selected-among-20",
    )  # fmt: skip
    earlier = looked.assign(value=9.0, snapshot="best", images=80)
    table = pd.concat([last, looked, selected, earlier], ignore_index=True)
    plain, summary = summarise(experiment, last), summarise(experiment, table)
    assert plain.selected.empty and not any("selected" in name for name in wide(plain))
    assert plain.scores.equals(summary.scores) and plain.pairs.equals(summary.pairs)
    column = "fd_n400_tiny-cnn"
    first = wide(summary).set_index("student").loc["s1"]
    assert (first[f"{column}_selected"], first[f"{column}_selected_among"]) == (2.0, "20")
    text = text_table(summary, [column])
    assert text.loc["s1", f"{column} selected"] == "2.00 ± 1.41 (of 20)"
    assert text.loc["s2", f"{column} selected"] == "–"
    assert "s1 seed 1: best" in to_markdown(summary, "title")
    # The curve has the selection's noise before the last point.
    points = curves(experiment, table, "images", column)
    points = points[points.student == "s1"]
    assert list(points.x) == [80.0, 160.0] and list(points["mean"]) == [9.0, 3.0]


# -- pruning ------------------------------------------------------------------------------------


def weights(run) -> list[str]:
    return sorted(path.parent.name for path in run.folder.glob(f"snapshots/*/{WEIGHTS}"))


@pytest.mark.parametrize("settings", [SELECT, SETTINGS])
def test_prune_keeps_the_best_and_the_last(scoring, job, tmp_path, capsys, settings):
    """Without a selection seed, the best is that with the best mean of the reported scores."""
    run, made, path = job(1.0, 0.2, 0.6, 0.1), scoring(**settings), tmp_path / "scores.json"
    unscored = run.folder / "snapshots" / "images-9"
    save_denoiser(tiny_denoiser(), unscored)
    assert prune(made, [(run, path)]) == 0 and len(weights(run)) == 5
    assert "sid/seed0: not finished and scored" in capsys.readouterr().out
    record = score(made, run, path)
    values = scores_of((e for e in record.entries if e.selected is None), criterion(made))
    kept = {min(values, key=values.get), "images-4", "images-9"}
    size = (unscored / WEIGHTS).stat().st_size
    expected = (5 - len(kept)) * size
    assert prune(made, [(run, path)], dry_run=True) == expected and len(weights(run)) == 5
    assert f"would free {expected / 1e3:.3g} kB ({expected:,} bytes)" in capsys.readouterr().out
    assert prune(made, [(run, path)]) == expected > 0
    assert set(weights(run)) == kept
    assert prune(made, [(run, path)]) == 0
    # The records remain, so the run and its scores are still current.
    assert all((p / "snapshot.json").exists() for p in run.folder.glob("snapshots/images-[1-4]"))
    assert ScoreRecord.read(path) == record
    # Scores of other settings do not count.
    assert prune(scoring(**settings | {"num_samples": 50}), [(run, path)]) == 0


@pytest.fixture
def pruned(scoring, job, tmp_path):
    """A function that scores and prunes a run with these settings: the run, its score file and the
    record. The score file is deleted then, as Snakemake does before it scores again."""

    def make(**settings) -> tuple[SimpleNamespace, Path, ScoreRecord]:
        run, path = job(1.0, 0.2, 0.6, 0.1), tmp_path / "scores.json"
        made = scoring(**settings)
        record = score(made, run, path)
        assert prune(made, [(run, path)]) > 0
        path.unlink()
        return run, path, record

    return make


@pytest.fixture
def sampled(monkeypatch) -> list[int]:
    """The sampling seeds of all streams of samples."""
    seeds, original = [], stage.sample
    monkeypatch.setattr(stage, "sample", lambda *a, **k: seeds.append(a[4]) or original(*a, **k))
    return seeds


@pytest.mark.parametrize("settings", [SELECT, SETTINGS])
def test_a_pruned_run_is_scored_again_with_the_same_numbers(scoring, pruned, sampled, settings):
    run, path, record = pruned(**settings)
    sampled.clear()
    assert score(scoring(**settings), run, path) == record
    assert sampled == [0, 1, 0, 1]  # the kept snapshots only
    assert prune(scoring(**settings), [(run, path)]) == 0


def test_a_pruned_run_can_be_scored_with_more_seeds(scoring, pruned, sampled):
    """The rows that selected keep their values, and get the protocol of the new numbers."""
    run, path, before = pruned(**SELECT)
    sampled.clear()
    after = score(scoring(**SELECT | {"sampling_seeds": [0, 1, 2]}), run, path)
    assert sampled == [0, 1, 2] * 2
    values, again = (
        {e.snapshot: e.rows[0].value for e in record.entries if e.selection}
        for record in (before, after)
    )
    assert values == again and len(values) == 4
    assert [e.selected for e in after.entries if e.selected] == [4]
    rows = [row for entry in after.entries for row in entry.rows]
    columns = {(row.metric, row.extractor, row.num_samples) for row in rows}
    assert {row.protocol for row in rows} == {*after.protocols}
    assert len(after.protocols) == len(columns)
    assert not {*before.protocols} & {*after.protocols}


def test_an_extended_run_compares_pruned_snapshots(scoring, pruned, job, sampled):
    run, path, before = pruned(**SELECT)
    removed = {f"images-{k}" for k in range(1, 5)} - {*weights(run)}
    run = job(1.0, 0.2, 0.6, 0.1, 0.05)  # writes all weights
    for name in removed:
        (run.folder / "snapshots" / name / WEIGHTS).unlink()
    sampled.clear()
    after = score(scoring(**SELECT), run, path)
    assert sampled[0] == 7 and sampled.count(7) == 1  # only the new snapshot is new
    looked = [e for e in after.entries if e.selection]
    assert looked[:4] == [e for e in before.entries if e.selection] and len(looked) == 5
    assert [e.selected for e in after.entries if e.selected] == [5]


@pytest.mark.parametrize("change", ["num_samples", "selection_seed", "statistics"])
def test_a_selection_that_needs_pruned_weights_is_refused(
    scoring, pruned, tmp_path, monkeypatch, sampled, change
):
    """It is refused before anything is sampled, or where settings show it, loaded."""
    file = tmp_path / "s.npz"
    np.savez(file, mu=np.zeros(DIM), sigma=np.eye(DIM))
    settings = SELECT | {"statistics": str(file), "main_metric": "fid-edm"}
    run, path, record = pruned(**settings)
    sampled.clear()
    with monkeypatch.context() as context:
        if change == "statistics":
            np.savez(file, mu=np.ones(DIM), sigma=np.eye(DIM))
        else:
            context.setattr(stage, "ScoreFile", None)
        changed = settings if change == "statistics" else settings | {change: 50}
        with pytest.raises(UserError, match=r"evaluation\.selection_seed") as error:
            score_run(scoring(**changed), run, path)
    assert error.value.code == "pruned" and "\n" not in str(error.value) and not sampled
    np.savez(file, mu=np.zeros(DIM), sigma=np.eye(DIM))
    assert score(scoring(**settings), run, path) == record
    # Without a selection, the remaining snapshots can be scored.
    del settings["selection_seed"]
    entries = score(scoring(**settings | {"num_samples": 50}), run, path).entries
    assert [entry.snapshot for entry in entries] == weights(run)


def test_pruned_snapshots_keep_the_scores_that_a_change_leaves_valid(scoring, pruned, caplog):
    run, path, before = pruned(**SETTINGS)
    assert not [m for m in caplog.messages if "have no weights" in m]
    types = {"cnn": {"type": "cnn", "images": 1}, "inception": {"type": "inception"}}
    types["more"] = {"type": "cnn", "images": 1}
    after = score(scoring(types, **SETTINGS), run, path)
    assert [m for m in caplog.messages if "2 of 4 snapshots have no weights" in m]
    assert [e.snapshot for e in after.entries] == [e.snapshot for e in before.entries]
    for old, new in zip(before.entries, after.entries, strict=True):
        assert [row for row in new.rows if row.extractor != "more"] == old.rows
        has_weights = new.snapshot in weights(run)
        assert any(row.extractor == "more" for row in new.rows) == has_weights
    caplog.clear()
    other = score(scoring(**SETTINGS | {"num_samples": 50}), run, path)
    assert [entry.snapshot for entry in other.entries] == weights(run)


def test_snapshots_without_weights_and_scores_are_refused(scoring, pruned):
    run, path, _ = pruned(**SETTINGS)
    for file in run.folder.glob("snapshots/*/scores.json"):
        file.unlink()
    with pytest.raises(UserError, match="have no weights") as error:
        score_run(scoring(**SETTINGS), run, path)
    assert error.value.code == "pruned" and "\n" not in str(error.value)


def test_prune_goes_on_after_an_unreadable_record(scoring, job, tmp_path, capsys):
    run, made, path = job(1.0, 0.2, 0.6, 0.1), scoring(**SELECT), tmp_path / "scores.json"
    score_run(made, run, path)
    old = SimpleNamespace(**vars(run) | {"folder": tmp_path / "old", "name": "sid/seed1"})
    write_json(old.folder / "student.json", {"format": 0})
    with pytest.raises(UserError, match="skipped sid/seed1") as error:
        prune(made, [(old, path), (run, path)])
    output = capsys.readouterr().out
    assert error.value.code == "skipped" and len(weights(run)) == 2
    assert "sid/seed1: skipped: " in output and "sid/seed0: freed" in output


def test_prune_needs_scores_of_the_current_weights(scoring, job, tmp_path):
    run, made, path = job(1.0, 0.2, 0.6), scoring(**SELECT), tmp_path / "scores.json"
    score_run(made, run, path)
    content = json.loads(path.read_text())
    assert content["fingerprint"] == digest(fingerprint(made))
    path.write_text(json.dumps(content | {"weights": "0" * 64}))
    assert prune(made, [(run, path)]) == 0
    path.write_text(json.dumps(content))
    run.budget = [{"unit": "images", "amount": 5}]
    assert prune(made, [(run, path)]) == 0 and len(weights(run)) == 3


def test_a_criterion_compares_extractor_metric_and_count(scoring):
    chosen = criterion(scoring(**SELECT, main_metric="fid-edm"))
    assert isinstance(chosen, Criterion) and chosen.key == ("inception", "fid-edm", 60)
