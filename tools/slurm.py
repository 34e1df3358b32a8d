"""The workflow on a real Slurm: one slurmctld and one slurmd on this machine, alone on loopback.

    python -m tests.cluster.run            # the tests' small experiment, minutes
    python -m tests.cluster.run --digits   # the embedded benchmark

Debian's `slurm-wlm` and `munge` and root's rights are enough: no systemd, no control groups, no
accounting. The workflow is submitted with profiles/slurm; one training job is cancelled once it has
written a state; it must be tried again and resume, and the table must be that of a plain local run.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

from harness.workflow.machine import usable_cpus
from tests.conftest import ROOT, Workspace

NEEDED = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "scancel", "sinfo")
NODE = "loopback"
# Memory that the node is said to have: what jobs ask for is a matter of the profile, not of this
# machine, and nothing here enforces it.
MEMORY_MB = 64_000
CONF = """\
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
KillWait=5
# Finished jobs stay in squeue, where the workflow and this script read how they ended.
MinJobAge=86400
NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} Gres=gpu:{cpus}
PartitionName=cpu Nodes={node} MaxTime=1440
PartitionName=gpu Nodes={node} MaxTime=1440
"""


def missing() -> str:
    """Why this machine cannot run it; empty if it can."""
    lacking = [name for name in NEEDED if not shutil.which(name)]
    if lacking:
        return f"needs Debian's slurm-wlm and munge: no {', '.join(lacking)}"
    return "" if os.geteuid() == 0 else "needs root, to start slurmd"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Slurm:
    """Its daemons, from entry to exit. They share nothing with a Slurm that the machine may have."""

    def __init__(self, folder: Path):
        self.folder, self.daemons = folder, []
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
        }

    def __enter__(self) -> Slurm:
        folder = self.folder
        for name in ("state", "spool", "bin"):
            (folder / name).mkdir()
        # Within a job Snakemake's plugin clears Slurm's variables, as it may where the configuration
        # lies in /etc; this one must not.
        srun = folder / "bin" / "srun"
        conf, real = self.environment["SLURM_CONF"], shutil.which("srun")
        srun.write_text(f'#!/bin/sh\nSLURM_CONF={conf} exec {real} "$@"\n')
        srun.chmod(0o755)
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        facts = {"folder": folder, "host": socket.gethostname().split(".")[0], "node": NODE}
        facts |= {"controller": free_port(), "daemon": free_port()}
        facts |= {"cpus": usable_cpus(), "memory": MEMORY_MB}
        (folder / "slurm.conf").write_text(CONF.format(**facts))
        for number in range(facts["cpus"]):  # a GPU is a device file to Slurm, and any file is one
            (folder / f"gpu{number}").touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{facts['cpus'] - 1}]\n")
        if self.version() >= (23, 11):  # before that it must not be told, and does without
            (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
        try:
            munge = ["munged", "--foreground", "--force", f"--key-file={key}"]
            munge += [f"--{x}={folder}/munge.{x.split('-')[0]}" for x in ("socket", "pid-file")]
            self._start(*munge, f"--seed-file={folder}/munge.seed", "--syslog")
            self._until("munge is there", (folder / "munge.socket").exists)
            self._start("slurmctld", "-D", "-c")
            self._start("slurmd", "-D", "-N", NODE)
            self._until("the node is idle", lambda: "idle" in self.ask("sinfo", "-h", "-o", "%T"))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def _start(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}.log", "w") as log:
            daemon = subprocess.Popen(command, stdout=log, stderr=log, env=self.environment)
        self.daemons.append(daemon)

    def _until(self, what: str, ready, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > deadline or any(d.poll() is not None for d in self.daemons):
                logs = [p.read_text()[-2000:] for p in sorted(self.folder.glob("*.log"))]
                raise RuntimeError("\n".join([f"not: {what}", *logs]))
            time.sleep(0.2)

    def ask(self, *command: str) -> str:
        """What a command of Slurm prints; nothing if it fails, as it may for a moment."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60
        )
        return done.stdout if done.returncode == 0 else ""

    def version(self) -> tuple[int, ...]:
        said = subprocess.run(["slurmd", "-V"], capture_output=True, text=True, check=True).stdout
        return tuple(int(part) for part in said.split()[1].split(".")[:2])

    def jobs(self) -> pd.DataFrame:
        """All jobs so far: number, state, partition, GPUs, minutes, MB, and what they are for."""
        columns = ["id", "state", "partition", "gres", "minutes", "memory", "comment"]
        lines = self.ask("squeue", "-h", "--states=all", "-o", "%i|%T|%P|%b|%l|%m|%k").splitlines()
        return pd.DataFrame([line.split("|") for line in lines], columns=columns)


