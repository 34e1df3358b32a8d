"""The workflow as a user runs it: what reruns after a change, failures, resume."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch

from harness.io.locks import machine_slot
from harness.networks import load_denoiser, save_denoiser
from harness.sampling import heun
from harness.streams import PAIR_NOISE
from harness.teachers.pairs import load_pairs
from tests import stages
from tests.conftest import DATA, ROOT, Workspace
from tests.test_denoiser import tiny_denoiser

STUDENTS = ["dmd", "dmd-noreg", "sid", "sim", "gdd", "gdd-i"]


def jobs(output: str) -> dict[str, str]:
    """Jobs of a dry run, such as "train sid 0" -> their description."""
    result = {}
    for block in re.split(r"\n(?=(?:local)?rule )", output)[1:]:
        rule = re.match(r"(?:local)?rule (\w+):", block).group(1)
        wildcards = re.search(r"wildcards: (.*)", block)
        values = re.findall(r"=([^,\n]+)", wildcards.group(1)) if wildcards else []
        result[" ".join([rule, *values])] = block
    return result


def plan(workspace: Workspace, *arguments: str, config: str = "tiny") -> dict[str, str]:
    dry = workspace.snakemake("-n", *arguments, config=config)
    assert dry.returncode == 0, dry.stdout + dry.stderr
    return jobs(dry.stdout + dry.stderr)


def metrics(workspace: Workspace) -> pd.DataFrame:
    """metrics.csv without the column that differs between repeated runs."""
    table = pd.read_csv(workspace.results / "tables" / "metrics.csv", keep_default_na=False)
    return table.drop(columns="seconds")


def read(path) -> dict:
    return json.loads(path.read_text())


# -- what reruns ------------------------------------------------------------------------------------


def test_a_change_reruns_only_what_depends_on_it(workspace):
    config = workspace.config()

    def changed(**sections) -> list[str]:
        workspace.write_config(config | sections, "changed")
        return sorted(plan(workspace, config="changed"))

    evaluation = config["evaluation"] | {"num_samples": 410}
    rescored = ["agreement", "all", "report", "score_references edm"]
    assert changed(evaluation=evaluation) == sorted(rescored + [f"score {s} 0" for s in STUDENTS])

    added = {"sid-12": {"method": "sid", "settings": {"alpha": 1.0}}}
    expected = ["all", "report", "score sid-12 0", "train sid-12 0"]
    assert changed(students=config["students"] | added) == expected

    longer = config["training"] | {"budget": [{"unit": "images", "amount": 192}]}
    trained = [job for job in changed(training=longer) if job.startswith("train")]
    assert trained == sorted(f"train {s} 0" for s in STUDENTS)

    # An experiment of another name uses nothing of the first.
    other = changed(name="other", students={"sid": config["students"]["sid"]})
    assert [job for job in other if job.startswith("train")] == ["train sid 0"]

    with open(workspace.root / "methods" / "sid.py", "a") as file:
        file.write("\n# edited\n")
    assert sorted(plan(workspace)) == ["all", "report", "score sid 0", "train sid 0"]


def test_a_longer_budget_resumes_a_finished_run(workspace):
    config = workspace.config()
    config["training"]["budget"][0]["amount"] = 192
    workspace.write_config(config)
    assert "resumed at 160 images" in workspace.stage("train", "sid", "0").stderr


def test_a_budget_in_seconds_reserves_the_machine(workspace):
    config = workspace.config()
    config["training"]["budget"] = [{"unit": "seconds", "amount": 0.5}]
    workspace.write_config(config)
    assert "threads: 8" in plan(workspace, "--forcerun", "train")["train sid 0"]
    with machine_slot():  # another job on the machine
        assert workspace.stage("train", "sid", "0").returncode == 0
    assert workspace.stage("score", "sid", "0").returncode == 0
    assert workspace.stage("report", "--partial").returncode == 0
    table = metrics(workspace)
    assert table[table.student == "sid"].flag.str.contains("contended").all()
    # The other students were trained for another budget.
    assert table[table.student == "sim"].status.str.startswith("missing").all()


# -- failures ---------------------------------------------------------------------------------------


def test_a_failed_run_appears_with_its_reason(broken):
    assert broken.last_run.returncode != 0
    table = metrics(broken)
    reason = "failed (training: the generator broke)"
    assert list(table[table.student == "sim"].status) == [reason]
    assert set(table.student) == {"teacher", "teacher-1step", "floor", *STUDENTS}
    assert reason in (broken.results / "tables" / "comparison.md").read_text()
    assert not (broken.results / "manifest.json").exists()
    status = broken.run("harness", "status", "--configfile", "configs/tiny.yaml").stdout
    assert re.search(r"sim/seed0 +failed", status) and "the generator broke" in status
    assert sorted(plan(broken)) == ["all", "report", "score sim 0", "train sim 0"]


def test_the_next_command_resumes_only_the_failed_run(broken, finished):
    log = (finished.results / "logs" / "students" / "sim" / "seed0.log").read_text()
    assert "resumed at 96 images" in log
    for name in ("sid", "gdd"):
        logs = [w.results / "logs" / "students" / name / "seed0.log" for w in (broken, finished)]
        assert logs[0].stat().st_mtime == logs[1].stat().st_mtime
    assert (metrics(finished).status == "ok").all()
    assert (finished.results / "manifest.json").exists()


def test_a_failed_teacher_is_the_reason_of_every_student(workspace):
    config = workspace.config()
    config["teachers"]["edm"]["lr"] = 1e30
    config["training"]["max_nonfinite"] = 3
    workspace.write_config(config)
    assert workspace.stage("teacher", "edm").returncode != 0
    assert workspace.stage("report", "--partial").returncode == 0
    table = metrics(workspace)
    students = table[table.student.isin(STUDENTS)]
    assert list(students.student) == STUDENTS
    assert students.status.str.startswith("failed (teacher edm: ").all()


@pytest.mark.slow
def test_an_invalid_experiment_starts_no_job(empty_workspace):
    config = empty_workspace.config()
    config["students"]["sid"]["method"] = "sld"
    config["training"]["budget"][0]["amount"] = -1
    empty_workspace.write_config(config)
    done = empty_workspace.snakemake()
    output = done.stdout + done.stderr
    assert done.returncode != 0 and "Traceback" not in output
    assert "students.sid.method: " in output and "training.budget.0.amount: " in output
    assert not empty_workspace.results.exists()


@pytest.mark.slow
def test_results_in_another_folder(tmp_path):
    """Code here, results on scratch: by --directory, by a link, and with -s from elsewhere."""
    work, scratch = tmp_path / "work", tmp_path / "scratch"
    for folder in (work, scratch):
        folder.mkdir()
    (work / "results").symlink_to(scratch)

    def run(*arguments, cwd) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "snakemake", "--cores", "1", *map(str, arguments)]
        variables = os.environ | {"PYTHONPATH": ""}  # jobs find the code by the Snakefile
        return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True)

    config = "--configfile", os.path.relpath(DATA / "tiny.yaml", ROOT)
    done = run("--directory", work, "results/tiny/data/data.json", *config, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (scratch / "tiny/data/data.json").exists()

    snakefile = ROOT / "Snakefile"
    done = run("-n", "-s", snakefile, "all", "--configfile", DATA / "tiny.yaml", cwd=work)
    assert done.returncode == 0, done.stderr
    assert sum(job.startswith("train ") for job in jobs(done.stdout + done.stderr)) == 6
    assert "data" not in jobs(done.stdout + done.stderr)

    (work / "results").unlink()
    (work / "results").symlink_to("/sys")  # nobody may write there
    done = run("-n", "-s", snakefile, "all", cwd=work)  # the default experiment
    output = done.stdout + done.stderr
    assert done.returncode == 1 and "Traceback" not in output
    reason = (
        r"results/digits: Operation not permitted; ask its owner for access, or work in another"
    )
    assert (
        reason in output or reason.replace("Operation not permitted", "Permission denied") in output
    )


@pytest.mark.slow
def test_interrupted_workflow_reports_and_continues(empty_workspace):
    """Ctrl-C reaches all processes of a terminal."""
    options = ("--cores", "8", "all", "--configfile", "configs/tiny.yaml")
    process = subprocess.Popen(
        empty_workspace.command("snakemake", *options),
        cwd=empty_workspace.root,
        env=empty_workspace.environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    log = empty_workspace.results / "logs/features/tiny-cnn.log"
    while not log.exists():
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    _, output = process.communicate(timeout=300)
    assert process.returncode == 130
    assert "Traceback" not in output and "failed" not in output and "Error" not in output
    _, end = output.split("\nInterrupted: ")
    assert end.splitlines() == [
        "jobs stop, and a partial report is being written. The same command continues.",
        "The partial report: results/tiny/tables/comparison.md, and results/tiny/report.html",
    ]
    assert "features: interrupted; the same command continues" in log.read_text()
    assert not list(empty_workspace.results.rglob("failure.json"))
    table = metrics(empty_workspace)
    assert table[table.student.isin(STUDENTS)].status.str.startswith("missing (not finished").all()


# -- results ----------------------------------------------------------------------------------------


def test_teacher_pairs(finished):
    """Pairs are charged to the student that uses them, and their noise follows from their index."""
    (folder,) = finished.results.glob("pairs/*")
    record = read(folder / "pairs.json")
    assert record["evaluations"] == 64 * (2 * 3 - 1)
    run = finished.results / "students"
    ledger, other = (read(run / s / "seed0/student.json")["ledger"] for s in STUDENTS[:2])
    assert ledger["images"] == other["images"] == 160
    assert ledger["charges"]["pairs"]["flops"] == record["flops"] > 0
    assert ledger["passes"]["teacher"][0] == other["passes"]["teacher"][0] + 64 * 5
    assert ledger["seconds"] > record["seconds"]

    record, pairs = load_pairs(folder)
    assert pairs["x"].shape == (64, 1, 8, 8) and "z" not in pairs
    teacher = finished.results / "teachers" / "edm"
    denoiser = load_denoiser(teacher, read(teacher / "teacher.json")["sha256"])
    index = torch.arange(10, 14)
    with torch.no_grad():
        z = PAIR_NOISE.normal(index, (1, 8, 8))
        x = heun(denoiser, z, pairs["condition"][index], **record.sampler)
    torch.testing.assert_close(pairs["x"][index], x.float(), atol=1e-4, rtol=0)


def test_a_second_teacher_from_a_folder(workspace, tmp_path):
    save_denoiser(tiny_denoiser(seed=3), tmp_path / "elsewhere")
    config = workspace.config()
    config["teachers"]["other"] = {"source": str(tmp_path / "elsewhere"), "sampler": {"steps": 3}}
    config["students"] = {
        "sid": config["students"]["sid"],
        "sid-other": {"method": "sid", "teacher": "other"},
    }
    workspace.write_config(config)
    assert sorted(plan(workspace)) == [
        *("all", "report", "score sid-other 0", "score_references other"),
        *("teacher other", "train sid-other 0"),
    ]
    for stage in (
        ["teacher", "other"],
        ["score-references", "other"],
        ["train", "sid-other", "0"],
        ["score", "sid-other", "0"],
        ["report"],
    ):
        done = workspace.stage(*stage)
        assert done.returncode == 0, done.stderr
    table = metrics(workspace)
    assert list(dict.fromkeys(table.student)) == [
        *("teacher/edm", "teacher-1step/edm", "floor"),
        *("teacher/other", "teacher-1step/other", "sid", "sid-other"),
    ]
    assert set(table[table.student == "teacher/other"].nfe) == {"5"}
    assert read(workspace.results / "students/sid-other/seed0/student.json")["teacher"] == "other"


# -- resume -----------------------------------------------------------------------------------------


def kill_when(ready, pid: int, alive) -> None:
    """Send SIGKILL as soon as `ready()`; fails if the process has ended before."""
    deadline = time.monotonic() + 300
    while not ready():
        assert alive(), "the process ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert alive()
    os.kill(pid, signal.SIGKILL)


def killed_stage(workspace: Workspace, *arguments: str, when) -> None:
    """Start a stage and kill it as soon as `when()`."""
    process = stages.start(workspace.root, [*arguments, "--configfile", "configs/tiny.yaml"])
    kill_when(when, process.pid, process.is_alive)
    process.join()
    assert process.exitcode == -signal.SIGKILL


def state_step(folder) -> int:
    """The step of the saved state of a run, or -1."""
    for path in folder.glob("runs/*/state.json"):
        try:
            return read(path)["step"]
        except (OSError, ValueError):
            return -1
    return -1


def without_timings(record: dict) -> dict:
    """A student record without measured times and memory."""
    for snapshot in [record, *record["snapshots"]]:
        for measured in ("seconds", "peak_memory"):
            del snapshot["ledger"][measured]
        snapshot.get("before", {}).pop("seconds", None)
    return record


@pytest.mark.parametrize(("student", "step"), zip(STUDENTS, (2, 4, 6, 8, 2, 6), strict=True))
def test_a_killed_run_resumes_bit_for_bit(finished, workspace, student, step):
    folder = workspace.results / "students" / student / "seed0"
    shutil.rmtree(folder)
    killed_stage(workspace, "train", student, "0", when=lambda: state_step(folder) >= step)
    assert not (folder / "student.json").exists()
    again = workspace.stage("train", student, "0")
    assert again.returncode == 0 and "resumed at" in again.stderr, again.stderr
    original = finished.results / "students" / student / "seed0"
    resumed, expected = (without_timings(read(f / "student.json")) for f in (folder, original))
    if student == "sim":  # the finished run used the file with BREAK
        for record in (resumed, expected):
            record.pop("key", None), record.pop("run_id", None), record["inputs"].pop("method")
    assert resumed == expected
    logs = [
        pd.read_csv(f / "train.csv").drop(columns=["seconds", "images_per_second"])
        for f in (folder, original)
    ]
    assert logs[0].equals(logs[1])


@pytest.mark.parametrize(
    ("stage", "record"),
    [
        (["teacher", "edm"], "teachers/edm/teacher.json"),
        (["features", "tiny-cnn"], "features/tiny-cnn/features.json"),
    ],
)
def test_a_killed_teacher_or_feature_network_resumes_bit_for_bit(
    finished, workspace, stage, record
):
    path = workspace.results / record
    shutil.rmtree(path.parent)
    killed_stage(workspace, *stage, when=lambda: state_step(path.parent) >= 2)
    again = workspace.stage(*stage)
    assert again.returncode == 0 and "resumed at" in again.stderr, again.stderr
    assert read(path)["sha256"] == read(finished.results / record)["sha256"]


def test_killed_scoring_gives_the_same_scores(finished, workspace):
    path = workspace.results / "scores" / "sid" / "seed0.json"
    before = path.read_text()
    path.unlink()
    log = workspace.root / "stderr.txt"
    scored = lambda: log.exists() and "scored" in log.read_text()  # noqa: E731
    killed_stage(workspace, "score", "sid", "0", when=scored)
    assert not path.exists()
    assert workspace.stage("score", "sid", "0").returncode == 0
    assert path.read_text() == before


def test_the_example_method_survives_a_killed_snakemake(finished, workspace):
    """Copy the README's Diff-Instruct into methods/ and add it to the experiment. SIGKILL of
    Snakemake leaves its jobs running and its lock in place."""
    assert len((DATA / "example" / "diff_instruct.py").read_text().splitlines()) <= 40
    shutil.copy(DATA / "example" / "diff_instruct.py", workspace.root / "methods")
    config = workspace.config()
    config["students"]["diff-instruct"] = {"method": "diff_instruct", "settings": {"lr": 1e-4}}
    workspace.write_config(config)
    command = ["snakemake", "--cores", "8", "all", "--configfile", "configs/tiny.yaml"]
    process = subprocess.Popen(
        workspace.command(*command),
        cwd=workspace.root,
        env=workspace.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    student = workspace.results / "students" / "diff-instruct" / "seed0"
    kill_when(lambda: state_step(student) >= 0, process.pid, lambda: process.poll() is None)
    assert process.wait() == -signal.SIGKILL
    done = workspace.snakemake()
    assert done.returncode == 0, done.stdout + done.stderr
    table = metrics(workspace)
    others = table[table.student != "diff-instruct"].reset_index(drop=True)
    assert others.equals(metrics(finished))
    scores = table[table.student == "diff-instruct"]
    assert (scores.status == "ok").all() and "fd" in set(scores.metric)
    (workspace.root / "methods" / "diff_instruct.py").unlink()
    removed = workspace.stage("status")
    assert removed.returncode == 2 and "students.diff-instruct.method: " in removed.stderr


@pytest.mark.slow
def test_spaces_in_the_folder_and_in_the_interpreters_path(tmp_path, monkeypatch):
    workspace = Workspace.create(tmp_path / "my project")
    (tmp_path / "my env").symlink_to(sys.prefix)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "my env" / "bin" / "python"))
    done = workspace.snakemake("--until", "data")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (workspace.results / "data" / "data.json").is_file()
