"""What this process may use of the machine it runs on."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path


def usable_cpus() -> int:
    """Cores that this process may really use: its affinity, and its control group's quota."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        count = os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return count


def job_threads(cores: int | None) -> int:
    """Snakemake threads that a one-thread job declares, so that no more jobs run than cores exist.

    `--cores 8` on two cores would start eight jobs, each several times slower; with four of the
    eight declared by each, two run.
    """
    return max(1, math.ceil((cores or 1) / usable_cpus()))


def is_first() -> bool:
    """Whether this process leads those that torchrun started, or is alone."""
    return os.environ.get("RANK", "0") == "0"


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def relaunch(count: int, arguments: list[str]) -> None:
    """Become torchrun with `count` processes of `python -m harness <arguments>`, unless this is one
    of them already, or one is enough."""
    if count == 1 or launched():
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={count}", "-m", "harness", *arguments]
    sys.stderr.flush()
    os.execv(sys.executable, command)
