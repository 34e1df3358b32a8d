"""Several processes give what one gives: torchrun with gloo, on CPU."""

import json
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
    """Folder and losses of one process and of two."""
    alone, two = (tmp_path_factory.mktemp(name) for name in ("alone", "two"))
    command = [sys.executable, *TORCHRUN, "-m", "tests.together", str(two)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    losses = work(alone)
    assert not process.wait(timeout=300), process.stderr.read()
    return (alone, losses), (two, json.loads((two / "losses.json").read_text()))


@pytest.mark.parametrize("student", STUDENTS)
def test_losses_do_not_depend_on_the_number_of_processes(both, student):
    (_, alone), (_, two) = both
    *a, counts = alone[student]
    *b, their_counts = two[student]
    assert len(a) == 20 and all(len(row) > 0 for row in a)
    a, b = torch.tensor(a), torch.tensor(b)
    # Of a loss's size over the run, if that is above 1: SiD's and SIM's are differences of what is
    # nearly equal.
    assert ((a - b).abs().amax(dim=0) <= 1e-5 * a.abs().amax(dim=0).clamp_min(1)).all()
    assert their_counts == counts  # operations and passes of all processes together


def test_what_the_first_process_says_holds_for_all(both):
    (alone, _), (two, _) = both
    assert [p.read_text() for p in alone.glob("agreed*")] == ["7.5"]
    assert [p.read_text() for p in two.glob("agreed*")] == ["7.5", "7.5"]


def test_samples_are_the_same_bytes(both):
    (alone, _), (two, _) = both
    a, b = (torch.load(folder / "images.pt", weights_only=True) for folder in (alone, two))
    assert len(a[0]) == 600
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_shares_of_a_batch():
    shares = [Processes(rank, 4).share(64) for rank in range(4)]
    assert [i for share in shares for i in share] == list(range(64))
    with pytest.raises(UserError) as error:
        Processes(0, 5).share(64)
    assert error.value.code == "batch-size"


@pytest.mark.parametrize(("wanted", "batch", "count"), [(1, 16, 1), (2, 16, 2), (3, 16, 2)])
def test_no_more_processes_than_share_the_batch(tiny, wanted, batch, count):
    experiment = parse_experiment(tiny | {"processes": wanted}, "tiny")
    assert experiment.processes(batch) == count
    assert parse_experiment(tiny, "tiny").processes(batch) == 1  # on CPU


def test_a_stage_starts_its_processes_itself(workspace):
    """Training, pairs and scoring with two processes; scores of the same weights are the same."""
    config = workspace.config()
    config["students"] = {"dmd": config["students"]["dmd"]}
    config["training"]["seeds"] = [5]
    alone = workspace.write_config(config, "alone")
    together = workspace.write_config(config | {"processes": 2}, "together")
    options = ("--configfile", f"configs/{together.name}")
    done = workspace.run("harness", "train", "dmd", "5", *options)
    assert done.returncode == 0, done.stderr
    run = workspace.results / "students/dmd/seed5"
    record = read_json(run / "student.json")
    assert record["processes"] == 2 and record["ledger"]["images"] == 160
    assert load_file(run / "model/diffusion_pytorch_model.safetensors")
    scores = workspace.results / "scores/dmd/seed5.json"
    found = []
    for path in (together, alone):
        done = workspace.run("harness", "score", "dmd", "5", "--configfile", f"configs/{path.name}")
        assert done.returncode == 0, done.stderr
        found.append(scores.read_bytes())
    assert found[0] == found[1]
    (workspace.results / "pairs/edm_n64_steps3/pairs.json").unlink()
    before = load_file(
        next((workspace.results / "pairs/edm_n64_steps3").rglob("shard*.safetensors"))
    )
    for file in (workspace.results / "pairs/edm_n64_steps3").rglob("shard*"):
        file.unlink()
    done = workspace.run("harness", "pairs", "edm_n64_steps3", *options)
    assert done.returncode == 0, done.stderr
    after = load_file(
        next((workspace.results / "pairs/edm_n64_steps3").rglob("shard*.safetensors"))
    )
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_failure_of_several_processes_is_recorded_and_told(workspace):
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
