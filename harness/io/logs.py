"""Logging: every line carries the time, the level and the name of the run."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from contextvars import ContextVar

FORMAT = "%(asctime)s %(levelname)s %(run)s%(message)s"
_run: ContextVar[str] = ContextVar("run", default="")


def _add_run_name(record: logging.LogRecord) -> bool:
    record.run = f"{_run.get()}: " if _run.get() else ""
    return True


def configure(level: int = logging.INFO) -> None:
    """Send the harness's messages to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(FORMAT, "%Y-%m-%d %H:%M:%S"))
    handler.addFilter(_add_run_name)
    logger = logging.getLogger("harness")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False


@contextlib.contextmanager
def run_name(name: str) -> Iterator[None]:
    """Prefix all messages inside the block with the name of a run, such as `sid/seed0`."""
    token = _run.set(name)
    try:
        yield
    finally:
        _run.reset(token)
