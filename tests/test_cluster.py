"""profiles/slurm: a dry run everywhere, and a run on a real Slurm where it is installed."""

import re

import pytest
import yaml

from tests.conftest import ROOT
from tests.test_workflow import jobs
from tools import slurm


def test_the_profile_keeps_the_options_of_local_runs():
    local, cluster = (
        yaml.safe_load((ROOT / "profiles" / name / "profile.yaml").read_text())
        for name in ("default", "slurm")
    )
    assert local.pop("resources") == {"gpu_percent": 100}
    assert local.items() <= cluster.items()


@pytest.mark.slow
def test_jobs_request_gpus_that_the_submitting_machine_does_not_have(empty_workspace):
    pytest.importorskip("snakemake_executor_plugin_slurm")
    options = ["--profile", "profiles/slurm", "-n", "all", "--config", "device=cuda"]
    options += ["--configfile", "configs/tiny.yaml"]
    dry = empty_workspace.run("snakemake", *options)
    assert dry.returncode == 0, dry.stdout + dry.stderr
    resources = {
        job.split()[0]: next(line for line in text.splitlines() if "resources:" in line)
        for job, text in jobs(dry.stdout + dry.stderr).items()
        if job != "all"
    }
    gpu = {rule for rule, line in resources.items() if "gres=gpu:1" in line}
    assert gpu == {
        "features",
        "teacher",
        "pairs",
        "train",
        "score",
        "score_references",
        "agreement",
    }
    assert all("runtime=" in line and "mem_mb=" in line for line in resources.values())


STUB = """
import torch
from types import SimpleNamespace

torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_capability = lambda *device: (9, 0)
torch.cuda.get_rng_state = torch.cuda.set_rng_state = lambda *arguments: None  # no driver
torch.cuda.get_device_properties = lambda device: SimpleNamespace(total_memory=40 * 2**30)
"""


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_local_jobs_request_shares_of_a_gpu(empty_workspace, device):
    """Training requests its estimate, other jobs a whole GPU; on CPU there is no request."""
    (empty_workspace.root / "sitecustomize.py").write_text(STUB)
    dry = empty_workspace.snakemake("-n", "--config", f"device={device}")
    assert dry.returncode == 0, dry.stdout + dry.stderr
    percent = {
        job: int(found[1])
        for job, text in jobs(dry.stdout + dry.stderr).items()
        if (found := re.search(r"gpu_percent=(\d+)", text))
    }
    if device == "cpu":
        assert set(percent.values()) <= {0}
    else:
        shares = {name: share for name, share in percent.items() if share != 100}
        assert {name.split()[0] for name in shares} == {"train", "teacher"}
        assert len(shares) == 7 and all(5 <= share <= 20 for share in shares.values())
        assert {"features tiny-cnn", "pairs", "score sid 0"} <= {
            name if not name.startswith("pairs") else "pairs"
            for name, share in percent.items()
            if share == 100
        }


@pytest.mark.cluster
@pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing() or "Slurm is installed")
def test_a_cancelled_job_resumes_and_the_tables_equal_a_local_run(tmp_path, record_property):
    pytest.importorskip("snakemake_executor_plugin_slurm")
    outcome = slurm.run(tmp_path, digits=False, limit=1200)
    record_property("Slurm", str(outcome))
    assert not outcome.problems, str(outcome)
