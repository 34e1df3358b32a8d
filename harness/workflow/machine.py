"""A stage on this machine: its processes, and the record of its failure."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from harness.io.artifacts import write_json
from harness.io.environment import for_torchrun, is_first, launched

FAILURE = "failure.json"  # in the folder of what the stage would have made


def relaunch(count: int, arguments: list[str]) -> None:
    """Run `python -m harness <arguments>` in `count` processes instead of this one. Return if one
    process is enough, or if torchrun started this process."""
    if count == 1 or launched():
        return
    command = [sys.executable, "-m", "harness.workflow.torchrun", "--standalone", "--nnodes=1"]
    command += [f"--nproc-per-node={count}", "-m", "harness", *arguments]
    sys.stderr.flush()
    os.execve(sys.executable, command, for_torchrun(os.environ))


@contextlib.contextmanager
def record_failure(folder: Path, stage: str) -> Iterator[None]:
    """Write `failure.json` if the block raises; a new attempt removes the old record."""
    if is_first():
        (folder / FAILURE).unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        with contextlib.suppress(OSError):  # the disk may be full
            write_json(folder / FAILURE, {"stage": stage, "reason": reason})
        raise
