"""What this process may use of the machine it runs on."""

from __future__ import annotations

import math
import os
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
