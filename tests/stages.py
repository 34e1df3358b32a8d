"""Start stages in processes of a fork server, which imports the libraries only once.

Every stage runs in a fresh fork, which can be killed like any other process. Tests of the command
line itself start `python -m harness`.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    [
        "harness.cli",
        "harness.validation",
        "harness.evaluation.stage",
        "harness.features.small_clip",
        "harness.reporting.report",
        "harness.students.run",
        "diffusers.models.unets.unet_2d",
        "torch._dynamo",
    ]
)


def _run(root: Path, arguments: list[str]) -> None:
    os.chdir(root)
    for number, name in ((1, "stdout.txt"), (2, "stderr.txt")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    from harness.cli import main

    sys.exit(main(arguments))


def start(root: Path, arguments: list[str]) -> multiprocessing.Process:
    """Start `harness <arguments>` in `root`, with its output in stdout.txt and stderr.txt."""
    process = _server.Process(target=_run, args=(root, arguments))
    process.start()
    return process
