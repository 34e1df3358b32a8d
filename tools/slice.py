"""Run the next unfinished stages of an experiment for a given time, without Snakemake.

    python -m tools.slice --configfile configs/cifar10-small-fast.yaml --seconds 540

For machines that are available for minutes. Stages run in the order of the workflow, one after the
other, each as `python -m harness <stage>`. A stage starts only if its estimate fits into the time
that is left. Shortly before the end it gets SIGINT; what it saved last remains, and the next slice
on the same machine continues it (`training.checkpoint_seconds` is the time between two saved
states). A training is not cut on purpose: one that is longer than a slice is reported,
and starts only with `--cut`. If a stage fails, independent ones still run.

The estimate is the work (operations, as `harness plan` counts them) over a rate. The rate is that
of an interrupted training of the stage itself, else of finished stages of the same command on the
same device; without any it is `--rate`, or a share of a matrix product's (`tools.estimates`).
`results/<experiment>/slices.json` keeps the work of the stages, and the times of those that ran;
`tools.pack` packs it. Counting the work of a student takes seconds, so run `--dry-run` once before
the first slice, on any machine: it prints the plan of slices.

Exit status: 0 everything is finished, 3 stages remain, 1 a stage failed, 2 an error of the user.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from harness.config.experiment import Experiment
from harness.errors import UserError, did_you_mean
from harness.validation import load_experiment
from harness.workflow.stages import Stage, all_stages, unfinished
from tools.estimates import UNKNOWN, Estimates

FINISHED, FAILED, REMAINING = 0, 1, 3  # exit status
STOP = 10.0  # seconds before the end at which a stage gets SIGINT


class Slice:
    """One slice of `seconds`. students: the others are left out, and the report. cut: also start
    a stage that is longer than the slice. age: seconds of the slice that have passed."""

    def __init__(
        self,
        experiment: Experiment,
        seconds: float,
        estimates: Estimates,
        students: list[str] | None = None,
        cut: bool = False,
        age: float = 0.0,
    ):
        self.experiment, self.seconds, self.estimates = experiment, seconds, estimates
        self.cut, self.started = cut, time.monotonic() - age
        self.snapshot = experiment.write_snapshot()
        self.stages = stages_of(experiment, students)
        self.failed: list[str] = []
        self.skipped: dict[str, str] = {}

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def say(self, text: str) -> None:
        print(f"[{self.elapsed:4.0f} s] {text}", flush=True)

    def run(self) -> int:
        """Run stages until nothing more fits; returns the exit status."""
        while (name := self._next()) is not None:
            estimate = self.estimates.of(self.stages[name])
            left = self.seconds - self.elapsed
            facts = f"about {estimate.seconds:.0f} s ({estimate.reason})"
            longer = estimate.seconds > self.seconds
            if estimate.seconds > left and not (longer and self.cut and 2 * left > self.seconds):
                reason = f"{facts}; {max(left, 0):.0f} s are left"
                if longer:
                    reason += "; it is longer than a slice: raise --seconds, or add --cut"
                self.skipped[name] = reason
                self.say(f"{name}: not started: {reason}")
                continue
            self.say(f"{name}: starts, {facts}")
            if not self._run(name):
                break
        return self._finish()

    def _next(self) -> str | None:
        """The first unfinished stage whose inputs are finished and that was not tried yet."""
        todo = unfinished(self.stages)
        tried = {*self.failed, *self.skipped}
        ready = (name for name in todo if not set(self.stages[name].needs) & set(todo))
        return next((name for name in ready if name not in tried), None)

    def _run(self, name: str) -> bool:
        """Run a stage; False if it was stopped at the end of the slice."""
        stage, began = self.stages[name], time.monotonic()
        fresh = not has_begun(stage)
        command = [sys.executable, "-m", "harness", stage.command, *stage.arguments]
        code, log = self._execute([*command, "--configfile", str(self.snapshot)], name)
        seconds = time.monotonic() - began
        if code is None and not (stage.is_current() and stage.has_files()):
            self.say(f"{name}: stopped after {seconds:.0f} s; the next slice continues it")
            return False
        if code not in (0, None):
            self.failed.append(name)
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            self.say(f"{name}: FAILED, exit status {code} ({lines[-1] if lines else ''}; {log})")
        else:
            if fresh:  # otherwise the time is that of the rest of an interrupted stage
                work = self.estimates.work(stage)
                self.estimates.history.add(name, self.estimates.device, work, seconds)
            self.say(f"{name}: finished in {seconds:.0f} s")
        return True

    def _execute(self, command: list[str], name: str) -> tuple[int | None, Path]:
        """Run a command until the end of the slice: its exit status, or None if it was stopped, and
        its log."""
        log = self.experiment.paths.logs / "slices" / f"{name.replace(' ', '-')}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, start_new_session=True
            )
        stop = min(STOP, 0.1 * self.seconds)
        try:
            for request, left in ((None, 1.0), (signal.SIGINT, 0.3), (signal.SIGTERM, 0.1)):
                if request is not None:
                    process.send_signal(request)
                try:
                    code = process.wait(max(0.0, self.seconds - left * stop - self.elapsed))
                    return (None if request is not None and code != 0 else code), log
                except subprocess.TimeoutExpired:
                    continue
        finally:
            if process.poll() is None:  # it did not end, or this program itself is interrupted
                with suppress(subprocess.TimeoutExpired):
                    process.send_signal(signal.SIGINT)
                    process.wait(0.1 * stop)
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return None, log

    def _finish(self) -> int:
        """Report what remains. If a stage failed, the tables show the other runs."""
        todo = unfinished(self.stages)
        if self.failed and "report" in todo and self.seconds - self.elapsed > UNKNOWN:
            command = [sys.executable, "-m", "harness", "report", "--partial"]
            self._execute([*command, "--configfile", str(self.snapshot)], "report")
            self.say(f"partial report: {self.experiment.paths.tables}/comparison.md")
        if not todo:
            self.say(f"all {len(self.stages)} stages are finished")
            return FINISHED
        blocked = [name for name in todo if name not in self.failed]
        self.say(f"{len(todo)} of {len(self.stages)} stages remain: {', '.join(todo)}")
        if self.failed:
            self.say(f"failed: {', '.join(self.failed)}; {len(blocked)} others remain")
        return FAILED if self.failed else REMAINING


def has_begun(stage: Stage) -> bool:
    """Whether an earlier run of a stage left a part of its work."""
    folder, parts = stage.record.parent, stage.record.with_suffix(".parts")
    shards = folder.glob("*/shard-*.json") if stage.command == "pairs" else ()
    return parts.exists() or any(folder.glob("runs/*/train.csv")) or any(shards)


def stages_of(experiment: Experiment, students: list[str] | None) -> dict[str, Stage]:
    """All stages; with `students`, without those of other students and the report."""

    def is_included(stage: Stage) -> bool:
        if stage.command in ("train", "import-student", "score"):
            return stage.arguments[0] in students
        return stage.command != "report"

    stages = all_stages(experiment)
    return {name: s for name, s in stages.items() if students is None or is_included(s)}


def process_age() -> float:
    """Seconds since this process started, as far as the system tells: imports take some."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return max(0.0, uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        return 0.0


