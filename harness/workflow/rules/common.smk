# The validated experiment, and helpers of all rules.
import os
import re
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(workflow.basedir))

from snakemake.exceptions import WorkflowError

from harness.method import method_source
from harness.errors import UserError
from harness.io.artifacts import canonical
from harness.students.inputs import fetch_pretrained as fetch
from harness.validation import load_experiment, load_snapshot
from harness.workflow.machine import job_threads

# `jobs` without `cores` submits to a cluster, where every job starts a Snakemake of its own.
CLUSTER = workflow.resource_settings.nodes is not None or not workflow.is_main_process
# That Snakemake reads the snapshot of the submitted experiment, not a file edited since.
SNAPSHOT = "HARNESS_SNAPSHOT"

try:
    if workflow.is_main_process:
        E = load_experiment(workflow.configfiles, dict(workflow.config_settings.config))
        os.environ[SNAPSHOT] = str(E.write_snapshot())
    else:
        E = load_snapshot(Path(os.environ[SNAPSHOT]))
    if not CLUSTER:
        E.check_device()
except UserError as error:
    raise WorkflowError(str(error)) from None


# Pass the variable to the jobs of any executor.
envvars:
    SNAPSHOT,


CONFIG = os.environ[SNAPSHOT]
GPU = 0 if CLUSTER else int(E.device.startswith("cuda"))  # profiles/slurm requests GPUs
HARNESS = f"{shlex.quote(sys.executable)} -m harness"
THREADS = 1 if CLUSTER else job_threads(workflow.cores)
# A budget in seconds is fair only without other jobs on the machine.
EXCLUSIVE_THREADS = workflow.cores if E.exclusive and not CLUSTER else THREADS
EXCLUSIVE = {"slurm_extra": "--exclusive"} if E.exclusive else {}


wildcard_constraints:
    student="|".join(map(re.escape, E.students)),
    seed=r"\d+",
    teacher="|".join(map(re.escape, E.teachers)),
    features="|".join(map(re.escape, E.features)),
    pairs="|".join(map(re.escape, E.pair_sets)) or "none",


def fetch_pretrained():
    """Download the pretrained weights that students need."""
    try:
        fetch(E.students.values())
    except UserError as error:
        raise WorkflowError(str(error)) from None


def spec(value):
    """Part of the experiment as a parameter of a job, which reruns when the part changes."""
    return canonical(value)
