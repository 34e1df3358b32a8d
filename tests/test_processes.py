"""Two processes (torchrun with gloo, on CPU) compute the same as one."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from harness.errors import UserError
from harness.io.artifacts import read_json
from harness.training.distributed import Processes
from harness.validation import parse_experiment
from tests.conftest import ROOT
from tests.together import STUDENTS, work

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Folder and losses of one process, and of two."""
    one, two = (tmp_path_factory.mktemp(name) for name in ("one", "two"))
    command = [sys.executable, *TORCHRUN, "-m", "tests.together", str(two)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    losses = work(one)
    assert not process.wait(timeout=300), process.stderr.read()
    return (one, losses), (two, json.loads((two / "losses.json").read_text()))


@pytest.mark.slow
@pytest.mark.parametrize("student", STUDENTS)
def test_losses_do_not_depend_on_the_number_of_processes(both, student):
    (_, one), (_, two) = both
    *a, one_costs = one[student]
    *b, two_costs = two[student]
    assert len(a) == 20 and all(len(row) > 0 for row in a)
    width = max(map(len, a))  # R1 adds a loss in some iterations
    a, b = (torch.tensor([row + [0.0] * (width - len(row)) for row in rows]) for rows in (a, b))
    # Relative to the largest loss of the run, at least 1: SiD's and SIM's losses are differences of
    # nearly equal numbers.
    assert ((a - b).abs().amax(dim=0) <= 1e-5 * a.abs().amax(dim=0).clamp_min(1)).all()
    assert two_costs == one_costs  # operations and passes, summed over processes


@pytest.mark.slow
def test_processes_agree_on_the_first_process_value(both):
    (one, _), (two, _) = both
    assert [p.read_text() for p in one.glob("agreed*")] == ["7.5"]
    assert [p.read_text() for p in two.glob("agreed*")] == ["7.5", "7.5"]


@pytest.mark.slow
def test_samples_are_the_same_bytes(both):
    a, b = (torch.load(folder / "images.pt", weights_only=True) for folder, _ in both)
    assert len(a[0]) == 600
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_shares_of_a_batch():
    shares = [Processes(rank, 4).share(64) for rank in range(4)]
    assert [i for share in shares for i in share] == list(range(64))
    with pytest.raises(UserError) as error:
        Processes(0, 5).share(64)
    assert error.value.code == "batch-size"


@pytest.mark.parametrize(("setting", "batch", "count"), [(1, 16, 1), (2, 16, 2), (3, 16, 2)])
def test_number_of_processes_divides_the_batch(tiny, setting, batch, count):
    experiment = parse_experiment(tiny | {"processes": setting}, "tiny")
    assert experiment.processes(batch) == count
    assert parse_experiment(tiny, "tiny").processes(batch) == 1  # on CPU


def test_stages_start_their_processes(workspace):
    """Train, score and generate pairs with two processes; scores equal those of one process."""
    config = workspace.config()
    config["students"] = {"dmd": config["students"]["dmd"]}
    config["training"]["seeds"] = [5]
    one = workspace.write_config(config, "one")
    two = workspace.write_config(config | {"processes": 2}, "two")
    options = ("--configfile", f"configs/{two.name}")
    done = workspace.run("harness", "train", "dmd", "5", *options)
    assert done.returncode == 0, done.stderr
    run = workspace.results / "students/dmd/seed5"
    record = read_json(run / "student.json")
    assert record["processes"] == 2 and record["ledger"]["images"] == 160
    assert load_file(run / "model/diffusion_pytorch_model.safetensors")
    path_of_scores, scores = workspace.results / "scores/dmd/seed5.json", []
    for path in (two, one):
        done = workspace.run("harness", "score", "dmd", "5", "--configfile", f"configs/{path.name}")
        assert done.returncode == 0, done.stderr
        scores.append(path_of_scores.read_bytes())
    assert scores[0] == scores[1]
    pairs = workspace.results / "pairs/edm_n64_steps3"
    before = load_file(next(pairs.rglob("*.safetensors")))
    shutil.rmtree(pairs)
    done = workspace.run("harness", "pairs", "edm_n64_steps3", *options)
    assert done.returncode == 0, done.stderr
    after = load_file(next(pairs.rglob("*.safetensors")))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_failure_of_several_processes_is_recorded(workspace):
    config = workspace.config() | {"processes": 2}
    config["training"]["seeds"] = [6]
    config["training"]["max_nonfinite"] = 0
    config["training"]["settings"]["lr"] = 1e30
    config["training"]["budget"] = [{"unit": "images", "amount": 1600}]
    path = workspace.write_config(config, "broken")
    done = workspace.run("harness", "train", "sid", "6", "--configfile", f"configs/{path.name}")
    assert done.returncode != 0
    assert "error: sid/seed6: 1 consecutive non-finite steps" in done.stderr
    reason = read_json(workspace.results / "students/sid/seed6/failure.json")["reason"]
    assert "consecutive non-finite steps" in reason
