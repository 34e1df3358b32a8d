"""Released weights as students: from stand-ins of the authors' pickles to the tables."""
# ruff: noqa: F811 -- an imported fixture is an argument of the tests

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from torch.nn.functional import interpolate

from harness.cli import main
from harness.denoiser import one_step, to_pixels
from harness.errors import ConfigError, UserError
from harness.evaluation import references
from harness.features.inception import InceptionExtractor
from harness.io.artifacts import load_tensors, read_json, sha256_file
from harness.io.records import ScoreRecord, StudentRecord
from harness.networks import WEIGHTS, save_denoiser
from harness.reporting.collect import collect
from harness.reporting.published import match
from harness.reporting.published import released as gates
from harness.reporting.published.match import published
from harness.reporting.published.statistic import statistic_differences
from harness.reporting.published.tables import paper_table
from harness.sampling import noise_and_labels
from harness.teachers.edm_pickle import read_edm_pickle
from harness.validation import load_experiment, parse_experiment
from tests.conftest import ROOT
from tests.reports import Page
from tests.test_config import problems, put
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
    assert f"sha256 {sha256_file(Path('sid.pkl'))}" in sid.note
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


def test_only_folders_of_import_edm_are_released_weights(released, capsys):
    """A folder states the pickle of its weights, which the tables name; others could be anything,
    such as a student that was trained here."""
    student = released["students"]["sid-released"]
    student["source"] = "folder"
    save_denoiser(read_edm_pickle(Path("sid.pkl")), Path("folder"), {"sigma_init": 2.5})
    (problem,) = problems(released)
    assert (problem.key, problem.code) == ("students.sid-released.source", "not-imported")
    shutil.rmtree("folder")
    assert main(["import-edm", "sid.pkl", "folder"]) == run(released, "data") == 0
    assert run(released, "import-student", "sid-released", "0") == 0
    record = StudentRecord.read(Path("results/released/students/sid-released/seed0/student.json"))
    sha256 = sha256_file(Path("sid.pkl"))
    assert record.released == {"source": "folder", "sha256": sha256}
    for expected, status in ((sha256, 0), ("0" * 64, 2)):
        student["sha256"] = expected
        assert run(released, "import-student", "sid-released", "0") == status
    assert f"folder is from a pickle with sha256 {sha256}" in capsys.readouterr().err
    del student["sha256"]
    with open(Path("folder") / WEIGHTS, "ab") as file:
        file.write(b" ")
    assert run(released, "import-student", "sid-released", "0") == 2
    assert "folder/diffusion_pytorch_model.safetensors is damaged" in capsys.readouterr().err


@pytest.fixture
def gate(released, monkeypatch):
    """A function that runs the gate on SiD's stand-in, and one that sets its published FID."""
    numbers = [e for e in published() if (e["paper"], e["dataset"]) == ("SiD", "CIFAR-10")]
    numbers = [e for e in numbers if e["conditioning"] == "uncond"]
    monkeypatch.setattr(match, "published", lambda: numbers)
    monkeypatch.setattr(gates, "SAMPLES", 40)
    Path("s.npz").rename("cifar10-32x32.npz")
    del released["students"]["gdd-i-released"]
    changes = {"statistics": "cifar10-32x32.npz", "sampling_seeds": [0, 1]}
    released["evaluation"] |= changes

    def publish(value: float) -> None:
        numbers[:] = [e | {"value": value} for e in numbers if e["value"] == numbers[0]["value"]]

    return lambda: run(released, "verify-released"), publish


def measured(output: str) -> float:
    return float(re.search(r"sid-released: FID ([\d.]+)", output)[1])


