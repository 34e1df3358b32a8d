"""Logging: every line carries the time, the level and the name of the run."""

import logging
import sys
import time

STARTED = time.monotonic()  # of the process: commands import this module first
logger = logging.getLogger("harness")


def configure(level: int = logging.INFO) -> None:
    """Send the harness's messages to standard error."""
    logger.handlers[:] = [logging.StreamHandler(sys.stderr)]
    logger.setLevel(level)
    logger.propagate = False
    set_run_name("")


def set_run_name(name: str) -> None:
    """Prefix all further messages with the name of a run, such as `sid/seed0`."""
    prefix = f"{name}: " if name else ""
    line = f"%(asctime)s %(levelname)s {prefix}%(message)s"
    for handler in logger.handlers:
        handler.setFormatter(logging.Formatter(line, "%Y-%m-%d %H:%M:%S"))