@dataclass
class Outcome:
    """What happened. `differing`: columns in which the two tables differ, measured ones apart."""

    jobs: pd.DataFrame
    cancelled: str
    at_images: int
    resumed: str
    returncode: int
    seconds: float
    differing: list[str]
    rows: int

    @property
    def problems(self) -> list[str]:
        states = collections.Counter(self.jobs.state)
        again = self.jobs[self.jobs.comment == self.cancelled]
        checks = {
            "the workflow failed": self.returncode != 0,
            f"states of jobs: {dict(states)}": set(states) != {"COMPLETED", "CANCELLED"},
            "one job was to be cancelled": states["CANCELLED"] != 1,
            f"{self.cancelled}: {list(again.state)}": list(again.state.sort_values())
            != ["CANCELLED", "COMPLETED"],
            "the retried job did not resume": not self.resumed,
            f"tables differ in {self.differing}": bool(self.differing),
        }
        return [what for what, wrong in checks.items() if wrong]

    def __str__(self) -> str:
        rules = collections.Counter(c.split("_wildcards_")[0] for c in self.jobs.comment)
        states = collections.Counter(self.jobs.state)
        gpus = (self.jobs.gres != "N/A").sum()
        lines = [
            f"{len(self.jobs)} jobs: " + ", ".join(f"{n} {s}" for s, n in states.items()),
            ", ".join(f"{n} {rule.removeprefix('rule_')}" for rule, n in rules.items()),
            f"partitions: {dict(collections.Counter(self.jobs.partition))}; {gpus} asked for a GPU",
            f"cancelled: {self.cancelled} at {self.at_images} images; then: {self.resumed}",
            f"exit {self.returncode} after {self.seconds:.0f} s; comparison.csv: {self.rows} rows, "
            + (f"differ in {self.differing}" if self.differing else "as in a local run"),
        ]
        return "\n".join([*lines, *(f"WRONG: {problem}" for problem in self.problems)])


def workspace(root: Path, digits: bool) -> Workspace:
    """A copy of the project, with the experiment that is run."""
    made = Workspace.create(root)
    if digits:
        shutil.copy2(ROOT / "configs" / "digits.yaml", root / "configs")
        return made
    config = made.config()
    # `auto` asks the cluster for a GPU, and takes the CPU of a node without one.
    config["device"] = "auto"
    # Long enough to be caught at work.
    config["students"]["sid"]["budget"] = [{"unit": "images", "amount": 1600}]
    config["students"] = {name: config["students"][name] for name in ("sid", "gdd-i")}
    made.write_config(config)
    return made


def comparison(root: Path) -> pd.DataFrame:
    table = pd.read_csv(root / "tables" / "comparison.csv", keep_default_na=False, dtype=str)
    return table.drop(columns=[c for c in table if "seconds" in c or "memory" in c])


def run(folder: Path, digits: bool, limit: float, local: Path | None = None) -> Outcome:
    """The submitted run and, unless the results of a local one are given, that one, in `folder`;
    `limit`: seconds for each."""
    name = "digits" if digits else "tiny"
    submitted = workspace(folder / "submitted", digits)
    hidden = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    arguments = ["all", "--configfile", f"configs/{name}.yaml"]
    victim = submitted.root / "results" / name / "students" / "sid" / "seed0"
    log = submitted.root / "results" / name / "logs" / "students" / "sid" / "seed0.log"
    with Slurm(folder) as slurm, open(folder / "submitted.log", "w") as output:
        # The profile as a user would fill it in for this cluster.
        path = submitted.root / "profiles" / "slurm" / "profile.yaml"
        profile = yaml.safe_load(path.read_text())
        profile["config"]["cluster"] |= {"gpu_partition": "gpu", "cpu_partition": "cpu"}
        profile["config"]["cluster"] |= {"gpu_tflops": 0.01}
        profile |= {"slurm-status-command": "squeue", "latency-wait": 10}
        profile["slurm-init-seconds-before-status-checks"] = 3
        path.write_text(yaml.safe_dump(profile))
        started = time.monotonic()
        process = subprocess.Popen(
            submitted.command("snakemake", "--profile", "profiles/slurm", *arguments),
            cwd=submitted.root,
            env=submitted.environment | slurm.environment | hidden,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            while saved_images(victim) is None:
                assert process.poll() is None, "the workflow ended before a state was seen"
                assert time.monotonic() - started < limit, "no state was written in time"
                time.sleep(0.05)
            jobs = slurm.jobs()
            job = jobs[jobs.comment.str.contains("rule_train_wildcards_sid_0")].iloc[0]
            slurm.ask("scancel", job.id)
            images = saved_images(victim)
            returncode = process.wait(timeout=limit)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        seconds, jobs = time.monotonic() - started, slurm.jobs()
    said = log.read_text() if log.exists() else ""
    resumed = next((line for line in said.splitlines() if "resumed at" in line), "")
    if local is None:
        plain = workspace(folder / "local", digits)
        local = plain.root / "results" / name
        subprocess.run(
            plain.command("snakemake", "--cores", "8", *arguments),
            cwd=plain.root,
            env=plain.environment | hidden,
            check=True,
            capture_output=True,
            timeout=limit,
        )
    mine, theirs = comparison(submitted.root / "results" / name), comparison(local)
    same = mine.shape == theirs.shape and list(mine) == list(theirs)
    differing = [c for c in mine if list(mine[c]) != list(theirs[c])] if same else ["columns"]
    resumed = resumed.split(" from ")[0]
    return Outcome(jobs, job.comment, images, resumed, returncode, seconds, differing, len(mine))


def saved_images(folder: Path) -> int | None:
    """Images in the saved state of a run, if there is one and it is whole."""
    for path in folder.glob("runs/*/state.json"):
        try:
            return json.loads(path.read_text())["ledger"]["images"]
        except (OSError, ValueError):
            pass
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--digits", action="store_true", help="configs/digits.yaml")
    parser.add_argument("--folder", type=Path, help="keep everything here (a new folder)")
    parser.add_argument("--local", type=Path, help="results of a local run, in place of a new one")
    args = parser.parse_args()
    if why := missing():
        print(why, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # not without ending the daemons
    folder = args.folder or Path(tempfile.mkdtemp(prefix="onestep-slurm-"))
    folder.mkdir(exist_ok=True)
    try:
        limit = 7200 if args.digits else 1200
        outcome = run(folder.resolve(), args.digits, limit, args.local)
        print(outcome)
        return len(outcome.problems) > 0
    finally:
        if not args.folder:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