def print_plan(experiment: Experiment, seconds: float, estimates: Estimates, stages: dict) -> int:
    """Print the slices in which the unfinished stages fit by their estimates."""
    todo, number, used, total = unfinished(stages), 1, 0.0, 0.0
    for name in todo:
        estimate = estimates.of(stages[name])
        if used and used + estimate.seconds > seconds:
            number, used = number + 1, 0.0
        used, total = used + estimate.seconds, total + estimate.seconds
        longer = "; LONGER THAN A SLICE" if estimate.seconds > seconds else ""
        print(f"slice {number}: {name}: {estimate.seconds:.0f} s ({estimate.reason}){longer}")
    done = len(stages) - len(todo)
    print(
        f"{done} of {len(stages)} stages are finished; the others need about {total:.0f} s on "
        f"{estimates.device}, {number if todo else 0} slices of {seconds:.0f} s"
    )
    return REMAINING if todo else FINISHED


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools.slice", description=__doc__.splitlines()[0])
    parser.add_argument("--configfile", type=Path, required=True, help="experiment file")
    parser.add_argument("--seconds", type=float, default=540.0, help="length of the slice")
    parser.add_argument("--students", nargs="+", help="only these students, and no report")
    parser.add_argument("--rate", type=float, help="TFLOP/s where no stage has run yet")
    parser.add_argument("--cut", action="store_true", help="start stages longer than a slice")
    parser.add_argument("--dry-run", action="store_true", help="print the plan of slices")
    args = parser.parse_args(argv)
    # Children then begin with the default handlers, also if this program runs in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
        signal.signal(signal.SIGHUP, signal.default_int_handler)  # a closed connection
    try:
        if not (args.seconds > 0 and (args.rate is None or args.rate > 0)):  # nan is neither
            raise UserError("--seconds and --rate must be positive", "arguments")
        experiment = load_experiment(args.configfile)
        for name in args.students or ():
            if name not in experiment.students:
                hint = did_you_mean(name, experiment.students)
                raise UserError(f"--students: unknown student {name!r}{hint}", "unknown-name")
        if args.dry_run and experiment.device_setting != "auto" and not torch.cuda.is_available():
            experiment = replace(experiment, device_setting="cpu")
        experiment.check_device()
        estimates = Estimates(experiment, args.rate)
        options = experiment, args.seconds, estimates
        if args.dry_run:
            return print_plan(*options, stages_of(experiment, args.students))
        return Slice(*options, args.students, args.cut, process_age()).run()
    except (UserError, OSError) as error:  # such as a full disk or a read-only folder
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            f"interrupted; continue with: python -m tools.slice {shlex.join(argv or sys.argv[1:])}"
        )
        return REMAINING


if __name__ == "__main__":
    sys.exit(main())
