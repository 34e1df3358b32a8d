"""Shared fixtures: the tiny experiment, and copies of the project in which it has been run."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock

from tests import stages

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(__file__).parent / "data"

os.environ["OMP_NUM_THREADS"] = "1"  # for processes that tests start
os.environ["MPLBACKEND"] = "agg"  # as commands set it: a notebook's may not be installed
torch.set_num_threads(1)
if not torch.cuda.is_available():  # Triton's kernels run in its interpreter
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def logs_reach_caplog(monkeypatch):
    """`harness.io.logs.configure`, which commands call, stops propagation for the whole process."""
    monkeypatch.setattr(logging.getLogger("harness"), "propagate", True)


class Workspace:
    """A copy of the project with the tiny experiment as configs/tiny.yaml."""

    def __init__(self, root: Path):
        self.root = root

    @classmethod
    def create(cls, root: Path) -> Workspace:
        root.mkdir(parents=True)
        for name in ("harness", "methods", "profiles"):
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy2(ROOT / "Snakefile", root / "Snakefile")
        (root / "configs").mkdir()
        shutil.copy(DATA / "tiny.yaml", root / "configs" / "tiny.yaml")
        return cls(root)

    def clone(self, root: Path) -> Workspace:
        """A copy with all results. Modification times are copied, so nothing becomes stale."""
        shutil.copytree(self.root, root, symlinks=True)
        return Workspace(root)

    @property
    def results(self) -> Path:
        return self.root / "results" / "tiny"

    def config(self) -> dict:
        return yaml.safe_load((self.root / "configs" / "tiny.yaml").read_text())

    def write_config(self, config: dict, name: str = "tiny") -> Path:
        path = self.root / "configs" / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        return path

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", *arguments]

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(self.root)}

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(*arguments),
            cwd=self.root,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=900,
        )

    def stage(self, *arguments: str) -> subprocess.CompletedProcess:
        """Run one stage of the tiny experiment to its end."""
        process = stages.start(self.root, [*arguments, "--configfile", "configs/tiny.yaml"])
        process.join(timeout=300)
        assert process.exitcode is not None
        output = [(self.root / name).read_text() for name in ("stdout.txt", "stderr.txt")]
        return subprocess.CompletedProcess(arguments, process.exitcode, *output)

    def snakemake(
        self, *arguments: str, config: str = "tiny", **environment: str
    ) -> subprocess.CompletedProcess:
        options = ["--cores", "8", "all", "--configfile", f"configs/{config}.yaml"]
        return self.run("snakemake", *options, *arguments, **environment)


# SIM with a failure at its seventh step while the environment variable BREAK is set.
BREAK = """
    def generator_loss(self, context):
        import os

        if context.step >= 6 and os.environ.get("BREAK"):
            raise RuntimeError("the generator broke")
        return super().generator_loss(context)
"""
FINISHED = {"broken", "finished", "workspace"}  # fixtures that run the whole tiny experiment


def pytest_collection_modifyitems(items):
    """Mark the tests of a finished run as `workflow`, and start their runs first: the processes of
    pytest-xdist share the tests by file."""
    waiting = set()
    for item in items:
        if FINISHED & set(item.fixturenames):
            item.add_marker("workflow")
            waiting.add(item.path)
    first = ("test_workflow", "test_end_to_end")
    items.sort(key=lambda item: (item.path.stem not in first, item.path in waiting))


def run_once(tmp_path_factory, name: str, run) -> Workspace:
    """A workspace that all test processes share. One of them makes it by `run(folder)`; the others
    wait. `last_run` is the result of its last command."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / name
    record = folder.with_suffix(".json")
    with FileLock(folder.with_suffix(".lock")):
        if not record.exists():
            record.write_text(json.dumps(vars(run(folder))))
    workspace = Workspace(folder)
    workspace.last_run = subprocess.CompletedProcess(**json.loads(record.read_text()))
    return workspace


@pytest.fixture(scope="session")
def broken(tmp_path_factory) -> Workspace:
    """The tiny experiment after a first run in which one method failed."""

    def run(folder: Path) -> subprocess.CompletedProcess:
        workspace = Workspace.create(folder)
        path = workspace.root / "methods" / "sim.py"
        path.write_text(path.read_text() + BREAK)
        return workspace.snakemake(BREAK="1")

    return run_once(tmp_path_factory, "broken", run)


@pytest.fixture(scope="session")
def finished(broken, tmp_path_factory) -> Workspace:
    """The tiny experiment after a second run, in which nothing failed. Tests must not change it."""
    workspace = run_once(
        tmp_path_factory, "finished", lambda folder: broken.clone(folder).snakemake()
    )
    done = workspace.last_run
    assert done.returncode == 0, done.stdout + done.stderr
    return workspace


@pytest.fixture
def workspace(finished, tmp_path) -> Workspace:
    """A copy of the finished project that a test may change."""
    return finished.clone(tmp_path / "project")


@pytest.fixture
def registries(monkeypatch) -> None:
    """Restore the registries after a test that loads plug-ins."""
    # Not above: Triton's mode is set before anything of `harness` is imported.
    from harness.data.registry import DATASETS
    from harness.evaluation.registry import METRICS
    from harness.features.base import FEATURES
    from harness.method import METHODS
    from harness.networks.registry import BACKBONES

    for registry in (FEATURES, METRICS, METHODS, DATASETS, BACKBONES):
        sorted(registry)  # imports the repository's entries
        for name in ("_entries", "_sources"):
            monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
    monkeypatch.setattr("harness.registry._plugins", {})


@pytest.fixture
def empty_workspace(tmp_path) -> Workspace:
    return Workspace.create(tmp_path / "project")


@pytest.fixture
def tiny() -> dict:
    """The tiny experiment as a dictionary that a test may change."""
    return yaml.safe_load((DATA / "tiny.yaml").read_text())


def pytest_terminal_summary(terminalreporter):
    """Print what tests measured (`record_property`)."""
    passed = terminalreporter.stats.get("passed", [])
    measured = [report for report in passed if report.user_properties]
    if measured:
        terminalreporter.section("measured")
    for report in measured:
        values = ", ".join(f"{value} {name}" for name, value in report.user_properties)
        terminalreporter.line(f"{report.location[2]}: {values}")
