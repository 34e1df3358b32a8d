"""The workflow as a user runs it: what reruns, what survives a failure, what a report holds."""

import json
import os
import re
import shutil
import signal
import time

import pandas as pd
import pytest
import torch

from harness.networks import load_denoiser, save_denoiser
from harness.sampling import heun
from harness.streams import PAIR_NOISE
from harness.teachers.pairs import load_pairs
from tests import stages
from tests.conftest import DATA, Workspace
from tests.test_denoiser import tiny_denoiser

STUDENTS = ["dmd", "dmd-noreg", "sid", "sim", "gdd", "gdd-i"]
MEASURED = ["seconds"]  # columns of metrics.csv that no two runs share


def jobs(output: str) -> list[str]:
    """Rules (with their wildcards) that a dry run would execute: "train sid 0"."""
    found = []
    for block in re.split(r"\n(?=(?:local)?rule )", output)[1:]:
        rule = re.match(r"(?:local)?rule (\w+):", block).group(1)
        wildcards = re.search(r"wildcards: (.*)", block)
        values = re.findall(r"=([^,\n]+)", wildcards.group(1)) if wildcards else []
        found.append(" ".join([rule, *values]))
    return sorted(found)


def plan(workspace: Workspace, *arguments: str, config: str = "tiny") -> list[str]:
    dry = workspace.snakemake("-n", *arguments, config=config)
    assert dry.returncode == 0, dry.stdout + dry.stderr
    return jobs(dry.stdout + dry.stderr)


def metrics(workspace: Workspace) -> pd.DataFrame:
    table = pd.read_csv(workspace.results / "tables" / "metrics.csv", keep_default_na=False)
    return table.drop(columns=MEASURED)


