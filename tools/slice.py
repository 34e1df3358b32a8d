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
same device; without any it is `--rate`, or SHARE of a matrix product that is measured once.
`results/<experiment>/slices.json` keeps the work of the stages, and the times of those that ran;
`tools.pack` packs it. Counting the work of a student takes seconds, so run `--dry-run` once before
the first slice, on any machine: it prints the plan of slices.

Exit status: 0 everything is finished, 3 stages remain, 1 a stage failed, 2 an error of the user.
"""

import argparse
import csv
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from harness.config.experiment import Experiment
from harness.config.schema import ImportedTeacher
from harness.errors import UserError, did_you_mean
from harness.features.base import FEATURES
from harness.io.artifacts import digest, read_json, write_json
from harness.io.records import StudentRecord
from harness.training.ledger import device_name
from harness.training.run import DEVICES
from harness.validation import load_experiment
from harness.workflow import plan
from harness.workflow.stages import Stage, all_stages, unfinished

FINISHED, FAILED, REMAINING = 0, 1, 3  # exit status
SHARE = 0.2  # of a matrix product's rate, which a stage reaches: assumed
STARTUP = 8.0  # seconds of a stage before its first iteration: imports and data, assumed
UNKNOWN = 30.0  # seconds of a stage whose work is not counted, assumed
PRETRAINED_FLOPS = 12e9  # of an image through a pretrained network: Inception's at 299 x 299
STOP = 10.0  # seconds before the end at which a stage gets SIGINT
TRAININGS = ("features", "teacher", "train")


@dataclass(frozen=True)
class Estimated:
    """Seconds of a stage, and where the number comes from."""

    seconds: float
    reason: str


class History:
    """`slices.json`: the work of stages, and the times of those that ran."""

    def __init__(self, path: Path):
        self.path = path
        self.content = read_json(path, owner=path) if path.exists() else {"work": {}, "runs": []}

    def work(self, key: str, compute: Callable[[], float | None]) -> float | None:
        """Operations of a stage, computed once: the dry run of a student takes seconds."""
        if key not in self.content["work"]:
            self.content["work"][key] = compute()
            write_json(self.path, self.content)
        return self.content["work"][key]

    def add(self, stage: str, device: str, work: float | None, seconds: float) -> None:
        """Record a stage that ran from its start to its end."""
        facts = {"stage": stage, "device": device, "work": work, "seconds": round(seconds, 2)}
        self.content["runs"].append(facts)
        write_json(self.path, self.content)

    def runs(self, command: str, device: str) -> list[dict]:
        found = (run for run in self.content["runs"] if run["device"] == device)
        return [run for run in found if run["stage"].split()[0] == command]


class Estimates:
    """Estimates of an experiment's stages on this machine. rate: TFLOP/s instead of the measured
    matrix product, where no stage has run yet."""

    def __init__(self, experiment: Experiment, rate: float | None = None):
        self.experiment, self.paths = experiment, experiment.paths
        self.history = History(experiment.paths.root / "slices.json")
        self.device = device_name(experiment.device)
        self.rate, self.assumed = rate and rate * 1e12, ""
        self._dry_runs: dict[str, plan.Estimate] = {}

    def of(self, stage: Stage) -> Estimated:
        if stage.command == "train":
            budget = self.experiment.students[stage.arguments[0]].budget
            if seconds := [limit.amount for limit in budget if limit.unit == "seconds"]:
                return Estimated(min(seconds) + STARTUP, "its budget is in seconds")
        if stage.command in TRAININGS and (found := self._interrupted(stage)):
            return found
        work = self.work(stage)
        if work is None:
            if times := [run["seconds"] for run in self.history.runs(stage.command, self.device)]:
                return Estimated(max(times), f"as {stage.command} before")
            return Estimated(UNKNOWN, "assumed")
        rate, source = self._rate(stage)
        amount = f"{work / 1e12:.4g} TFLOP at {rate / 1e12:.3g} TFLOP/s, {source}"
        return Estimated(work / rate + STARTUP, amount)

    # -- work -----------------------------------------------------------------------------------

    def work(self, stage: Stage) -> float | None:
        """Operations of a stage; None if they are not counted."""
        name = " ".join([stage.command, *stage.arguments[:1]])  # the same for all training seeds
        return self._known(name, lambda: self._count(stage))

    def _known(self, name: str, compute: Callable[[], float | None]) -> float | None:
        return self.history.work(f"{name} {digest(self.experiment.raw)}", compute)

    def _dry_run(self, student: str) -> plan.Estimate:
        if student not in self._dry_runs:
            self._dry_runs[student] = plan.Estimate(self.experiment, student)
        return self._dry_runs[student]

    def _count(self, stage: Stage) -> float | None:
        e, command = self.experiment, stage.command
        name = stage.arguments[0] if stage.arguments else ""
        try:
            if command == "features":
                forward = plan.feature_flops(e, name)
                return forward and 3 * forward * e.features[name].images  # forward and backward
            if command == "teacher":
                imported = isinstance(e.teachers[name], ImportedTeacher)
                return None if imported else plan.TeacherEstimate(e, name).flops
            if command == "pairs":
                pairs = e.pair_sets[name]
                nfe = pairs.sampler.nfe
                return pairs.count * nfe * plan.forward_flops(e, pairs.teacher)
            if command == "train":
                estimate = self._dry_run(name)
                finite = math.isfinite(estimate.flops)
                return estimate.flops - estimate.pair_flops if finite else None
            if command in ("score", "score-references"):
                return self._count_scores(command, name)
        except UserError:  # a network that is known only from its file
            pass
        return None

    def _count_scores(self, command: str, name: str) -> float | None:
        """Samples through the generating network and through all feature networks."""
        e, evaluation = self.experiment, self.experiment.evaluation
        seeds, size = len(evaluation.sampling_seeds), evaluation.num_samples
        if command == "score":
            teacher = e.students[name].teacher
            if teacher is None:
                return None
            count = int(
                self._known(f"snapshots {name}", lambda: self._dry_run(name).snapshots) or 1
            )
            streams = seeds + (count - 1) * (evaluation.snapshot_seeds or seeds)
            if evaluation.selection_seed is not None:
                streams = count + 2 * seeds
            evaluations = streams
        else:
            teacher, streams = name, 2 * seeds
            evaluations = seeds * (e.teachers[name].sampler.nfe + 1)
        features = sum(map(self._count_features, evaluation.extractors))
        return size * (evaluations * plan.forward_flops(e, teacher) + streams * features)

    def _count_features(self, name: str) -> float:
        """Operations of an image through a feature network; of a small one, 0 if not counted."""
        if not FEATURES[self.experiment.features[name].type].trained:
            return PRETRAINED_FLOPS
        return plan.feature_flops(self.experiment, name) or 0.0

    # -- rates ----------------------------------------------------------------------------------

    def _folder(self, stage: Stage) -> Path:
        return stage.record.parent

    def _interrupted(self, stage: Stage) -> Estimated | None:
        """The rest of a training that was interrupted on this device, by its own rate."""
        if stage.record.exists():
            return None
        logs = sorted(self._folder(stage).glob("runs/*/train.csv"), key=lambda p: p.stat().st_mtime)
        if not logs or self.device not in _list(logs[-1].with_name(DEVICES)):
            return None
        with open(logs[-1], newline="") as file:
            rows = [row for row in csv.DictReader(file) if None not in row.values()]
        rates = [float(row["images_per_second"]) for row in rows]
        if not rates or not (rate := statistics.median(rates)):
            return None
        left = max(0.0, self._images(stage) - float(rows[-1]["images"]))
        reason = f"{left:,.0f} images are left at {rate:.4g} images/s, measured"
        return Estimated(left / rate + STARTUP, reason)

    def _images(self, stage: Stage) -> float:
        """The images of a training's budget."""
        name = stage.arguments[0]
        if stage.command == "train":
            limits = {limit.unit: limit.amount for limit in self.experiment.students[name].budget}
            if "images" in limits:
                return limits["images"]
            return self._known(f"images {name}", lambda: self._dry_run(name).images)
        sections = {"features": self.experiment.features, "teacher": self.experiment.teachers}
        return sections[stage.command][name].images

    def _rate(self, stage: Stage) -> tuple[float, str]:
        """Operations per second, and where the number comes from."""
        runs = [run for run in self.history.runs(stage.command, self.device) if run["work"]]
        if runs:
            rates = [run["work"] / max(run["seconds"] - STARTUP, 1.0) for run in runs]
            return min(rates), f"measured for {runs[rates.index(min(rates))]['stage']}"
        if stage.command == "train" and (found := self._trained_rates()):
            student = min(found, key=found.get)
            return found[student], f"measured for {student}"
        if self.rate is None:
            self.rate = SHARE * matrix_rate(self.experiment.device)
            self.assumed = f"{SHARE:.0%} of a matrix product's rate"
        return self.rate, f"assumed{self.assumed and f': {self.assumed}'}"

    def _trained_rates(self) -> dict[str, float]:
        """FLOP/s of the students that were trained on this device."""
        rates = {}
        for student, seed in self.experiment.runs:
            path = self.paths.run(student, seed) / "student.json"
            try:
                record = StudentRecord.read_optional(path)
            except UserError:
                continue
            if record and record.ledger and record.device_name == self.device:
                charges = record.ledger.charges.values()
                flops = record.ledger.flops - sum(charge["flops"] for charge in charges)
                seconds = record.ledger.seconds - sum(charge["seconds"] for charge in charges)
                if flops > 0 and seconds > 0:
                    rates[student] = min(flops / seconds, rates.get(student, math.inf))
        return rates


def _list(path: Path) -> list[str]:
    try:
        return read_json(path)
    except UserError:
        return []


def matrix_rate(device: str) -> float:
    """FLOP/s of a matrix product: 8192³ in bfloat16 on a GPU, 1024³ in float32 on CPU."""
    gpu = device.startswith("cuda")
    size, kind = (8192, torch.bfloat16) if gpu else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in "ab")
    times = []
    for _ in range(5):
        started = time.perf_counter()
        product = a @ b
        if gpu:
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    del product
    return 2 * size**3 / statistics.median(times)


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
