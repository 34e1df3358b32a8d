"""Locks: one process per run, and exclusive use of the machine for budgets in seconds."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Allow one process at a time to work on a folder; the system frees the lock of a dead process.

    A second process waits: the first one may be the orphan of a killed Snakemake and finish the
    work.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    timeout = 0
    while not lock.is_locked:
        try:
            lock.acquire(timeout=timeout)
        except Timeout:
            logger.info("waiting for another process to finish with %s", folder)
            timeout = 60
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def machine_slot(exclusive: bool = False) -> Iterator[bool]:
    """Share the machine with other stages, or reserve it for a budget in seconds.

    Yields whether the request was granted. An exclusive stage runs even if other stages do; its
    timing must then be flagged `contended`. Other stages wait for a running exclusive one.
    """
    import fcntl

    path = Path(tempfile.gettempdir()) / f"onestep-harness-{os.getuid()}.slot"
    with open(path, "w") as file:
        granted = True
        if exclusive:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                granted = False
        if not exclusive or not granted:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("waiting: a run with a budget in seconds has reserved the machine")
                fcntl.flock(file, fcntl.LOCK_SH)
        yield granted