def test_one_command_makes_everything(finished):
    root = finished.results
    for name in ("metrics.csv", "comparison.csv", "comparison.md", "comparison.tex"):
        assert (root / "tables" / name).stat().st_size > 0
    for name in (
        "quality_vs_images",
        "quality_vs_compute",
        "samples",
        "nearest_neighbours",
        "training_health",
    ):
        assert (root / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert (root / "figures" / f"{name}.pdf").read_bytes()[:4] == b"%PDF"
    table = pd.read_csv(root / "tables" / "comparison.csv")
    assert list(table.student) == ["teacher", "teacher-1step", "floor", *STUDENTS]
    assert (table.status == "ok").all()
    for name in STUDENTS:  # printed at the end, with where to look
        assert name in finished.last_run.stdout
    assert "results/tiny/figures" in finished.last_run.stdout
    assert (root / "logs" / "students" / "sid" / "seed0.log").read_text().count("img/s") == 5
    assert (root / "benchmarks" / "students" / "sid" / "seed0.tsv").exists()


def test_the_second_run_has_nothing_to_do(finished):
    started = time.monotonic()
    again = finished.snakemake()
    assert again.returncode == 0
    assert "Nothing to be done" in again.stdout + again.stderr
    assert time.monotonic() - started < 20


def test_editing_a_method_reruns_its_training_and_what_follows(workspace):
    with open(workspace.root / "methods" / "sid.py", "a") as file:
        file.write("\n# edited\n")
    assert plan(workspace) == ["all", "report", "score sid 0", "train sid 0"]


def test_changing_the_evaluation_reruns_scores_and_no_training(workspace):
    config = workspace.config()
    config["evaluation"]["num_samples"] = 410
    workspace.write_config(config)
    expected = ["agreement", "all", "report", "score_references edm"]
    assert plan(workspace) == sorted([*expected, *(f"score {s} 0" for s in STUDENTS)])


def test_adding_a_student_trains_only_that_one(workspace):
    config = workspace.config()
    config["students"]["sid-12"] = {"method": "sid", "settings": {"alpha": 1.0}}
    workspace.write_config(config)
    assert plan(workspace) == ["all", "report", "score sid-12 0", "train sid-12 0"]


def test_a_longer_budget_continues_and_a_shared_setting_starts_over(workspace):
    config = workspace.config()
    config["training"]["budget"][0]["amount"] = 192
    workspace.write_config(config)
    trained = [job for job in plan(workspace) if job.startswith("train")]
    assert trained == sorted(f"train {s} 0" for s in STUDENTS)
    done = workspace.stage("train", "sid", "0")
    assert "resumed at 160 images" in done.stderr


def test_another_experiment_replaces_the_default_wholly(workspace):
    config = workspace.config() | {"name": "other"}
    config["students"] = {"sid": config["students"]["sid"]}
    workspace.write_config(config, "other")
    planned = plan(workspace, config="other")
    assert [job for job in planned if job.startswith("train")] == ["train sid 0"]


def test_a_seconds_budget_takes_the_machine_alone(workspace):
    config = workspace.config()
    config["training"]["budget"] = [{"unit": "seconds", "amount": 1}]
    workspace.write_config(config)
    dry = workspace.snakemake("-n", "--forcerun", "train")
    block = next(b for b in re.split(r"\n(?=rule )", dry.stdout + dry.stderr) if "rule train" in b)
    assert "threads: 8" in block


def test_a_seconds_budget_beside_other_work_is_flagged(workspace):
    from harness.io.locks import machine_slot

    config = workspace.config()
    config["training"]["budget"] = [{"unit": "seconds", "amount": 0.5}]
    workspace.write_config(config)
    record = workspace.results / "students" / "sid" / "seed0" / "student.json"
    with machine_slot():
        assert workspace.stage("train", "sid", "0").returncode == 0
    assert json.loads(record.read_text())["contended"] is True
    assert workspace.stage("score", "sid", "0").returncode == 0
    # The others were trained for another budget: they are not shown beside it.
    assert workspace.stage("report", "--partial").returncode == 0
    table = metrics(workspace)
    assert (table[table.student == "sid"].flag == "contended").all()
    assert table[table.student == "sim"].status.str.startswith("missing").all()


def test_a_failed_run_is_a_row(broken):
    assert broken.last_run.returncode != 0
    table = metrics(broken)
    row = table[table.student == "sim"]
    assert list(row.status) == ["failed (training: the generator broke)"]
    assert set(table.student) == {"teacher", "teacher-1step", "floor", *STUDENTS}
    comparison = (broken.results / "tables" / "comparison.md").read_text()
    assert "incomplete: 1 of 6 runs failed" in comparison
    assert "failed (training: the generator broke)" in comparison
    assert not (broken.results / "manifest.json").exists()
    status = broken.run("harness", "status", "--configfile", "configs/tiny.yaml").stdout
    assert re.search(r"sim/seed0 +failed", status)
    assert "the generator broke" in status
    assert plan(broken) == ["all", "report", "score sim 0", "train sim 0"]


def test_the_next_command_resumes_the_failed_run_alone(broken, finished):
    log = (finished.results / "logs" / "students" / "sim" / "seed0.log").read_text()
    assert "resumed at 96 images" in log
    for name in ("sid", "gdd"):  # not run again
        logs = [w.results / "logs" / "students" / name / "seed0.log" for w in (broken, finished)]
        assert logs[0].stat().st_mtime == logs[1].stat().st_mtime
    assert (metrics(finished).status == "ok").all()
    assert "incomplete" not in (finished.results / "tables" / "comparison.md").read_text()
    assert (finished.results / "manifest.json").exists()


def test_a_failed_teacher_fails_every_student_by_name(workspace):
    config = workspace.config()
    config["teachers"]["edm"]["lr"] = 1e30
    config["training"]["max_nonfinite"] = 3
    workspace.write_config(config)
    assert workspace.stage("teacher", "edm").returncode != 0
    assert workspace.stage("report", "--partial").returncode == 0
    table = metrics(workspace)
    students = table[table.student.isin(STUDENTS)]
    assert list(students.student) == STUDENTS
    assert students.status.str.match(
        r"failed \(training: teacher edm: 4 consecutive non-finite steps in phase 'denoise' up to"
    ).all()


def test_a_second_teacher_from_elsewhere(workspace, tmp_path):
    """A denoiser folder as a teacher beside the trained one; each student names its own."""
    save_denoiser(tiny_denoiser(seed=3), tmp_path / "elsewhere")
    config = workspace.config()
    config["teachers"]["other"] = {"source": str(tmp_path / "elsewhere"), "sampler": {"steps": 3}}
    config["students"] = {
        "sid": config["students"]["sid"],
        "sid-other": {"method": "sid", "teacher": "other"},
    }
    workspace.write_config(config)
    assert plan(workspace) == [
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
    record = json.loads((workspace.results / "students/sid-other/seed0/student.json").read_text())
    assert record["teacher"] == "other"
    comparison = (workspace.results / "tables" / "comparison.md").read_text()
    assert "| teacher-1step/other" in comparison


def test_a_mistake_stops_the_workflow_before_any_job(empty_workspace):
    config = empty_workspace.config()
    config["students"]["sid"]["method"] = "sld"
    config["training"]["budget"][0]["amount"] = -1
    empty_workspace.write_config(config)
    done = empty_workspace.snakemake()
    output = done.stdout + done.stderr
    assert done.returncode != 0
    assert "students.sid.method: unknown method 'sld'; did you mean 'sid'?" in output
    assert "training.budget.0.amount: input should be greater than 0" in output
    assert "Traceback" not in output
    assert not empty_workspace.results.exists()


def kill_when(ready, pid: int, alive) -> None:
    """kill -9 a process as soon as `ready()`, and check that it had not ended."""
    deadline = time.monotonic() + 120
    while not ready():
        assert alive(), "ended before it could be killed"
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


def state_step(folder):
    """The step of the only state under a run's folder, or -1."""
    for path in folder.glob("runs/*/state.json"):
        try:
            return json.loads(path.read_text())["step"]
        except (OSError, ValueError):
            return -1
    return -1


@pytest.mark.parametrize(("student", "step"), zip(STUDENTS, (2, 4, 6, 8, 2, 6), strict=True))
def test_a_killed_run_resumes_bit_for_bit(finished, workspace, student, step):
    folder = workspace.results / "students" / student / "seed0"
    shutil.rmtree(folder)
    killed_stage(workspace, "train", student, "0", when=lambda: state_step(folder) >= step)
    assert not (folder / "student.json").exists()
    again = workspace.stage("train", student, "0")
    assert again.returncode == 0, again.stderr
    assert f"{student}/seed0: resumed at" in again.stderr
    original = finished.results / "students" / student / "seed0"
    mine, theirs = (json.loads((f / "student.json").read_text()) for f in (folder, original))
    for record in (mine, theirs):
        for snapshot in [record, *record["snapshots"]]:
            for measured in ("seconds", "peak_memory"):
                del snapshot["ledger"][measured]
            snapshot.get("before", {}).pop("seconds", None)
    if student == "sim":  # the finished one's file can be told to fail: another source and key
        for record in (mine, theirs):
            del record["key"], record["inputs"]["method"]
    assert mine == theirs
    logs = [
        pd.read_csv(f / "train.csv").drop(columns=["seconds", "images_per_second"])
        for f in (folder, original)
    ]
    assert logs[0].equals(logs[1])


@pytest.mark.parametrize(
    ("stage", "folder", "record"),
    [
        (["teacher", "edm"], "teachers/edm", "teacher.json"),
        (["features", "tiny-cnn"], "features/tiny-cnn", "features.json"),
    ],
)
def test_a_killed_teacher_or_feature_network_resumes_bit_for_bit(
    finished, workspace, stage, folder, record
):
    shutil.rmtree(workspace.results / folder)
    killed_stage(workspace, *stage, when=lambda: state_step(workspace.results / folder) >= 2)
    again = workspace.stage(*stage)
    assert again.returncode == 0 and "resumed at" in again.stderr, again.stderr
    mine, theirs = (
        json.loads((w.results / folder / record).read_text()) for w in (workspace, finished)
    )
    assert mine["sha256"] == theirs["sha256"]


def test_killed_sampling_gives_the_same_scores(finished, workspace):
    path = workspace.results / "scores" / "sid" / "seed0.json"
    before = path.read_text()
    path.unlink()
    log = workspace.root / "stderr.txt"
    scored = lambda: log.exists() and "scored" in log.read_text()  # noqa: E731
    killed_stage(workspace, "score", "sid", "0", when=scored)
    assert not path.exists()
    assert workspace.stage("score", "sid", "0").returncode == 0
    assert path.read_text() == before


def test_the_example_in_the_readme_survives_a_killed_snakemake(finished, example):
    """Diff-Instruct: copied into methods/, named in the experiment, run, and removed again."""
    assert len((DATA / "example" / "diff_instruct.py").read_text().splitlines()) <= 40
    assert example.killed_with == -signal.SIGKILL
    done = example.last_run
    assert done.returncode == 0, done.stdout + done.stderr
    table = metrics(example)
    others = table[table.student != "diff-instruct"].reset_index(drop=True)
    assert others.equals(metrics(finished))
    comparison = pd.read_csv(example.results / "tables" / "comparison.csv").set_index("student")
    assert comparison.status["diff-instruct"] == "ok"
    assert comparison["fd_n400_tiny-cnn"]["diff-instruct"] > 0
    (example.root / "methods" / "diff_instruct.py").unlink()
    gone = example.stage("status")
    assert gone.returncode != 0 and "unknown method 'diff_instruct'" in gone.stderr


def test_teacher_pairs_are_charged_to_the_student_that_uses_them(finished):
    pairs = json.loads(next(finished.results.glob("pairs/*/pairs.json")).read_text())
    assert pairs["evaluations"] == 64 * (2 * 3 - 1)
    run = finished.results / "students"
    with_pairs = json.loads((run / "dmd" / "seed0" / "student.json").read_text())["ledger"]
    without = json.loads((run / "dmd-noreg" / "seed0" / "student.json").read_text())["ledger"]
    assert with_pairs["images"] == without["images"] == 160
    assert with_pairs["charges"]["pairs"]["flops"] == pairs["flops"] > 0
    assert with_pairs["passes"]["teacher"][0] == without["passes"]["teacher"][0] + 64 * 5
    assert with_pairs["seconds"] > pairs["seconds"]


def test_the_noise_of_a_pair_is_known_by_its_number(finished):
    (folder,) = finished.results.glob("pairs/*")
    record, pairs = load_pairs(folder)
    assert pairs["x"].shape == (64, 1, 8, 8) and "z" not in pairs
    teacher = finished.results / "teachers" / "edm"
    denoiser = load_denoiser(teacher, json.loads((teacher / "teacher.json").read_text())["sha256"])
    index = torch.arange(10, 14)
    with torch.no_grad():
        z = PAIR_NOISE.normal(index, (1, 8, 8))
        x = heun(denoiser, z, pairs["condition"][index], **record["sampler"])
    torch.testing.assert_close(pairs["x"][index], x.float(), atol=1e-4, rtol=0)


def test_nothing_but_whole_files_is_left(finished):
    leftovers = [p for p in finished.results.rglob("*") if p.name.endswith(".tmp")]
    assert leftovers == []
    assert os.access(finished.results, os.R_OK)
