"""CPU cores of this machine, and starting a stage in several processes."""

import math
import os
import sys


def job_threads(cores: int | None) -> int:
    """Snakemake threads that a single-threaded job declares, so that jobs do not outnumber cores.

    With `--cores 8` on two cores, each job declares four of the eight threads, and two jobs run.
    """
    import joblib

    return max(1, math.ceil((cores or 1) / joblib.cpu_count()))


def is_first() -> bool:
    """Whether this process is the only one of its stage, or rank 0 under torchrun."""
    return os.environ.get("RANK", "0") == "0"


def launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def relaunch(count: int, arguments: list[str]) -> None:
    """Run `python -m harness <arguments>` in `count` processes instead of this one. Return if one
    process is enough, or if torchrun started this process."""
    if count == 1 or launched():
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={count}", "-m", "harness", *arguments]
    sys.stderr.flush()
    os.execv(sys.executable, command)
