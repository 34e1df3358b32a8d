"""The selection of a run's best snapshot, and `harness prune`."""
# ruff: noqa: F811 -- an imported fixture is an argument of the tests

import json
from pathlib import Path
from types import SimpleNamespace

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
from tests.test_scoring import scoring  # noqa: F401

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
    with pytest.raises(UserError, match="harness prune") as error:
        score_run(scoring(**settings | {"num_samples": 50}), run, path)
    assert error.value.code == "pruned" and "\n" not in str(error.value)
    # Scores of other settings do not count.
    assert prune(scoring(**settings | {"num_samples": 50}), [(run, path)]) == 0


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
