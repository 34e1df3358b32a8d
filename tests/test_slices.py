"""Stages without Snakemake, and slices of time. The fast tests start no process of a stage."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from harness.validation import parse_experiment
from harness.workflow.stages import Stage, all_stages, unfinished
from tests.conftest import ROOT, Workspace
from tools import estimates as estimating
from tools import slice as slices
from tools.estimates import METRICS, STARTUP, UNKNOWN, Estimated, Estimates
from tools.slice import Slice

STUDENTS = ["dmd", "dmd-noreg", "sid", "sim", "gdd", "gdd-i"]
SCORED = [name for student in STUDENTS for name in (f"train {student} 0", f"score {student} 0")]
PREPARED = [
    "data",
    "features tiny-cnn",
    "features tiny-clip",
    "features tiny-critic",
    "teacher edm",
]


@pytest.fixture
def experiment(tiny, tmp_path):
    return parse_experiment(tiny, "tiny.yaml", tmp_path)


# -- stages -----------------------------------------------------------------------------------------


def test_stages_are_in_an_order_in_which_they_can_run(experiment):
    stages = all_stages(experiment)
    order = [*PREPARED, "pairs edm_n64_steps3", *SCORED, "score-references edm"]
    assert list(stages) == unfinished(stages) == [*order, "agreement", "report"]
    for number, stage in enumerate(stages.values()):
        assert set(stage.needs) <= set(list(stages)[:number])
    assert "pairs edm_n64_steps3" in stages["train dmd 0"].needs
    assert "features tiny-critic" in stages["train gdd 0"].needs
    assert not any("tiny-critic" in need for need in stages["score gdd 0"].needs)


def fake(tmp_path, current: set, files: set = frozenset()) -> dict[str, Stage]:
    """data -> teacher -> two students -> their scores -> report. files: stages whose large files
    are missing."""
    needs = {"data": (), "teacher edm": ("data",), "report": ("score a 0", "score b 0")}
    for student in "ab":
        needs[f"train {student} 0"] = ("data", "teacher edm")
        needs[f"score {student} 0"] = ("data", f"train {student} 0")
    order = ["data", "teacher edm", "train a 0", "score a 0", "train b 0", "score b 0", "report"]
    return {
        name: Stage(
            *(name.split()[0], tuple(name.split()[1:]), tmp_path / name / "record.json"),
            is_current=lambda name=name: name in current,
            needs=needs[name],
            has_files=lambda name=name: name not in files,
        )
        for name in order
    }


EVERYTHING = {"data", "teacher edm", "train a 0", "score a 0", "train b 0", "score b 0", "report"}


@pytest.mark.parametrize(
    ("missing", "files", "expected"),
    [
        ((), (), []),
        (("score b 0",), (), ["score b 0", "report"]),
        (("train a 0",), (), ["train a 0", "score a 0", "report"]),
        # Images are only made again for a stage that reads them.
        ((), ("data",), []),
        (("report",), ("data",), ["report"]),
        (("score b 0",), ("data",), ["data", "score b 0", "report"]),
    ],
)
def test_what_depends_on_an_unfinished_stage_is_unfinished(tmp_path, missing, files, expected):
    assert unfinished(fake(tmp_path, EVERYTHING - set(missing), set(files))) == expected


# -- slices -----------------------------------------------------------------------------------------


class Clock:
    """Stages that take a given number of seconds of a clock that stands still otherwise."""

    def __init__(self, tmp_path, monkeypatch, experiment, seconds, estimates=None, failing=()):
        self.now, self.current, self.started = 0.0, set(), []
        monkeypatch.setattr(slices.time, "monotonic", lambda: self.now)
        stages = fake(tmp_path, self.current)
        monkeypatch.setattr(slices, "all_stages", lambda experiment: stages)
        self.seconds, self.failing = seconds, failing
        times = seconds | (estimates or {})
        self.estimates = SimpleNamespace(
            of=lambda stage: Estimated(times[stage.name], "stub"),
            work=lambda stage: None,
            device="cpu",
            history=SimpleNamespace(add=lambda *facts: None),
        )
        self.experiment = experiment

    def run(self, seconds, **options) -> int:
        current = Slice(self.experiment, seconds, self.estimates, **options)

        def execute(command, name):
            log = current.experiment.paths.root / "log"
            log.parent.mkdir(exist_ok=True)
            log.write_text("error: the reason\n")
            self.started.append(name)
            end, limit = self.now + self.seconds.get(name, 1), current.started + seconds
            self.now = min(end, limit)
            if end > limit:
                self.seconds[name] = end - limit  # the rest
                return None, log
            if name not in self.failing and "--partial" not in command:
                self.current.add(name)
            return int(name in self.failing), log

        current._execute = execute
        return current.run()


TIMES = {"data": 5, "teacher edm": 40, "train a 0": 50, "score a 0": 10, "train b 0": 30}
TIMES |= {"score b 0": 10, "report": 5}


def test_stages_start_only_if_they_fit(tmp_path, monkeypatch, experiment, capsys):
    clock = Clock(tmp_path, monkeypatch, experiment, TIMES)
    assert clock.run(60) == slices.REMAINING  # 15 s are left: both trainings need more
    assert clock.started == ["data", "teacher edm"]
    assert "train a 0: not started: about 50 s (stub); 15 s are left" in capsys.readouterr().out
    assert clock.run(60) == slices.REMAINING
    assert clock.started[2:] == ["train a 0", "score a 0"]
    assert clock.run(60) == slices.FINISHED
    assert clock.started[4:] == ["train b 0", "score b 0", "report"]
    assert clock.run(60) == slices.FINISHED and len(clock.started) == 7


def test_a_later_stage_that_fits_runs_instead(tmp_path, monkeypatch, experiment):
    clock = Clock(tmp_path, monkeypatch, experiment, TIMES)
    assert clock.run(90) == slices.REMAINING
    assert clock.started == ["data", "teacher edm", "train b 0", "score b 0"]


def test_a_training_longer_than_a_slice_needs_permission(tmp_path, monkeypatch, experiment, capsys):
    clock = Clock(tmp_path, monkeypatch, experiment, TIMES | {"teacher edm": 100})
    assert clock.run(60) == slices.REMAINING and clock.started == ["data"]
    assert "longer than a slice: raise --seconds, or add --cut" in capsys.readouterr().out
    assert clock.run(60, cut=True) == slices.REMAINING  # stopped at the end of the slice
    assert clock.started == ["data", "teacher edm"] and clock.now == 65
    assert clock.run(60, cut=True) == slices.REMAINING and "teacher edm" in clock.current


def test_a_failed_stage_does_not_stop_independent_ones(tmp_path, monkeypatch, experiment, capsys):
    clock = Clock(tmp_path, monkeypatch, experiment, TIMES, failing={"train a 0"})
    assert clock.run(600) == slices.FAILED
    assert clock.started[2:] == ["train a 0", "train b 0", "score b 0", "report"]  # a partial one
    assert "train a 0: FAILED, exit status 1 (error: the reason;" in capsys.readouterr().out
    clock.failing = ()
    assert clock.run(600) == slices.FINISHED  # the next slice tries again
    assert clock.started[6:] == ["train a 0", "score a 0", "report"]


def test_students_of_other_machines_are_left_out(tmp_path, monkeypatch, experiment):
    clock = Clock(tmp_path, monkeypatch, experiment, TIMES)
    assert clock.run(600, students=["b"]) == slices.FINISHED
    assert clock.started == ["data", "teacher edm", "train b 0", "score b 0"]


def test_a_stage_is_stopped_at_the_end_of_a_slice(experiment):
    """It gets SIGINT; one that does not end is killed in time."""
    current = Slice(experiment, 2.0, None)
    code = """