def test_the_gate_of_released_students(released, gate, monkeypatch, capsys):
    """One command from nothing; then nothing is made again, until a file changes."""
    verify, publish = gate
    assert verify() == 2  # the stand-in does not have SiD's FID
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 1 and "1 of 1 released students differ" in output.err
    assert "the mean of 2 evaluations of the authors' released weights" in output.out
    assert "reported 1.923 (SiD, README (= paper best)), tolerance 0.045: differs" in output.out
    assert sha256_file(Path("sid.pkl")) in output.out
    publish(measured(output.out))
    with monkeypatch.context() as context:
        stages = ("data.datasets.prepare", "features.base.make_features")
        stages += ("students.released.import_student", "evaluation.stage.score_run")
        for name in stages:
            context.setattr(f"harness.{name}", None)
        assert verify() == 0
    assert "agrees (sha256" in capsys.readouterr().out
    # Wrong statistics under the same name.
    np.savez("cifar10-32x32.npz", mu=np.full(DIM, 9.0), sigma=np.eye(DIM))
    assert verify() == 2
    assert "differs" in capsys.readouterr().out
    np.savez("cifar10-32x32.npz", mu=np.zeros(DIM), sigma=np.eye(DIM))
    assert verify() == 0
    # Another network under the same name.
    shutil.copy("gdd.pkl", "sid.pkl")
    assert verify() == 2
    assert "settings.epsilon" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("evaluation.num_samples", 41, ("evaluation.num_samples", "samples")),
        ("evaluation.tf32", True, ("evaluation.tf32", "tf32")),
        ("evaluation.precision", "bf16", ("evaluation.precision", "precision")),
        ("evaluation.statistics", "s.npz", ("evaluation", "protocol")),
        ("features.inception.resize", "clean", ("evaluation.extractors", "unsupported")),
        ("paper", None, ("paper", "missing-key")),
        ("paper.dataset", "FFHQ-64", ("students.sid-released", "no-number")),
        ("students.sid-released.settings", {"alpha": 1.1}, ("students.sid-released", "no-number")),
    ],
)
def test_the_gate_refuses_other_settings_before_any_work(released, gate, key, value, problem):
    shutil.copy("cifar10-32x32.npz", "s.npz")
    put(released, key, value)
    if value is None:
        del released["paper"]
    elif key.endswith("resize"):
        released["evaluation"]["main_metric"] = "fid-clean"
    with pytest.raises(ConfigError) as error:
        gates.check(parse_experiment(released, "x"), Path("x.yaml"))
    assert problem in [(p.key, p.code) for p in error.value.problems]
    assert not Path("results").exists()


def test_the_tolerance_is_three_standard_errors_and_the_rounding():
    sid, gdd = (
        next(e for e in published() if (e["paper"], e["value"]) == number)
        for number in (("SiD", 1.923), ("GDD", 1.54))
    )
    error = 0.01 * 1.923 * (1 / 10 + 1 / 10) ** 0.5
    assert gates.tolerance(sid, 10) == pytest.approx(3 * error + 0.0005)
    error = 0.01 * 1.54 * (1 + 1 / 10) ** 0.5
    assert gates.tolerance(gdd, 10) == pytest.approx(3 * error + 0.005)


def test_numbers_of_the_authors_are_those_of_their_papers():
    experiment = load_experiment(ROOT / "configs/paper/cifar10-uncond-released.yaml", files=False)
    found = {
        name: [entry["value"] for entry in gates.numbers_of(experiment, name)]
        for name in experiment.students
    }
    # The last one is quoted: its authors publish no number of alpha = 1.0 with this source.
    assert found == {
        "sid-released": [1.923], "gdd-i-released": [1.54, 1.56], "sid-alpha1-released": [2.03],
    }  # fmt: skip


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


@pytest.mark.slow
def test_the_workflow_imports_and_trains_nothing(empty_workspace, released):
    for file in ("sid.pkl", "gdd.pkl", "s.npz"):
        (empty_workspace.root / file).write_bytes(Path(file).read_bytes())
    empty_workspace.write_config(released)
    done = empty_workspace.snakemake("-n")
    assert done.returncode == 0, done.stdout + done.stderr
    rules = {line.split()[0] for line in done.stdout.splitlines() if line[:1].isalpha()}
    assert {"data", "features", "import_student", "score", "report"} <= rules
    assert not rules & {"train", "teacher", "score_references", "agreement", "pairs"}
