"""A stage on this machine: its processes, and the record of its failure."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from harness.io.artifacts import write_json

FAILURE = "failure.json"  # in the folder of what the stage would have made


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