import signal, time
signal.signal(signal.SIGINT, lambda *_: print("SIGINT", flush=True))
signal.signal(signal.SIGTERM, signal.SIG_IGN)
for _ in range(600):
    time.sleep(0.1)
"""
    status, log = current._execute([sys.executable, "-c", code], "train sid 0")
    assert status is None and "SIGINT" in log.read_text()
    assert 1.9 < current.elapsed < 5
    failing = [sys.executable, "-c", "raise SystemExit(2)"]
    assert Slice(experiment, 60.0, None)._execute(failing, "train sid 0")[0] == 2


def test_a_stopped_stage_is_not_finished_without_its_files(tmp_path, experiment, capsys):
    """Its record may be older: `data` was stopped while it prepared the images again."""
    current, log = Slice(experiment, 60.0, None), tmp_path / "log"
    current.stages = fake(tmp_path, EVERYTHING, {"data"})
    current._execute = lambda command, name: (None, log)
    assert not current._run("data")
    assert "data: stopped after" in capsys.readouterr().out


# -- estimates --------------------------------------------------------------------------------------


def test_without_a_measurement_the_rate_is_assumed(experiment, monkeypatch):
    rates = {"fp32": 5e9, "bf16": 5e10}
    monkeypatch.setattr(estimating, "matrix_rate", lambda device, precision: rates[precision])
    work = {"train sid 0": 3e10, "teacher edm": 4e10, "score-references edm": 3e10}
    monkeypatch.setattr(Estimates, "work", lambda self, stage: work.get(stage.name))
    stages, estimates = all_stages(experiment), Estimates(experiment)
    assert estimates.of(stages["train sid 0"]).seconds == 30 + STARTUP
    assert "20% of a matrix product's rate in fp32" in estimates.of(stages["teacher edm"]).reason
    low = experiment.training.model_copy(update={"precision": "bf16"})
    low = Estimates(dataclasses.replace(experiment, training=low))
    assert low.of(stages["train sid 0"]).seconds == 3 + STARTUP
    scores, evaluation = low.of(stages["score-references edm"]), experiment.evaluation
    samples = 2 * len(evaluation.sampling_seeds) * evaluation.num_samples
    assert scores.seconds == pytest.approx(30 + STARTUP + METRICS * samples)  # features in fp32
    given = Estimates(experiment, rate=0.002).of(stages["teacher edm"])
    assert given.seconds == 20 + STARTUP and "assumed" in given.reason
    assert estimates.of(stages["data"]) == Estimated(UNKNOWN, "assumed")


def test_two_slices_at_once_keep_each_others_times(experiment):
    one, other = Estimates(experiment).history, Estimates(experiment).history
    one.add("train sid 0", "cpu", 1.0, 2.0)
    other.work("teacher edm", lambda: 3.0)
    other.add("train sim 0", "cpu", 1.0, 2.0)
    one.work("pairs", lambda: None)
    content = Estimates(experiment).history.content
    assert [run["stage"] for run in content["runs"]] == ["train sid 0", "train sim 0"]
    assert content["work"] == {"teacher edm": 3.0, "pairs": None}


def test_stages_that_ran_give_the_rate_of_the_same_device(experiment, monkeypatch):
    work = {"train sid 0": 3e10, "train sim 0": 6e10}
    monkeypatch.setattr(Estimates, "work", lambda self, stage: work.get(stage.name))
    stages, estimates = all_stages(experiment), Estimates(experiment, rate=1.0)
    estimates.history.add("train sid 0", "NVIDIA H200", 3e10, 9.0)
    assert "assumed" in estimates.of(stages["train sim 0"]).reason
    estimates.history.add("train sid 0", "cpu", 3e10, STARTUP + 15)
    again = Estimates(experiment, rate=1.0)
    assert again.of(stages["train sim 0"]).seconds == 30 + STARTUP
    again.history.add("report", "cpu", None, 12.0)
    assert again.of(stages["report"]).seconds == 12


def test_an_interrupted_training_continues_at_its_own_rate(experiment, tmp_path):
    folder = experiment.paths.run("sid", 0) / "runs" / "r"
    folder.mkdir(parents=True)
    with open(folder / "train.csv", "w", newline="") as file:
        rows = [{"images": n, "images_per_second": r} for n, r in ((32, 1), (64, 4), (96, 4))]
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    stage = all_stages(experiment)["train sid 0"]
    (folder / "devices.json").write_text('["cpu"]')
    assert Estimates(experiment).of(stage).seconds == (160 - 96) / 4 + STARTUP
    (folder / "devices.json").write_text('["NVIDIA H200"]')  # the rate of another device
    assert Estimates(experiment, 1e-3)._interrupted(stage) is None


def test_a_budget_in_seconds_needs_no_rate(tiny, tmp_path):
    tiny["training"]["budget"] = [{"unit": "seconds", "amount": 70}]
    experiment = parse_experiment(tiny, "tiny.yaml", tmp_path)
    assert Estimates(experiment).of(all_stages(experiment)["train sid 0"]).seconds == 70 + STARTUP


def test_an_unknown_student_is_rejected(tmp_path, capsys):
    arguments = ["--configfile", str(ROOT / "tests/data/tiny.yaml"), "--students", "sidd"]
    assert slices.main(arguments) == 2
    assert "unknown student 'sidd'; did you mean 'sid'?" in capsys.readouterr().err
    assert slices.main([*arguments[:2], "--seconds", "nan"]) == 2
    assert "--seconds and --rate must be positive" in capsys.readouterr().err


@pytest.mark.parametrize("ignored", [False, True])  # by nohup
def test_a_closed_connection_stops_a_slice(ignored):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        assert slices.main(["--configfile", "missing.yaml"]) == 2
        expected = signal.SIG_IGN if ignored else signal.default_int_handler
        assert signal.getsignal(signal.SIGHUP) == expected
    finally:
        signal.signal(signal.SIGHUP, before)


# -- a finished run ---------------------------------------------------------------------------------


def tool(workspace: Workspace, name: str, *arguments: str):
    path = os.pathsep.join(map(str, (workspace.root, ROOT)))
    return workspace.run(f"tools.{name}", *arguments, PYTHONPATH=path)


def packed(workspace: Workspace, out, *options: str):
    arguments = ["pack", "--configfile", "configs/tiny.yaml", "--out", str(out), *options]
    done = tool(workspace, "pack", *arguments)
    assert done.returncode == 0, done.stderr
    return out


def without(finished: Workspace, root, students: list[str]) -> Workspace:
    """A machine on which some students were not trained."""
    workspace = finished.clone(root)
    for student in students:
        shutil.rmtree(workspace.results / "students" / student)
        shutil.rmtree(workspace.results / "scores" / student)
    for name in ("tables/metrics.csv", "manifest.json", "report.html"):
        (workspace.results / name).unlink()
    return workspace


def empty(finished: Workspace, root) -> Workspace:
    workspace = Workspace(root)
    ignored = shutil.ignore_patterns("results", ".snakemake")
    shutil.copytree(finished.root, root, ignore=ignored)
    return workspace


def metrics(workspace: Workspace) -> pd.DataFrame:
    table = pd.read_csv(workspace.results / "tables" / "metrics.csv", keep_default_na=False)
    return table.drop(columns=["seconds", "device"])


def test_an_unpacked_experiment_is_finished(finished, tmp_path):
    """For slices and for Snakemake, although the weights of students are not packed."""
    pack = packed(finished, tmp_path / "pack")
    assert all(path.stat().st_size <= 15_000_000 for path in pack.iterdir())
    other = empty(finished, tmp_path / "other")
    done = tool(other, "pack", "unpack", str(pack))
    assert done.returncode == 0 and "remain" not in done.stdout, done.stdout + done.stderr
    assert not list(other.results.glob("students/*/*/model/*.safetensors"))
    assert (other.results / "students/sid/seed0/train.csv").is_symlink()
    dry = other.snakemake("-n")
    assert "Nothing to be done" in dry.stdout + dry.stderr
    plan = tool(other, "slice", "--configfile", "configs/tiny.yaml", "--dry-run")
    assert plan.returncode == 0 and "21 of 21 stages are finished" in plan.stdout
    assert other.stage("report").returncode == 0
    assert metrics(other).equals(metrics(finished))
    scoring = other.stage("score", "sid", "0")  # needs the weights, and trains nothing
    assert scoring.returncode == 2 and "have no weights" in scoring.stderr


def test_two_halves_are_joined(finished, tmp_path):
    halves = STUDENTS[:3], STUDENTS[3:]
    packs = []
    for number, left_out in enumerate(halves):
        machine = without(finished, tmp_path / f"machine{number}", left_out)
        if number == 1:  # as if it were another machine's GPU
            for path in machine.results.glob("scores/*/seed0.json"):
                scores = json.loads(path.read_text())
                if "student" in scores:
                    scores |= {"device_name": "NVIDIA H200", "trained_on": "NVIDIA H200"}
                path.write_text(json.dumps(scores))
        packs.append(packed(machine, tmp_path / f"pack{number}", *["--students"] * number))
    joined = empty(finished, tmp_path / "joined")
    done = tool(joined, "pack", "unpack", *map(str, packs))
    assert done.returncode == 0 and "1 stages remain: report" in done.stdout, done.stderr
    assert joined.stage("report").returncode == 0
    assert metrics(joined).equals(metrics(finished))
    table = pd.read_csv(joined.results / "tables/comparison.csv").set_index("student")
    assert set(table.device[halves[0]]) == {"NVIDIA H200"}
    assert set(table.device[[*halves[1], "teacher", "floor"]]) == {"cpu"}
    comparison = (joined.results / "tables/comparison.md").read_text()
    assert "dmd, dmd-noreg, sid: NVIDIA H200" in comparison
    assert len(json.loads((joined.results / "manifest.json").read_text())["origins"]) == 2
    # The run with packed weights is scored again; its number does not change.
    assert (joined.results / "students/dmd/seed0/model/config.json").exists()

    path = tmp_path / "machine0" / "results/tiny/students/gdd/seed0/student.json"
    record = json.loads(path.read_text())
    record["ledger"]["seconds"] += 1
    path.write_text(json.dumps(record))
    conflicting = packed(Workspace(tmp_path / "machine0"), tmp_path / "conflicting")
    before = {p: p.lstat().st_mtime_ns for p in joined.results.rglob("*")}
    done = tool(joined, "pack", "unpack", str(conflicting))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "students/gdd/seed0 (" in done.stderr and "nothing was written" in done.stderr
    assert {p: p.lstat().st_mtime_ns for p in joined.results.rglob("*")} == before


# -- real slices ------------------------------------------------------------------------------------


def run_slices(workspace: Workspace, config: str, seconds: int, limit: int) -> list[str]:
    """Slices until everything is finished; the output of each."""
    outputs = []
    for _ in range(limit):
        options = ["--configfile", f"configs/{config}.yaml", "--seconds", str(seconds), "--cut"]
        done = tool(workspace, "slice", *options)
        outputs.append(done.stdout)
        if done.returncode == 0:
            return outputs
        assert done.returncode == slices.REMAINING, done.stdout + done.stderr
    raise AssertionError("\n".join(outputs))


def test_slices_give_the_numbers_of_the_workflow(finished, tmp_path):
    """One student in pieces: a slice that is stopped by a signal during a training, and the rest.
    Its rows are those of the whole experiment by Snakemake."""
    workspace = empty(finished, tmp_path / "project")
    config = workspace.config()
    config["students"] = {"sid": config["students"]["sid"]}
    del config["features"]["tiny-critic"]
    config["training"]["budget"] = [{"unit": "images", "amount": 160}]
    workspace.write_config(config)
    options = ["--configfile", "configs/tiny.yaml", "--seconds", "900"]
    path = os.pathsep.join(map(str, (workspace.root, ROOT)))
    process = subprocess.Popen(
        workspace.command("tools.slice", *options),
        cwd=workspace.root,
        env=workspace.environment | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    student = workspace.results / "students" / "sid" / "seed0"
    while not list(student.glob("runs/*/state.json")):
        assert process.poll() is None
        time.sleep(0.005)
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == slices.REMAINING and "continue with" in output
    assert not (student / "student.json").exists() and not (student / "failure.json").exists()
    outputs = run_slices(workspace, "tiny", seconds=900, limit=1)
    assert "images are left at" in outputs[0]  # estimated by its own rate
    assert "resumed at" in (workspace.results / "logs/slices/train-sid-0.log").read_text()
    expected = metrics(finished)
    expected = expected[expected.student.isin(["teacher", "teacher-1step", "floor", "sid"])]
    assert metrics(workspace).equals(expected.reset_index(drop=True))


@pytest.mark.slow
def test_slices_of_small_colour_images(empty_workspace):
    """EDM's U-Net on 32 x 32 images from a folder, as in configs/cifar10-small-fast.yaml."""
    folder, random = empty_workspace.root / "images", np.random.default_rng(0)
    folder.mkdir()
    labels = [[f"{number:03d}.png", number % 10] for number in range(400)]
    for name, _ in labels:
        pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "dataset.json").write_text(json.dumps({"labels": labels}))
    network = {"type": "SongUNet", "model_channels": 8, "channel_mult": [1, 1], "num_blocks": 1}
    network |= {"attn_resolutions": [], "augment_dim": 9}
    cnn = {"type": "cnn", "images": 1280, "width": 4}
    config = {
        "name": "colour",
        "device": "cpu",
        "data": {"name": "noise", "source": str(folder), "held_out": 0.25},
        "features": {"one": cnn, "two": cnn | {"seed": 1}},
        "teachers": {
            "edm": {"network": network, "images": 256, "batch": 32, "augment": 0.12}
            | {"sampler": {"steps": 2}}
        },
        "students": {"sid": {"method": "sid"}},
        "training": {
            "seeds": [0],
            "budget": [{"unit": "images", "amount": 64}],
            "settings": {"batch": 16},
            "tick_images": 16,
        },
        "evaluation": {"num_samples": 128, "sampling_seeds": [0], "extractors": ["one", "two"]},
    }
    path = empty_workspace.root / "configs" / "colour.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    run_slices(empty_workspace, "colour", seconds=600, limit=2)
    results = empty_workspace.root / "results" / "colour"
    table = pd.read_csv(results / "tables" / "metrics.csv")
    assert {"sid", "teacher"} <= set(table.student) and (table.status == "ok").all()
    images, results_pack = (empty_workspace.root / name for name in ("images-pack", "results-pack"))
    for out, options in ((images, ["--images"]), (results_pack, [])):
        arguments = ["pack", "--configfile", str(path), "--out", str(out), *options]
        assert tool(empty_workspace, "pack", *arguments).returncode == 0
    stored = (results / "data/images/shard-00000.safetensors").read_bytes()
    shutil.rmtree(results)
    done = tool(empty_workspace, "pack", "unpack", str(images), str(results_pack))
    assert done.returncode == 0 and "remain" not in done.stdout, done.stdout + done.stderr
    assert (results / "data/images/shard-00000.safetensors").read_bytes() == stored
