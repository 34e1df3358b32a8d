"""`torchrun` without its own report: if a process fails or is interrupted, the process's own line
ends the output, and its exit status is that of the command."""

import logging
import signal
import sys

from harness.errors import INTERRUPTED


def main(arguments: list[str]) -> int:
    """Start the processes; `arguments` are those of torchrun. Returns the exit status."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    logging.disable(logging.ERROR)  # of torchrun itself; the processes log their own errors
    try:
        torchrun(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        number = -failure.exitcode  # such as SIGKILL where the host's memory is full
        print(f"error: process {rank} was ended by {signal.Signals(number).name}", file=sys.stderr)
        return 128 + number
    except (KeyboardInterrupt, SignalException):
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
