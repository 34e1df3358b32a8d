"""What jobs ask a cluster for, and the workflow on a real Slurm where there is one."""

import json
import math
import os
import re
import tempfile
from pathlib import Path

import pytest
import yaml

from harness.errors import UserError
from harness.validation import load_experiment, parse_experiment
from harness.workflow.cluster import (
    CPU_MB,
    GPU_MB,
    MINUTES,
    ON_DEVICE,
    SAFETY,
    Cluster,
    read_cluster,
    request,
)
from harness.workflow.plan import COUNTED, Work, estimate, work
from tests.cluster.run import missing, run
from tests.conftest import ROOT

RULES = (*ON_DEVICE, "data", "report")
PROFILE = ROOT / "profiles" / "slurm" / "profile.yaml"
SLOW = Cluster(gpu_tflops=1e-4, cpu_tflops=1e-6)  # so that a small experiment takes hours


@pytest.fixture
def experiment(tiny, tmp_path):
    """The tiny experiment with changes at its top level."""
    return lambda **changes: parse_experiment(tiny | changes, "tiny.yaml", tmp_path)


@pytest.fixture
def counted(monkeypatch):
    """Runs whose work is known: to count one takes seconds."""
    monkeypatch.setitem(COUNTED, "train", lambda *_: Work(flops=1e12, own=2**30, snapshots=20))


def test_minutes_and_memory_of_a_run_are_those_that_are_planned(experiment):
    asked, planned = request(experiment(), SLOW, "train", "dmd"), estimate(experiment(), "dmd")
    # Its pairs count in its budget, and are made by a job of their own.
    assert work(experiment(), "pairs", "edm_n64_steps3").flops == planned.pair_flops
    seconds = (planned.flops - planned.pair_flops) / 1e6
    assert asked["runtime"] == MINUTES + math.ceil(SAFETY * seconds / 60) > 2 * MINUTES
    assert asked["mem_mb"] == CPU_MB + math.ceil(1.25 * planned.memory / 2**20)


def test_a_job_tried_again_gets_more_memory_and_no_more_time(experiment, counted):
    first, third = (request(experiment(), SLOW, "train", "sid", attempt=n) for n in (1, 3))
    assert third == first | {"mem_mb": 3 * first["mem_mb"]}


def test_a_partition_s_limit_cuts_what_is_asked(experiment, counted):
    short = SLOW.model_copy(update={"longest": 45})
    assert request(experiment(), short, "train", "sid")["runtime"] == 45
    assert request(experiment(), short, "report")["runtime"] == MINUTES


def test_an_experiment_on_cpu_asks_for_no_gpu(experiment):
    cluster = SLOW.model_copy(update={"gpu_partition": "gpu", "cpu_partition": "cpu"})
    for rule in RULES:
        assert "gres" not in cluster.asked(experiment(), rule)
        assert request(experiment(), cluster, "report")["slurm_partition"] == "cpu"


@pytest.mark.parametrize("device", ["auto", "cuda", "cuda:0"])
def test_a_gpu_for_each_process(experiment, counted, device):
    """Whatever the submitting machine has. Reading and drawing take none."""
    many = experiment(device=device, processes=3)
    names = {"gpu_partition": "gpu", "cpu_partition": "cpu", "gres": "gpu:a100", "account": "me"}
    cluster = SLOW.model_copy(update=names)
    for rule in ON_DEVICE:
        assert {"gres", "slurm_partition", "slurm_account"} <= set(cluster.asked(many, rule))
    for rule in ("data", "report"):
        assert "gres" not in cluster.asked(many, rule)
        assert request(many, cluster, rule)["slurm_partition"] == "cpu"
    asked = {
        "score_references": request(many, cluster, "score_references", "edm"),
        "train": request(many, cluster, "train", "sid"),
        "features": request(many, cluster, "features", "tiny-cnn"),
    }
    # Three cannot share batches of 16; two can.
    gpus = {"score_references": 3, "train": 2, "features": 1}
    for rule, count in gpus.items():
        assert asked[rule]["gres"] == f"gpu:a100:{count}"
        assert asked[rule]["cpus_per_task"] == count
        assert asked[rule]["slurm_partition"] == "gpu"
        assert asked[rule]["mem_mb"] > count * GPU_MB


def test_a_budget_in_seconds_asks_for_them_and_a_node_alone(experiment, tiny):
    assert not any("slurm_extra" in SLOW.asked(experiment(), rule) for rule in RULES)
    tiny["training"]["budget"] = [{"unit": "seconds", "amount": 1800}]
    timed = experiment(training=tiny["training"])
    asked = request(timed, SLOW, "train", "sid")
    assert asked["runtime"] == MINUTES + SAFETY * 30
    alone = {rule for rule in RULES if "slurm_extra" in SLOW.asked(timed, rule)}
    assert alone == {"train", "pairs"} and asked["slurm_extra"] == "--exclusive"


