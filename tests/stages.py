"""Stages in processes of their own, without the seconds of imports that each would cost.

A fork server imports the libraries once; every stage then runs in a fresh fork of it, which can be
killed like any other process. Where the command itself is the point, tests start `python -m`.
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
        "harness.evaluation.score",
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
    """`python -m harness <arguments>` in `root`; its output goes to stdout.txt and stderr.txt."""
    process = _server.Process(target=_run, args=(root, arguments))
    process.start()
    return process
