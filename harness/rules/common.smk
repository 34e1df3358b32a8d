# The validated experiment, and what every rule shares.
import re
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(workflow.basedir))

from snakemake.exceptions import WorkflowError

from harness.artifacts import canonical
from harness.config import load_experiment
from harness.errors import UserError
from harness.machine import job_threads

try:
    E = load_experiment(workflow.configfiles, dict(workflow.config_settings.config))
    # profiles/default limits `gpu` to 1: jobs on the GPU take turns, jobs on CPU do not.
    GPU = int(E.device.startswith("cuda"))
    CONFIG = E.write_snapshot()
except UserError as error:
    raise WorkflowError(str(error)) from None

# The running interpreter; stages get the resolved experiment, kept under a name of its content.
HARNESS = f"{shlex.quote(sys.executable)} -m harness"
THREADS = job_threads(workflow.cores)


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
