# The validated experiment, and what every rule shares.
import re
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(workflow.basedir))

from snakemake.exceptions import WorkflowError

from harness.io.artifacts import canonical
from harness.workflow.cluster import read_cluster, request
from harness.validation import load_experiment
from harness.errors import UserError
from harness.workflow.machine import job_threads

OVERRIDES = dict(workflow.config_settings.config)
CLUSTER = OVERRIDES.pop("cluster", None)  # from a profile; no part of the experiment

try:
    E = load_experiment(workflow.configfiles, OVERRIDES)
    CLUSTER = read_cluster(CLUSTER) if CLUSTER is not None else None
    # profiles/default limits `gpu` to 1: jobs on the GPU take turns, jobs on CPU do not. A cluster
    # hands its GPUs out itself, and the machine that submits to it need not have one.
    GPU = 0 if CLUSTER else int(E.device.startswith("cuda"))
    CONFIG = E.write_snapshot()
except UserError as error:
    raise WorkflowError(str(error)) from None

if CLUSTER:
    # Each job of a cluster reads the experiment anew: the one of now, not a file edited since.
    workflow.config_settings.configfiles = [CONFIG.absolute()]

# The running interpreter; stages get the resolved experiment, kept under a name of its content.
HARNESS = f"{shlex.quote(sys.executable)} -m harness"
# A cluster counts cores itself: `cpus_per_task`, and `--exclusive` where seconds are a budget.
THREADS = 1 if CLUSTER else job_threads(workflow.cores)
# A budget in seconds is only fair on a machine of its own.
ALONE = workflow.cores if E.seconds_budget and not CLUSTER else THREADS


wildcard_constraints:
    student="|".join(map(re.escape, E.students)),
    seed=r"\d+",
    teacher="|".join(map(re.escape, E.teachers)),
    features="|".join(map(re.escape, E.features)),
    pairs="|".join(map(re.escape, E.pair_sets)) or "none",


def fetch_pretrained():
    """The pretrained weights that students ask for."""
    try:
        E.fetch_pretrained()
    except UserError as error:
        raise WorkflowError(str(error)) from None


def spec(value):
    """A part of the experiment as a job's parameter: the job is stale when the text changes."""
    return canonical(value)


def asked(rule):
    """What a rule's jobs ask a cluster for, as functions of a job; nothing without a cluster."""

    def of(resource):
        def value(wildcards, attempt):
            try:
                return request(E, CLUSTER, rule, *wildcards[:1], attempt=attempt)[resource]
            except UserError as error:
                raise WorkflowError(str(error)) from None

        return value

    return {name: of(name) for name in CLUSTER.asked(E, rule)} if CLUSTER else {}
