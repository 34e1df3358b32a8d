"""Run the workflow on a private Slurm on this machine, and compare it with a local run.

    python -m tools.slurm             # the tests' tiny experiment
    python -m tools.slurm --digits    # configs/digits.yaml

Needs Debian's `slurm-wlm` and `munge`, and root; not systemd, control groups or accounting. It
starts slurmctld and slurmd on the loopback interface and submits the workflow with
profiles/slurm. It cancels one training job after its first saved state. The job must be retried
and resume, and the tables must equal those of a local run.
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

import joblib
import pandas as pd
import yaml

from tests.conftest import ROOT, Workspace

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "squeue", "scancel", "sinfo")
NODE = "loopback"
MEMORY_MB = 64_000  # of the node, as configured; Slurm does not enforce it here
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
# Finished jobs stay in squeue, from which the workflow and this script read their states.
MinJobAge=86400
NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} Gres={gres}
PartitionName=cpu Nodes={node} MaxTime=1440 Default=YES
PartitionName=gpu Nodes={node} MaxTime=1440
"""


def missing() -> str:
    """Why this machine cannot run the script; empty if it can."""
    programs = [name for name in PROGRAMS if not shutil.which(name)]
    if programs:
        return f"needs Debian's slurm-wlm and munge (not found: {', '.join(programs)})"
    return "" if os.geteuid() == 0 else "needs root to start slurmd"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Slurm:
    """A context in which Slurm's daemons run, separate from any Slurm of this machine."""

    def __init__(self, folder: Path):
        self.folder, self.daemons = folder, []
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
        }

    def __enter__(self) -> Slurm:
        try:
            self._configure()
            self._start_daemons()
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

    def _configure(self) -> None:
        folder, cpus = self.folder, joblib.cpu_count()
        for name in ("state", "spool", "bin"):
            (folder / name).mkdir()
        # Snakemake's plugin removes Slurm's variables inside a job; here srun needs SLURM_CONF.
        srun = folder / "bin" / "srun"
        conf, program = self.environment["SLURM_CONF"], shutil.which("srun")
        srun.write_text(f'#!/bin/sh\nSLURM_CONF={conf} exec {program} "$@"\n')
        srun.chmod(0o755)
        (folder / "munge.key").write_bytes(secrets.token_bytes(1024))
        (folder / "munge.key").chmod(0o400)
        facts = {"folder": folder, "host": socket.gethostname().split(".")[0], "node": NODE}
        facts |= {"controller": free_port(), "daemon": free_port(), "cpus": cpus}
        facts |= {"memory": MEMORY_MB, "gres": f"gpu:{cpus}"}
        (folder / "slurm.conf").write_text(CONF.format(**facts))
        for number in range(cpus):  # Slurm accepts any file as a GPU's device file
            (folder / f"gpu{number}").touch()
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-{cpus - 1}]\n")
        if self.version() >= (23, 11):  # older versions do not know the option
            (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")

    def _start_daemons(self) -> None:
        folder = self.folder
        munge = ["munged", "--foreground", "--force", f"--key-file={folder}/munge.key"]
        munge += [f"--{x}={folder}/munge.{x.split('-')[0]}" for x in ("socket", "pid-file")]
        self._start(*munge, f"--seed-file={folder}/munge.seed", "--syslog")
        self._wait_for("munge", (folder / "munge.socket").exists)
        self._start("slurmctld", "-D", "-c")
        self._start("slurmd", "-D", "-N", NODE)
        self._wait_for("an idle node", lambda: "idle" in self.query("sinfo", "-h", "-o", "%T"))

    def _start(self, *command: str) -> None:
        with open(self.folder / f"{command[0]}.log", "w") as log:
            daemon = subprocess.Popen(command, stdout=log, stderr=log, env=self.environment)
        self.daemons.append(daemon)

    def _wait_for(self, what: str, ready, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > deadline or any(d.poll() is not None for d in self.daemons):
                logs = [p.read_text()[-2000:] for p in sorted(self.folder.glob("*.log"))]
                raise RuntimeError("\n".join([f"timed out or failed: {what}", *logs]))
            time.sleep(0.2)

    def query(self, *command: str) -> str:
        """Output of one of Slurm's commands; empty if it fails, which may be temporary."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=60
        )
        return done.stdout if done.returncode == 0 else ""

    def version(self) -> tuple[int, ...]:
        done = subprocess.run(["slurmd", "-V"], capture_output=True, text=True, check=True)
        return tuple(int(part) for part in done.stdout.split()[1].split(".")[:2])

    def jobs(self) -> pd.DataFrame:
        """All jobs submitted so far; `comment` has the rule and its wildcards."""
        columns = ["id", "state", "partition", "gres", "comment"]
        lines = self.query("squeue", "-h", "--states=all", "-o", "%i|%T|%P|%b|%k").splitlines()
        return pd.DataFrame([line.split("|") for line in lines], columns=columns)


@dataclass
class Outcome:
    """Result of the comparison. `differing`: columns in which the tables differ."""

    jobs: pd.DataFrame
    cancelled: str
    resumed: str
    returncode: int
    seconds: float
    differing: list[str]
    rows: int

    @property
    def problems(self) -> list[str]:
        states = collections.Counter(self.jobs.state)
        retried = list(self.jobs[self.jobs.comment == self.cancelled].state.sort_values())
        train = self.jobs[self.jobs.comment.str.contains("rule_train")]
        checks = {
            "the workflow failed": self.returncode != 0,
            f"states of jobs: {dict(states)}": set(states) != {"COMPLETED", "CANCELLED"},
            f"states of {self.cancelled}: {retried}": retried != ["CANCELLED", "COMPLETED"],
            "training requested no GPU": (train.gres == "N/A").any(),
            "the retried job did not resume": not self.resumed,
            f"tables differ in {self.differing}": bool(self.differing),
        }
        return [problem for problem, failed in checks.items() if failed]

    def __str__(self) -> str:
        rules = collections.Counter(c.split("_wildcards_")[0] for c in self.jobs.comment)
        states = collections.Counter(self.jobs.state)
        lines = [
            f"{len(self.jobs)} jobs: " + ", ".join(f"{n} {s}" for s, n in states.items()),
            ", ".join(f"{n} {rule.removeprefix('rule_')}" for rule, n in rules.items()),
            f"{(self.jobs.gres != 'N/A').sum()} jobs requested a GPU",
            f"cancelled {self.cancelled}; retried: {self.resumed}",
            f"exit status {self.returncode} after {self.seconds:.0f} s; {self.rows} rows compared",
        ]
        return "\n".join([*lines, *(f"PROBLEM: {problem}" for problem in self.problems)])


def make_workspace(root: Path, digits: bool) -> Workspace:
    """A copy of the project with the experiment to run."""
    workspace = Workspace.create(root)
    if digits:
        shutil.copy2(ROOT / "configs" / "digits.yaml", root / "configs")
        return workspace
    config = workspace.config()
    config["device"] = "auto"  # the node has no GPU
    config["students"] = {name: config["students"][name] for name in ("sid", "gdd-i")}
    # Long enough to be cancelled during training.
    config["students"]["sid"]["budget"] = [{"unit": "images", "amount": 1600}]
    workspace.write_config(config)
    return workspace


def has_state(folder: Path) -> bool:
    """Whether a run has a complete saved state."""
    for path in folder.glob("runs/*/state.json"):
        try:
            return "ledger" in json.loads(path.read_text())
        except (OSError, ValueError):
            pass
    return False


def read_table(root: Path) -> pd.DataFrame:
    table = pd.read_csv(root / "tables" / "comparison.csv", keep_default_na=False, dtype=str)
    return table.drop(columns=[c for c in table if "seconds" in c or "memory" in c])


def run(folder: Path, digits: bool, limit: float, local: Path | None = None) -> Outcome:
    """Run the experiment on Slurm and, without `local` results, also locally; `limit`: seconds for
    each of them."""
    name = "digits" if digits else "tiny"
    submitted = make_workspace(folder / "submitted", digits)
    environment = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    arguments = ["all", "--configfile", f"configs/{name}.yaml"]
    results = submitted.root / "results" / name
    with Slurm(folder) as slurm, open(folder / "submitted.log", "w") as output:
        # Adapt the profile to this small cluster, as a user would.
        path = submitted.root / "profiles" / "slurm" / "profile.yaml"
        profile = yaml.safe_load(path.read_text())
        profile["default-resources"] |= {"mem_mb": "attempt * 4000"}
        for resources in profile["set-resources"].values():
            resources |= {"slurm_partition": "gpu", "mem_mb": "attempt * 4000"}
        profile |= {"slurm-status-command": "squeue", "latency-wait": 10}
        profile["slurm-init-seconds-before-status-checks"] = 3
        path.write_text(yaml.safe_dump(profile))
        started = time.monotonic()
        process = subprocess.Popen(
            submitted.command("snakemake", "--profile", "profiles/slurm", *arguments),
            cwd=submitted.root,
            env=submitted.environment | slurm.environment | environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            while not has_state(results / "students" / "sid" / "seed0"):
                assert process.poll() is None, "the workflow ended before a state was saved"
                assert time.monotonic() - started < limit, "no state was saved in time"
                time.sleep(0.05)
            jobs = slurm.jobs()
            job = jobs[jobs.comment.str.contains("rule_train_wildcards_sid_0")].iloc[0]
            slurm.query("scancel", job.id)
            returncode = process.wait(timeout=limit)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        seconds, jobs = time.monotonic() - started, slurm.jobs()
    log = results / "logs" / "students" / "sid" / "seed0.log"
    lines = log.read_text().splitlines() if log.exists() else []
    resumed = next((line.split(" from ")[0] for line in lines if "resumed at" in line), "")
    if local is None:
        plain = make_workspace(folder / "local", digits)
        local = plain.root / "results" / name
        subprocess.run(
            plain.command("snakemake", "--cores", "8", *arguments),
            cwd=plain.root,
            env=plain.environment | environment,
            check=True,
            capture_output=True,
            timeout=limit,
        )
    table, expected = read_table(results), read_table(local)
    same_shape = table.shape == expected.shape and list(table) == list(expected)
    differing = ["columns"]
    if same_shape:
        differing = [c for c in table if list(table[c]) != list(expected[c])]
    return Outcome(jobs, job.comment, resumed, returncode, seconds, differing, len(table))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--digits", action="store_true", help="run configs/digits.yaml")
    parser.add_argument("--folder", type=Path, help="a new folder for all files; it is not deleted")
    parser.add_argument("--local", type=Path, help="results of a local run to compare with")
    args = parser.parse_args()
    if reason := missing():
        print(reason, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stop the daemons, too
    folder = args.folder or Path(tempfile.mkdtemp(prefix="onestep-slurm-"))
    folder.mkdir(exist_ok=True)
    try:
        outcome = run(folder.resolve(), args.digits, 7200 if args.digits else 1200, args.local)
        print(outcome)
        return len(outcome.problems) > 0
    finally:
        if not args.folder:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
