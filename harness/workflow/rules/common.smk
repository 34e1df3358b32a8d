# The validated experiment, and values that all rules use.
import contextlib
import math
import os
import re
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(workflow.basedir))

from harness.workflow.interruption import Interruption

# Before the imports that take seconds: Ctrl-C gives no traceback from them, either.
INTERRUPTION = Interruption()
if workflow.is_main_process:
    INTERRUPTION.install()

import joblib
from snakemake.exceptions import WorkflowError

from harness.errors import INTERRUPTED, UserError, file_system_error, file_system_message
from harness.io import environment

# A parameter of each job: the part of the experiment that its results depend on.
from harness.io.artifacts import canonical as spec
from harness.students.inputs import fetch_pretrained
from harness.validation import load_experiment, load_snapshot

# Jobs run the code of this file's folder, whatever their working directory.
os.environ["PYTHONPATH"] = environment.joined_path(workflow.basedir)
environment.prepare()


@contextlib.contextmanager
def one_line_errors():
    """Report an error that the user can fix as Snakemake reports its own, without a traceback."""
    try:
        yield
    except UserError as error:
        raise WorkflowError(str(error)) from None
    except Exception as error:
        if (found := file_system_error(error)) is None:
            raise
        raise WorkflowError(file_system_message(found)) from None


# `jobs` without `cores` submits to a cluster, where every job starts a Snakemake of its own.
CLUSTER = workflow.resource_settings.nodes is not None or not workflow.is_main_process
# That Snakemake reads the snapshot of the submitted experiment, not a file edited since.
SNAPSHOT = "HARNESS_SNAPSHOT"

with one_line_errors():
    if workflow.is_main_process:
        E = load_experiment(workflow.configfiles, dict(workflow.config_settings.config))
        os.environ[SNAPSHOT] = str(E.write_snapshot())
    else:
        E = load_snapshot(Path(os.environ[SNAPSHOT]))
    if not CLUSTER:
        E.check_device()


# Pass the variable to the jobs of any executor.
envvars:
    SNAPSHOT,


ROOT = E.paths.root
CONFIG = os.environ[SNAPSHOT]
GPU = 0 if CLUSTER else int(E.device.startswith("cuda"))  # profiles/slurm requests GPUs
# The share of a GPU in percent, of which profiles/default has 100. Feature networks, pairs and
# scores have no estimate of their memory: such a job uses the whole GPU.
WHOLE_GPU = 100 * GPU
HARNESS = f"{shlex.quote(sys.executable)} -m harness"
# Each job computes on one thread. With `--cores 8` on two cores, a job declares four of the eight
# threads, and two jobs run.
THREADS = 1 if CLUSTER else math.ceil((workflow.cores or 1) / joblib.cpu_count())
# A budget in seconds is fair only without other jobs on the machine.
EXCLUSIVE_THREADS = workflow.cores if E.exclusive and not CLUSTER else THREADS
EXCLUSIVE = {"slurm_extra": "--exclusive"} if E.exclusive else {}


def gpu_percent(kind, name):
    """What a training job requires of a GPU (`harness.workflow.plan.gpu_percent`)."""
    if not GPU:
        return 0
    from harness.workflow import plan  # only where it is needed: it imports all networks

    return plan.gpu_percent(E, kind, name)


def one_of(names):
    """The pattern of a wildcard that is one of the names."""
    return "|".join(map(re.escape, names)) or "none"


wildcard_constraints:
    student=one_of(E.students),
    seed=r"\d+",
    teacher=one_of(E.teachers),
    features=one_of(E.features),
    pairs=one_of(E.pair_sets),
