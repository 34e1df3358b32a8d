"""Starting a stage in several processes."""

import os
import sys


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
