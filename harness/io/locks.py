"""Locks: one process per run, and the machine alone for budgets in seconds."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Keep two processes from working on the same run; the system frees it when a process dies.

    A second process waits: it may be the orphan of a killed Snakemake, and when it is done the
    work is done.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    waited = False
    while True:
        try:
            lock.acquire(timeout=0 if not waited else 60)
            break
        except Timeout:
            print(f"waiting: another process works on {folder}", file=sys.stderr, flush=True)
            waited = True
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def machine_slot(exclusive: bool = False) -> Iterator[bool]:
    """Share the machine with other stages, or have it alone for a budget counted in seconds.

    Yields True if the wish was granted: a stage that asks for the machine alone and finds another
    at work goes on beside it, and its timing is to be flagged `contended`. Stages that start
    while one has the machine alone wait for it.
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
                print("waiting: a run with a budget in seconds has the machine", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_SH)
        yield granted
