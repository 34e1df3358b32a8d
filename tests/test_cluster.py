"""profiles/slurm: a dry run everywhere, and a run on a real Slurm where it is installed."""

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
    assert local.pop("resources") == {"gpu": 1}
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


@pytest.mark.cluster
@pytest.mark.skipif(bool(slurm.missing()), reason=slurm.missing() or "Slurm is installed")
def test_a_cancelled_job_resumes_and_the_tables_equal_a_local_run(tmp_path, record_property):
    pytest.importorskip("snakemake_executor_plugin_slurm")
    outcome = slurm.run(tmp_path, digits=False, limit=1200)
    record_property("Slurm", str(outcome))
    assert not outcome.problems, str(outcome)
