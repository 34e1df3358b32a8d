"""Stress test of the workflow: kills, a full disk and damaged files.

    python -m tools.torture [--seed 0] [--kills 20] [--minutes 30]

Two Snakemakes at a time run tests/data/tiny.yaml on a small disk. Meanwhile jobs, and sometimes a
Snakemake, are killed with SIGKILL at random moments, and the disk is filled. Between two commands,
state and snapshot files are truncated. If a job's error message says to delete something, the
script deletes it; it repairs nothing else. At the end the tables must equal those of an undisturbed
run in every column except measured time and memory. Tracebacks and other errors count as defects.

The seed fixes the order of disturbances; their moments depend on the machine. The disk is a tmpfs,
which needs root; without root it is not filled. The exit status is 0 if there is no defect.
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pandas as pd

from tests.conftest import Workspace

DISK = 96  # MB; the experiment needs about two thirds of it
MEASURED = ("seconds", "memory")  # parts of the names of columns that depend on the machine
REMEDY = re.compile(r"delete (\S+?)[,;.]?(?:\s|$)")
NOT_DAMAGED = ("logs", "config", "benchmarks", "tables", "figures")  # no stage reads these


def jobs(root: Path) -> list[tuple[int, str]]:
    """Processes of the harness and of Snakemake in a folder: id and command."""
    running = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if Path(os.readlink(entry / "cwd")) == root and " -m " in command:
                running.append((int(entry.name), command))
        except OSError:  # the process has just ended
            continue
    return running


class Torture:
    def __init__(self, workspace: Workspace, seed: int, kills: int, deadline: float):
        self.workspace, self.random = workspace, random.Random(seed)
        self.kills, self.deadline = kills, deadline
        self.counts: Counter[str] = Counter()
        self.defects: list[str] = []
        self.filler = workspace.root / "results" / "filler"

    def start(self) -> subprocess.Popen:
        command = ["snakemake", "--cores", "2", "all", "--configfile", "configs/tiny.yaml"]
        self.counts["commands"] += 1
        return subprocess.Popen(
            self.workspace.command(*command),
            cwd=self.workspace.root,
            env=self.workspace.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def round(self, peaceful: bool) -> bool:
        """Run one command, or two at once, to the end; True if one of them succeeded."""
        processes = [self.start()]
        if not peaceful:
            time.sleep(self.random.uniform(0, 3))
            processes.append(self.start())
        fill_at = time.monotonic() + self.random.uniform(10, 30)
        while any(process.poll() is None for process in processes):
            if time.monotonic() > self.deadline:
                self.defects.append("time limit reached")
                for number, _ in jobs(self.workspace.root):
                    os.kill(number, signal.SIGKILL)
                return False
            time.sleep(self.random.uniform(0.5, 4))
            if peaceful:
                continue
            if self.counts["kills"] < self.kills:
                self.kill()
            if self.counts["disks filled"] < 2 and time.monotonic() > fill_at:
                self.fill()
                fill_at = time.monotonic() + 60
        for process in processes:
            process.stderr.close()
        while jobs(self.workspace.root):  # orphans of a killed Snakemake
            time.sleep(0.5)
        return any(process.returncode == 0 for process in processes)

    def kill(self) -> None:
        running = jobs(self.workspace.root)
        stages = [job for job in running if " -m harness " in job[1]]
        snakemakes = [job for job in running if " -m snakemake " in job[1]]
        victims = snakemakes if self.random.random() < 0.1 else stages
        if victims:
            number, _ = self.random.choice(sorted(victims))
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                return
            self.counts["kills"] += 1
            self.counts["kills of Snakemake" if victims is snakemakes else "kills of jobs"] += 1

    def fill(self) -> None:
        """Fill the disk until a job reports it, or for twenty seconds."""
        if not os.path.ismount(self.filler.parent):
            return
        with open(self.filler, "wb") as file:
            try:
                while True:
                    file.write(b"\0" * 65536)
                    file.flush()
            except OSError:
                self.counts["disks filled"] += 1
        reports, until = self.disk_full_reports(), time.monotonic() + 20
        while time.monotonic() < until and self.disk_full_reports() == reports:
            time.sleep(0.5)
        self.filler.unlink()

    def disk_full_reports(self) -> int:
        logs = (self.workspace.results / "logs").rglob("*.log")
        return sum(log.read_text(errors="replace").count("No space left") for log in logs)

    def damage(self) -> None:
        """Truncate a random file: the state of an unfinished run, or any result of a stage."""
        root = self.workspace.results
        states = [
            path
            for folder in root.glob("students/*/seed0")
            if not (folder / "student.json").exists()
            for path in folder.rglob("state*")
        ]
        anything = [
            path
            for path in root.rglob("*")
            if path.suffix in (".json", ".safetensors")
            and path.relative_to(root).parts[0] not in NOT_DAMAGED
        ]
        files = states if states and self.random.random() < 0.5 else anything
        files = sorted(p for p in files if p.is_file() and not p.is_symlink())
        if files:
            path = self.random.choice(files)
            size = path.stat().st_size
            os.truncate(path, self.random.randrange(size) if size else 0)
            self.counts["files truncated"] += 1

    def repair(self) -> None:
        """Delete what the error messages of failed jobs name, and nothing else."""
        for log in sorted((self.workspace.results / "logs").rglob("*.log")):
            text = log.read_text(errors="replace")
            errors = [line for line in text.splitlines() if line.startswith("error: ")]
            if "Traceback" in text:
                self.defects.append(f"{log}: {text.strip().splitlines()[-1]}")
            for line in errors:
                if "No space left" in line:
                    self.counts["reports of a full disk"] += 1
                elif remedy := REMEDY.search(line):
                    path = self.workspace.root / remedy[1]
                    if not path.resolve().is_relative_to(self.workspace.results.resolve()):
                        self.defects.append(f"{log}: {line}")
                    elif path.is_dir():
                        shutil.rmtree(path)
                    else:
                        path.unlink(missing_ok=True)
                    self.counts["repairs"] += 1
                else:
                    self.defects.append(f"{log}: {line}")
            log.unlink()

    def run(self) -> None:
        rounds = 0
        while time.monotonic() < self.deadline:
            rounds += 1
            done = self.counts["kills"] >= self.kills and self.counts["repairs"] >= 4
            if self.round(peaceful=done) and done:
                self.counts["rounds"] = rounds
                return
            self.repair()
            if not done:
                for _ in range(self.random.randrange(1, 3)):
                    self.damage()
        self.defects.append("time limit reached")


def table(workspace: Workspace, name: str) -> pd.DataFrame:
    data = pd.read_csv(workspace.results / "tables" / f"{name}.csv")
    return data[[c for c in data if not any(word in c for word in MEASURED)]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=30)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="onestep-torture-"))
    quiet, tortured = (Workspace.create(folder / name) for name in ("quiet", "tortured"))
    results = tortured.root / "results"
    results.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "tmpfs", str(results)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    if not mounted:
        print("could not mount a tmpfs: the disk is not filled")
    try:
        done = quiet.snakemake()
        assert done.returncode == 0, done.stderr
        torture = Torture(tortured, args.seed, args.kills, started + 60 * args.minutes)
        torture.run()
        for name in ("metrics", "comparison"):
            try:
                pd.testing.assert_frame_equal(table(quiet, name), table(tortured, name))
            except (AssertionError, OSError) as error:
                torture.defects.append(f"{name}.csv: {' '.join(str(error).split())}")
        torture.counts["temporary files left"] = len(list(tortured.results.rglob("*.tmp")))
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(results)], check=False)
    print(f"seed {args.seed}, {(time.monotonic() - started) / 60:.1f} minutes")
    for what, count in torture.counts.items():
        print(f"{count:4d} {what}")
    for defect in torture.defects:
        print("DEFECT", defect)
    if not torture.defects:
        print("no defects: the tables equal those of the undisturbed run")
        shutil.rmtree(folder, ignore_errors=True)
    return bool(torture.defects)


if __name__ == "__main__":
    sys.exit(main())
