"""Shared fixtures: the smallest experiment, and a copy of the project in which it has been run."""

from __future__ import annotations

import json
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

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
torch.set_num_threads(1)


class Workspace:
    """A copy of the project in its own folder, with the tiny experiment as configs/tiny.yaml."""

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
        """The same with everything that was made so far (times kept, so that nothing is stale)."""
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
            timeout=400,
        )

    def stage(self, *arguments: str) -> subprocess.CompletedProcess:
        """One stage of the tiny experiment, to its end."""
        process = stages.start(self.root, [*arguments, "--configfile", "configs/tiny.yaml"])
        process.join(timeout=120)
        assert process.exitcode is not None
        output = [(self.root / name).read_text() for name in ("stdout.txt", "stderr.txt")]
        return subprocess.CompletedProcess(arguments, process.exitcode, *output)

    def snakemake(
        self, *arguments: str, config: str = "tiny", **environment: str
    ) -> subprocess.CompletedProcess:
        options = ["--cores", "8", "all", "--configfile", f"configs/{config}.yaml"]
        return self.run("snakemake", *options, *arguments, **environment)


# A SIM that fails at its seventh step while BREAK is set: its file stays the same.
BREAK = """
    def generator_loss(self, context):
        import os

        if context.step >= 6 and os.environ.get("BREAK"):
            raise RuntimeError("the generator broke")
        return super().generator_loss(context)
"""


def pytest_collection_modifyitems(items):
    """Processes share the tests by file (`--dist loadfile`). The workflow's runs take minutes: one
    process makes them, and the others begin with the files that need none of them."""
    waiting = {item.path for item in items if "broken" in item.fixturenames}
    items.sort(key=lambda item: (item.path.stem != "test_workflow", item.path in waiting))


def run_once(tmp_path_factory, name: str, run) -> Workspace:
    """A workspace that all processes of the tests share: `run(folder)` makes it, in one of them,
    and its `last_run` and `killed_with` are kept for the others."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / name
    record = folder.with_suffix(".json")
    with FileLock(folder.with_suffix(".lock")):
        if not record.exists():
            workspace = run(folder)
            kept = {"last_run": vars(workspace.last_run)}
            kept["killed_with"] = getattr(workspace, "killed_with", None)
            record.write_text(json.dumps(kept))
    kept, workspace = json.loads(record.read_text()), Workspace(folder)
    workspace.last_run = subprocess.CompletedProcess(**kept["last_run"])
    workspace.killed_with = kept["killed_with"]
    return workspace


def run_broken(folder: Path) -> Workspace:
    workspace = Workspace.create(folder)
    path = workspace.root / "methods" / "sim.py"
    path.write_text(path.read_text() + BREAK)
    workspace.last_run = workspace.snakemake(BREAK="1")
    return workspace


@pytest.fixture(scope="session")
def broken(tmp_path_factory) -> Workspace:
    """The tiny experiment, run from nothing by the workflow with one method that fails."""
    return run_once(tmp_path_factory, "broken", run_broken)


@pytest.fixture(scope="session")
def finished(broken, tmp_path_factory) -> Workspace:
    """The same, finished by the next command, when nothing fails any more. Not to be changed."""

    def run(folder: Path) -> Workspace:
        workspace = broken.clone(folder)
        workspace.last_run = workspace.snakemake()
        return workspace

    workspace = run_once(tmp_path_factory, "finished", run)
    done = workspace.last_run
    assert done.returncode == 0, done.stdout + done.stderr
    return workspace


@pytest.fixture(scope="session")
def example(finished, tmp_path_factory) -> Workspace:
    """README's Diff-Instruct beside the finished students. In the middle Snakemake itself is
    killed: its children go on, its lock stays."""
    from tests.test_workflow import kill_when, state_step

    def run(folder: Path) -> Workspace:
        workspace = finished.clone(folder)
        shutil.copy(DATA / "example" / "diff_instruct.py", workspace.root / "methods")
        config = workspace.config()
        config["students"]["diff-instruct"] = {"method": "diff_instruct", "settings": {"lr": 1e-4}}
        workspace.write_config(config)
        command = ["snakemake", "--cores", "8", "all", "--configfile", "configs/tiny.yaml"]
        process = subprocess.Popen(
            workspace.command(*command),
            cwd=workspace.root,
            env=workspace.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        student = workspace.results / "students" / "diff-instruct" / "seed0"
        kill_when(lambda: state_step(student) >= 0, process.pid, lambda: process.poll() is None)
        workspace.killed_with = process.wait()
        workspace.last_run = workspace.snakemake()
        return workspace

    return run_once(tmp_path_factory, "example", run)


@pytest.fixture
def workspace(finished, tmp_path) -> Workspace:
    """A copy of the finished project that a test may change."""
    return finished.clone(tmp_path / "project")


@pytest.fixture
def empty_workspace(tmp_path) -> Workspace:
    return Workspace.create(tmp_path / "project")


@pytest.fixture
def tiny() -> dict:
    """The tiny experiment as a dict that a test may change."""
    return yaml.safe_load((DATA / "tiny.yaml").read_text())


def pytest_terminal_summary(terminalreporter):
    """What tests measured and said by `record_property`."""
    passed = terminalreporter.stats.get("passed", [])
    measured = [report for report in passed if report.user_properties]
    if measured:
        terminalreporter.section("measured")
    for report in measured:
        said = ", ".join(f"{value} {name}" for name, value in report.user_properties)
        terminalreporter.line(f"{report.location[2]}: {said}")
