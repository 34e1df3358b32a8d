"""Ctrl-C in the workflow: say at once what happens, and tell an interruption from a failure."""

import logging
import os
import signal
import sys
import threading

from harness.errors import INTERRUPTED

CONTINUES = "The same command continues."


class Interruption:
    """Handles SIGINT in Snakemake's main process. The first one stops the workflow as Snakemake
    does: jobs, which a terminal interrupts as well, end, and `onerror` runs. The second one ends
    the process without a report."""

    def __init__(self):
        self.interrupted = self.started = False

    def install(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number, frame) -> None:
        if self.interrupted or not self.started:
            self._say(f"Interrupted. {CONTINUES}")
            os._exit(INTERRUPTED)  # no thread, and no second report, is waited for
        self.interrupted = True
        self._say(f"Interrupted: jobs stop, and a partial report is being written. {CONTINUES}")
        # From now on Snakemake reports jobs that the same signal has ended, as failures.
        logging.getLogger("snakemake.logging").addFilter(lambda record: False)
        raise SystemExit(INTERRUPTED)  # Snakemake treats it like KeyboardInterrupt

    @staticmethod
    def _say(text: str) -> None:
        os.write(sys.stderr.fileno(), f"\n{text}\n".encode())  # safe inside another print
