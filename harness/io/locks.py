"""Locks: one process per run, and exclusive use of the machine for budgets in seconds."""

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)
LOCK = ".lock"  # in the folder of a run
MODE = 0o664  # of lock files: members of a group may share results and caches


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Allow one process at a time to work on a folder; the system frees the lock of a dead process.
    A second one waits: the first may be the orphan of a killed Snakemake and finish the work."""
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, mode=MODE)
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        logger.info("waiting for another process to finish with %s", folder)
        held = lock.acquire()
    with held:
        yield


def is_locked(folder: Path) -> bool:
    """Whether a process works on a folder. Reads the lock file only, as another user may; False if
    it cannot be read."""
    import fcntl

    try:
        with open(folder / LOCK, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


@contextlib.contextmanager
def machine_slot(exclusive: bool = False) -> Iterator[bool]:
    """Share the machine with other stages, or reserve it for a budget in seconds; yields whether
    this was granted. An exclusive stage runs even if others do; its timing must then be flagged
    `contended`. Others wait for a running exclusive one."""
    import fcntl

    def locked(kind: int) -> bool:
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        return False

    path = Path(tempfile.gettempdir()) / f"onestep-harness-{os.getuid()}.slot"
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW  # not a link of another user
    with open(os.open(path, flags, 0o600), "w") as file:
        reserved = exclusive and locked(fcntl.LOCK_EX)
        if not reserved and not locked(fcntl.LOCK_SH):
            logger.info("waiting: a run with a budget in seconds has reserved the machine")
            fcntl.flock(file, fcntl.LOCK_SH)
        yield reserved or not exclusive
