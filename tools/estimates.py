"""How long the stages of an experiment take on this machine: their work, in operations as `harness
plan` counts them, over a rate.

The rate is that of an interrupted training of the stage itself, else of finished stages of the same
command on the same device; without any it is a given one, or SHARE of a matrix product in the
stage's precision. `results/<experiment>/slices.json` keeps the work, and the times of stages that
ran.
"""

import contextlib
import csv
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from harness.config.experiment import Experiment
from harness.config.schema import ImportedTeacher
from harness.errors import UserError
from harness.features.base import FEATURES
from harness.io.artifacts import digest, read_json, write_json
from harness.training.ledger import device_name
from harness.training.run import DEVICES
from harness.workflow import plan
from harness.workflow.speed import SHARE, matrix_rate, trained_rates
from harness.workflow.stages import Stage

STARTUP = 8.0  # seconds of a stage before its first iteration: imports and data, assumed
METRICS = 6e-4  # seconds of all metrics per sample, assumed
UNKNOWN = 30.0  # seconds of a stage whose work is not counted, assumed
PRETRAINED_FLOPS = 12e9  # of an image through a pretrained network: Inception's at 299 x 299
TRAININGS = ("features", "teacher", "train")
SCORES = ("score", "score-references")


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
            amount = compute()
            with self._changed() as content:
                content["work"][key] = amount
        return self.content["work"][key]

    def add(self, stage: str, device: str, work: float | None, seconds: float) -> None:
        """Record a stage that ran from its start to its end."""
        facts = {"stage": stage, "device": device, "work": work, "seconds": round(seconds, 2)}
        with self._changed() as content:
            content["runs"].append(facts)

    @contextlib.contextmanager
    def _changed(self) -> Iterator[dict]:
        """The present content, to change and to write: another slice may have added to it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.path.with_suffix(".lock")):
            if self.path.exists():
                self.content = read_json(self.path, owner=self.path)
            yield self.content
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
        self.rate = rate and rate * 1e12
        self._products: dict[str, float] = {}  # measured rates of a matrix product, by precision
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
        others = STARTUP  # the seconds of a measured stage contain its metrics
        if stage.command in SCORES and source.startswith("assumed"):
            others += METRICS * self.experiment.evaluation.num_samples * self._streams(stage)
        return Estimated(work / rate + others, amount)

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
            if command in SCORES:
                return self._count_scores(stage)
        except UserError:  # a network that is known only from its file
            pass
        return None

    def _streams(self, stage: Stage) -> int:
        """How many sets of samples a stage scores."""
        evaluation, (name, *_) = self.experiment.evaluation, stage.arguments
        seeds = len(evaluation.sampling_seeds)
        if stage.command == "score-references":
            return 2 * seeds
        count = int(self._known(f"snapshots {name}", lambda: self._dry_run(name).snapshots) or 1)
        if evaluation.selection_seed is not None:
            return count + 2 * seeds
        return seeds + (count - 1) * (evaluation.snapshot_seeds or seeds)

    def _count_scores(self, stage: Stage) -> float | None:
        """Samples through the generating network and through all feature networks."""
        e, evaluation, (name, *_) = self.experiment, self.experiment.evaluation, stage.arguments
        size = evaluation.num_samples
        teacher = e.students[name].teacher if stage.command == "score" else name
        if teacher is None:
            return None
        evaluations = streams = self._streams(stage)
        if stage.command == "score-references":
            evaluations = streams // 2 * (e.teachers[name].sampler.nfe + 1)
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
        if stage.command == "train" and (found := trained_rates(self.experiment)):
            student = min(found, key=found.get)
            return found[student], f"measured for {student}"
        if self.rate is not None:
            return self.rate, "assumed"
        precision = self._precision(stage)
        if precision not in self._products:
            self._products[precision] = matrix_rate(self.experiment.device, precision)
        reason = f"assumed: {SHARE:.0%} of a matrix product's rate in {precision}"
        return SHARE * self._products[precision], reason

    def _precision(self, stage: Stage) -> str:
        """The precision of most operations of a stage. Feature networks compute in float32."""
        e, name = self.experiment, (*stage.arguments, "")[0]
        if stage.command == "train":
            return e.student_training(name).precision
        if stage.command == "teacher":
            return getattr(e.teachers[name], "precision", "fp32")
        return e.evaluation.precision if stage.command == "pairs" else "fp32"


def _list(path: Path) -> list[str]:
    try:
        return read_json(path)
    except UserError:
        return []