def test_every_paper_s_job_can_be_asked_for(counted, tmp_path):
    """Imported teachers, fetched networks, data that is not there. (Runs: test_paper_configs.py.)"""
    path = ROOT / "configs" / "paper" / "imagenet64.yaml"
    paper = load_experiment(path, results=tmp_path, files=False)
    cluster = Cluster(gpu_tflops=100, cpu_tflops=0.01)
    names = {
        "data": [""],
        "features": paper.features,
        "teacher": paper.teachers,
        "pairs": paper.pair_sets,
        "score": list(paper.students)[:1],
        "score_references": paper.teachers,
        "report": [""],
    }
    for rule, mine in names.items():
        for name in mine:
            asked = request(paper, cluster, rule, name)
            assert MINUTES <= asked["runtime"] < 7 * 24 * 60, rule
            assert CPU_MB <= asked["mem_mb"] < 128 * 1024, rule


def test_work_is_counted_once(experiment, monkeypatch):
    first = work(experiment(), "teacher", "edm")
    monkeypatch.setitem(COUNTED, "teacher", None)
    assert work(experiment(), "teacher", "edm") == first
    with pytest.raises(TypeError):  # a changed experiment is another
        work(experiment(name="other"), "teacher", "edm")


def test_counted_work_is_what_is_spent(finished):
    """Of what the workflow trained: the same operations as its ledgers measured."""
    with tempfile.TemporaryDirectory() as folder:
        tiny = parse_experiment(finished.config(), "", Path(folder))
        for rule, name, file in (
            ("teacher", "edm", "teachers/edm/teacher.json"),
            ("features", "tiny-cnn", "features/tiny-cnn/features.json"),
            ("features", "tiny-clip", "features/tiny-clip/features.json"),
            ("features", "tiny-critic", "features/tiny-critic/features.json"),
        ):
            spent = json.loads((finished.results / file).read_text())["ledger"]["flops"]
            assert work(tiny, rule, name).flops == pytest.approx(spent, rel=0.1), name
        pairs = json.loads((finished.results / "pairs/edm_n64_steps3/pairs.json").read_text())
        assert work(tiny, "pairs", "edm_n64_steps3").flops == pytest.approx(pairs["flops"])
        student = json.loads((finished.results / "students/sid/seed0/student.json").read_text())
        assert work(tiny, "train", "sid").snapshots == len(student["snapshots"])


def test_the_plain_command_asks_for_nothing(finished):
    said = finished.last_run.stdout + finished.last_run.stderr
    assert "rule train:" in said and "runtime=" not in said and "gres=" not in said
    assert not (finished.results / "config" / "work").exists()


def test_a_profile_s_mistakes_are_told_at_once():
    with pytest.raises(UserError) as caught:
        read_cluster({"gpu_tflop": 3, "cpu_tflops": "fast", "gres": "gpu:1:2"})
    lines = str(caught.value).splitlines()
    assert len(lines) == 5 and "did you mean 'gpu_tflops'?" in str(caught.value)
    assert all(line.strip().startswith("cluster.") for line in lines[1:])


def test_the_profile_is_whole():
    profile = yaml.safe_load(PROFILE.read_text())
    assert profile["executor"] == "slurm" and profile["retries"] >= 1 and profile["jobs"] > 1
    read_cluster(profile["config"]["cluster"])
    # What the plain command has and a cluster's does not say otherwise.
    default = yaml.safe_load((ROOT / "profiles" / "default" / "profile.yaml").read_text())
    assert default.pop("resources") == {"gpu": 1} and "resources" not in profile
    assert default.items() <= profile.items()
    # So is what it offers in comments.
    offered = dict(re.findall(r"^    # (\w+): (\S+)", PROFILE.read_text(), re.MULTILINE))
    assert len(offered) == 4
    read_cluster(profile["config"]["cluster"] | offered)


def test_a_dry_run_shows_what_is_asked(empty_workspace):
    """On a machine without a GPU, for an experiment that needs one."""
    pytest.importorskip("snakemake_executor_plugin_slurm")
    config = empty_workspace.config()
    config["device"] = "cuda"
    config["students"] = {"gdd-i": config["students"]["gdd-i"]}
    empty_workspace.write_config(config)
    until = ["--profile", "profiles/slurm", "-n", "--until", "teacher"]
    dry = empty_workspace.run("snakemake", *until, "all", "--configfile", "configs/tiny.yaml")
    said = dry.stdout + dry.stderr
    assert dry.returncode == 0, said
    resources = {
        block.split(":")[0]: next(x for x in block.splitlines() if "resources:" in x)
        for block in said.split("\nrule ")[1:]
    }
    assert "gres=gpu:1" in resources["teacher"] and "gres" not in resources["data"]
    for line in resources.values():
        assert "runtime=" in line and "mem_mb=" in line


@pytest.mark.skipif(bool(missing()), reason=missing() or "it is there")
@pytest.mark.skipif("TEST_SLURM" not in os.environ, reason="it takes minutes: set TEST_SLURM=1")
def test_on_slurm(record_property):
    """Submitted, one job cancelled, tried again, and the table of a local run: tests/cluster."""
    pytest.importorskip("snakemake_executor_plugin_slurm")
    with tempfile.TemporaryDirectory(prefix="onestep-slurm-") as folder:
        outcome = run(Path(folder), digits=False, limit=1200)
    record_property("Slurm", str(outcome))
    assert not outcome.problems, str(outcome)
