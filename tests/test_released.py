"""Released weights as students: from stand-ins of the authors' pickles to the tables."""
# ruff: noqa: F811 -- an imported fixture is an argument of the tests

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from torch.nn.functional import interpolate

from harness.cli import main
from harness.denoiser import one_step, to_pixels
from harness.errors import UserError
from harness.evaluation import references
from harness.features.inception import InceptionExtractor
from harness.io.artifacts import load_tensors, read_json, sha256_file
from harness.io.records import ScoreRecord, StudentRecord
from harness.networks import save_denoiser
from harness.reporting.collect import collect
from harness.reporting.published.statistic import statistic_differences
from harness.reporting.published.tables import paper_table
from harness.sampling import noise_and_labels
from harness.teachers.edm_pickle import read_edm_pickle
from harness.validation import load_experiment, parse_experiment
from tests.reports import Page
from tests.test_config import problems
from tests.test_import_edm import official, write  # noqa: F401
from tests.test_verify_data import DIM, StandIn


@pytest.fixture
def released(official, tmp_path, monkeypatch) -> dict:
    """An experiment with two released students and no teacher. A small network replaces
    Inception, so no number is an FID."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(InceptionExtractor, "fetch", lambda self: tmp_path / "x.yaml")
    monkeypatch.setattr(InceptionExtractor, "load_network", lambda *arguments: StandIn())
    fast = lambda self, pixels: interpolate(pixels.float(), (299, 299))  # noqa: E731
    monkeypatch.setattr(InceptionExtractor, "inputs", fast)
    monkeypatch.setattr(references, "DIM", DIM)
    write(tmp_path / "sid.pkl", official("ncsnpp"))
    write(tmp_path / "gdd.pkl", official("ncsnpp", class_name="GDDPrecond"))
    np.savez("s.npz", mu=np.zeros(DIM), sigma=np.eye(DIM))
    return {
        "name": "released",
        "device": "cpu",
        "data": {"name": "noise", "image_shape": [3, 16, 16], "num_classes": 5},
        "features": {"inception": {"type": "inception"}},
        "students": {
            "sid-released": {"source": "sid.pkl", "method": "sid", "settings": {"alpha": 1.2}},
            "gdd-i-released": {"source": "gdd.pkl", "method": "gdd", "freeze": "innate"},
        },
        "training": {"seeds": [0, 1], "budget": [{"unit": "images", "amount": 256}]},
        "evaluation": {
            "num_samples": 40, "sampling_seeds": list(range(10)), "extractors": ["inception"],
            "main_metric": "fid-edm", "statistics": "s.npz", "grid_samples": 40, "block": 40,
        },
        "paper": {"dataset": "CIFAR-10", "conditioning": "uncond", "setting": "exact"},
    }  # fmt: skip


def run(config: dict, *command: str) -> int:
    Path("x.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    return main([*command, "--configfile", "x.yaml"])


@pytest.fixture
def scored(released) -> dict:
    assert run(released, "data") == run(released, "features", "inception") == 0
    for student in released["students"]:
        assert run(released, "import-student", student, "0") == 0
        assert run(released, "score", student, "0") == 0
    return released


def test_released_students_are_imported_scored_and_compared(scored, capsys):
    experiment = load_experiment("x.yaml")
    assert experiment.runs == [("sid-released", 0), ("gdd-i-released", 0)]  # not per training seed
    for name, file, sigma, epsilon in (
        ("sid-released", "sid.pkl", 2.5, 0.0), ("gdd-i-released", "gdd.pkl", 80.0, 0.002),
    ):  # fmt: skip
        folder, path = experiment.paths.run(name, 0), experiment.paths.scores(name, 0)
        record = StudentRecord.read(folder / "student.json")
        assert record.released == {"source": file, "sha256": sha256_file(Path(file))}
        assert record.ledger is record.stop is record.teacher is record.frozen_fraction is None
        assert read_json(folder / "model" / "denoiser.json")["epsilon"] == epsilon
        # The scored images are the network's at the method's noise level.
        scores = ScoreRecord.read(path)
        (entry,) = scores.entries
        assert scores.released and entry.final and entry.images is None
        assert {row.sample_seed for row in entry.rows} == set(range(10))
        kept = load_tensors(path.parent / scores.samples.file)["pixels"]
        z, labels = noise_and_labels(torch.arange(40), (3, 16, 16), 5, seed=0)
        with torch.no_grad():
            expected = to_pixels(one_step(read_edm_pickle(Path(file)), z, labels, sigma))
        assert torch.equal(kept, expected)
    # GDD's authors trained against networks that had seen ImageNet, as Inception has.
    assert "imagenet-1k" in record.pretraining and record.trained_against

    table = paper_table(experiment, collect(experiment)[0])
    sid = table[(table.paper == "SiD") & (table.reported == 1.923)].iloc[0]
    assert sid.setting_match == "released" and "not trained here" in sid.note
    assert sid.reproduced_is == "the mean of 10 evaluations of the authors' released weights"
    assert sid.snapshots == 1 and sid.reproduced == sid["last"]
    gdd = table[(table.paper == "GDD") & (table.reported == 1.54)].iloc[0]
    assert gdd.setting_match == "released" and gdd.difference == pytest.approx(
        float(gdd.reproduced) - 1.54, abs=0.05 * float(gdd.reproduced)
    )

    assert run(scored, "report") == 0
    root = experiment.paths.root
    text = (root / "tables" / "comparison.md").read_text()
    assert "¶ released (sid-released, gdd-i-released): the authors' released weights" in text
    assert "sid-released: released weights of sid" in text and "not trained here" in text
    assert "end of the budget" not in text and "–" in text
    metrics = pd.read_csv(root / "tables" / "metrics.csv")
    assert metrics.flag.str.contains("released").all() and metrics.images.isna().all()
    page = Page(root / "report.html")
    assert "Released weights, imported and not trained here: sid-released" in page.words
    assert "trained for" not in page.words
    assert read_json(root / "manifest.json")["runs"]["sid-released/seed0"]["released"]

    capsys.readouterr()
    for command, expected in (
        (["status"], "released weights, not trained here"),
        (["plan"], "sid-released: released weights (sid.pkl), not trained here"),
        (["summary"], "sid-released"),
        (["prune"], "gdd-i-released/seed0: released"),
    ):
        assert run(scored, *command) == 0
        assert expected in capsys.readouterr().out, command
    for command in (["train", "sid-released", "0"], ["export", "sid-released", "0", "out"]):
        assert run(scored, *command) == 2
        assert "not trained here" in capsys.readouterr().err
    assert run(scored, "report") == 0  # that was no failure of the student
    status = collect(load_experiment("x.yaml", {"evaluation": {"num_samples": 41}}), partial=True)
    assert set(status[0].status.str.split(" ").str[0]) == {"missing"}


def test_the_file_must_fit_the_settings_and_the_data(released, capsys):
    assert run(released, "data") == 0
    students = released["students"]
    students["gdd-i-released"]["source"] = "sid.pkl"  # another preconditioning
    assert run(released, "import-student", "gdd-i-released", "0") == 2
    assert "settings.epsilon: the network has 0, not 0.002" in capsys.readouterr().err
    students["gdd-i-released"]["settings"] = {"epsilon": 0.0}
    assert run(released, "import-student", "gdd-i-released", "0") == 0
    students["sid-released"]["sha256"] = "0" * 64
    assert run(released, "import-student", "sid-released", "0") == 2
    assert "sid.pkl has sha256" in capsys.readouterr().err
    del students["sid-released"]["sha256"]
    released["data"]["num_classes"] = 10
    assert run(released, "data") == 0
    assert run(released, "import-student", "sid-released", "0") == 2
    assert "student sid-released generates 3x16x16 images in 5" in capsys.readouterr().err


def test_a_students_folder_states_its_noise_level(released, capsys):
    released["students"]["sid-released"]["source"] = "folder"
    save_denoiser(read_edm_pickle(Path("sid.pkl")), Path("folder"), {"sigma_init": 80.0})
    assert run(released, "data") == 0
    assert run(released, "import-student", "sid-released", "0") == 2
    assert "settings.sigma_init: the network has 80, not 2.5" in capsys.readouterr().err
    released["students"]["sid-released"]["settings"]["sigma_init"] = 80.0
    assert run(released, "import-student", "sid-released", "0") == 0


def test_names_show_what_is_released(released, tiny):
    released["students"]["mine"] = released["students"].pop("sid-released")
    assert ("students.mine", "released-name") in [(p.key, p.code) for p in problems(released)]
    released["students"] = {"sid": {"method": "sid"}}
    assert ("teachers", "missing-key") in [(p.key, p.code) for p in problems(released)]
    tiny["students"]["my-released"] = {"method": "sid"}
    assert ("students.my-released", "reserved-name") in [(p.key, p.code) for p in problems(tiny)]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"source": "none.pkl"}, "source"),
        ({"source": "https://x.org/a.pkl"}, "sha256"),
        ({"budget": []}, "budget"),
        ({"method": "sdi"}, "method"),
        ({"settings": {"sigma": 1.0}}, "settings.sigma"),
    ],
)
def test_errors_in_a_released_student_are_reported(released, change, key):
    released["students"]["sid-released"] |= change
    assert f"students.sid-released.{key}" in [p.key for p in problems(released)]


def test_released_and_trained_students_can_be_compared(tiny, released):
    tiny["students"]["sid-released"] = released["students"]["sid-released"]
    tiny["training"]["seeds"] = [0, 1]
    experiment = parse_experiment(tiny, "x")
    assert [run for run in experiment.runs if run[0] == "sid-released"] == [("sid-released", 0)]
    assert experiment.student_run("sid-released", 0).teacher is None
    assert not experiment.exclusive
    entry = {"paper": "SiD", "method": "SiD", "dataset": "CIFAR-10", "value": 1.923}
    found = statistic_differences(experiment, "sid-released", entry)
    assert found == ["2 sampling seeds instead of 10"]  # but no selection and no grid
    with pytest.raises(UserError):
        parse_experiment(tiny | {"teachers": {}}, "x")


def test_the_workflow_imports_and_trains_nothing(empty_workspace, released):
    for file in ("sid.pkl", "gdd.pkl", "s.npz"):
        (empty_workspace.root / file).write_bytes(Path(file).read_bytes())
    empty_workspace.write_config(released)
    done = empty_workspace.snakemake("-n")
    assert done.returncode == 0, done.stdout + done.stderr
    rules = {line.split()[0] for line in done.stdout.splitlines() if line[:1].isalpha()}
    assert {"data", "features", "import_student", "score", "report"} <= rules
    assert not rules & {"train", "teacher", "score_references", "agreement", "pairs"}
