"""`harness verify-released`: the authors' released students against their published FIDs. It
imports and scores them, and trains nothing. It fails if sampling, preconditioning or FID here are
not those of the papers.

The tolerance is for the noise of samples alone. The FID of one network varies by about 2 % between
sets of 50,000 samples, which is why Karras et al. 2022 (EDM) take the minimum of three. This is
read as two standard deviations, so one evaluation has a standard deviation of NOISE = 1 % of the
FID. A published number is a mean of m evaluations, and one here of n, so their difference has a
standard error of NOISE * FID * sqrt(1/m + 1/n). The tolerance is three of them, and half a unit in
the last published digit: with n = 10, 0.026 for SiD on CIFAR-10 (1.923, m = 10), 0.053 for GDD-I
(1.54, m = 1). What docs/fidelity.md estimates of known differences (labels, N - 1) is below 0.005.
"""

import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from harness.config.experiment import Experiment
from harness.errors import ConfigError, Problem, UserError
from harness.features.base import FEATURES, provides
from harness.io.artifacts import sha256_file
from harness.io.downloads import fetch
from harness.io.records import FeatureRecord
from harness.reporting.collect import collect, current_scores, training_record
from harness.reporting.published import match
from harness.reporting.published.exact import evaluation_differences
from harness.reporting.published.statistic import STATISTICS, fid_rows, measure, statistic_of
from harness.workflow.stages import all_stages

METRIC = "fid-edm"  # of all papers whose students were released
SAMPLES = 50_000  # of each published FID; fewer raise it
NOISE, STANDARD_ERRORS = 0.01, 3.0


class Comparison(NamedTuple):
    """A released student's FID and the published number that is nearest to it, in units of the
    tolerance."""

    student: str
    measured: float
    measured_is: str
    sha256: str  # of the authors' pickle
    entry: dict
    tolerance: float

    @property
    def agrees(self) -> bool:
        return abs(self.measured - self.entry["value"]) <= self.tolerance

    def __str__(self) -> str:
        entry, agrees = self.entry, "agrees" if self.agrees else "differs"
        reported = f"reported {entry['value']:g} ({entry['paper']}, {entry['table']})"
        measured = f"{self.student}: FID {self.measured:.4g}, {self.measured_is}"
        return (
            f"{measured}; {reported}, tolerance {self.tolerance:.2g}: {agrees} "
            f"(sha256 {self.sha256})"
        )


def numbers_of(experiment: Experiment, student: str) -> list[dict]:
    """The FIDs that a student's authors published. Those that others quote count only if there are
    no more; which of several numbers is of the released file is not documented."""
    entries = [
        entry
        for entry in match.concerning(experiment.paper)
        if entry["metric"] == "FID" and (entry["paper"], match.base(entry["method"])) in STATISTICS
    ]
    entries = [entry for entry in entries if student in match.runs_of(experiment, entry)]
    return [e for e in entries if not e["evidence"].startswith("quoted")] or entries


def tolerance(entry: dict, evaluations: int) -> float:
    """The largest difference from a published FID that the noise of samples explains (see above).
    evaluations: of the number here."""
    statistic = statistic_of(entry)
    published = statistic.evaluations if statistic else 1
    error = NOISE * entry["value"] * math.sqrt(1 / published + 1 / evaluations)
    digits = max(2, len(str(entry["value"]).partition(".")[2]))
    return STANDARD_ERRORS * error + 0.5 * 10**-digits


def check(experiment: Experiment, configfile: Path) -> None:
    """Report everything that prevents a comparison, before any work (`ConfigError`)."""
    problems, evaluation, paper = [], experiment.evaluation, experiment.paper
    if not experiment.released:
        problems.append(
            Problem("students", "no-released", "none has a source, so none is released")
        )
    if paper is None:
        message = "missing; it names the data set of the published numbers"
        problems.append(Problem("paper", "missing-key", message))
    if evaluation.num_samples != SAMPLES:
        message = f"published FIDs are of {SAMPLES:,} samples, not {evaluation.num_samples:,}"
        problems.append(Problem("evaluation.num_samples", "samples", message))
    if evaluation.tf32:
        message = "must be false; it changes the samples"
        problems.append(Problem("evaluation.tf32", "tf32", message))
    if evaluation.precision != "fp32":
        message = "must be fp32; it changes the samples"
        problems.append(Problem("evaluation.precision", "precision", message))
    if _extractor(experiment) is None:
        message = f"none has the metric {METRIC}; add an Inception with resize: edm"
        problems.append(Problem("evaluation.extractors", "unsupported", message))
    for name in experiment.released if paper else ():
        if not (entries := numbers_of(experiment, name)):
            data = " ".join(filter(None, [paper.dataset, paper.conditioning]))
            message = f"no published FID on {data} has its method and settings"
            problems.append(Problem(f"students.{name}", "no-number", message))
        for difference in entries and evaluation_differences(experiment, entries[0], METRIC):
            message = f"not those of the published FIDs: {difference}"
            problems.append(Problem("evaluation", "protocol", message))
    if problems:
        raise ConfigError(str(configfile), problems)


def _extractor(experiment: Experiment) -> str | None:
    """The extractor of the published FID."""
    settings = {name: experiment.features[name] for name in experiment.evaluation.extractors}
    return next((name for name, item in settings.items() if METRIC in provides(item)), None)


def stages(experiment: Experiment, configfile: Path) -> Iterator[tuple[str, dict]]:
    """The stages that are missing or outdated, each as a command of `harness` with its arguments.
    Every stage must have run before the next one is taken. Networks that are trained are not made
    here, but a `UserError` (code "missing-inputs")."""
    known, seed = all_stages(experiment), experiment.training.seeds[0]
    # The data first: networks that were trained on it are compared with it.
    for key in ("data", *(f"features {name}" for name in experiment.evaluation.extractors)):
        stage = known[key]
        if stage.is_current():
            continue
        for name in stage.arguments:
            if FEATURES[experiment.features[name].type].trained:
                command = ["python", "-m", "harness", *key.split(), "--configfile", str(configfile)]
                message = f"{stage.record} is missing or outdated, and nothing is trained here; "
                message += f"make it with: {shlex.join(command)}"
                raise UserError(message, "missing-inputs")
        yield stage.command, dict(zip(("features",), stage.arguments, strict=False))
    name = _extractor(experiment)
    path = experiment.paths.features(name) / "features.json"
    if FeatureRecord.read(path).unavailable:  # the weights may have been provided meanwhile
        yield "features", {"features": name}
    if reason := FeatureRecord.read(path).unavailable:
        message = f"features.{name}: unavailable ({reason}); provide its weights"
        raise UserError(message, "unavailable")
    for student in experiment.released:
        if not known[f"import-student {student} {seed}"].is_current():
            yield "import-student", {"student": student, "seed": seed}
    for student in experiment.released:
        if not _is_scored(experiment, student, seed):
            yield "score", {"student": student, "seed": seed}


def _is_scored(experiment: Experiment, student: str, seed: int) -> bool:
    """Whether the FIDs of the current weights with the current content of the statistics exist."""
    scores = current_scores(experiment, student, seed)
    if scores is None:
        return False
    evaluation = experiment.evaluation
    sha256 = sha256_file(fetch(evaluation.statistics, evaluation.statistics_sha256))
    rows = [row for entry in scores.entries for row in entry.rows if row.metric == METRIC]
    references = {scores.protocols[row.protocol]["reference_sha256"] for row in rows}
    return references == {sha256} and all(row.value is not None for row in rows)


def comparisons(experiment: Experiment) -> Iterator[Comparison]:
    """Compare every released student, from up-to-date scores."""
    table, seed = collect(experiment, partial=True)[0], experiment.training.seeds[0]
    for name in experiment.released:
        fids, _ = fid_rows(experiment, table, name)
        sha256 = training_record(experiment, name, seed).released["sha256"]
        found = []
        for entry in numbers_of(experiment, name):
            values, text, _ = measure(fids, statistic_of(entry), released=True)
            allowed = tolerance(entry, len(fids))
            found.append(Comparison(name, values.mean(), text, sha256, entry, allowed))
        yield min(found, key=lambda c: abs(c.measured - c.entry["value"]) / c.tolerance)


def verify(experiment: Experiment) -> None:
    """Print a line for each released student; a `UserError` (code "mismatch") if one differs."""
    found = list(comparisons(experiment))
    print(*found, sep="\n")
    if differ := [comparison.student for comparison in found if not comparison.agrees]:
        reason = "sampler, preconditioning, detector or statistics are not the authors'"
        message = f"{len(differ)} of {len(found)} released students differ from their published FID"
        raise UserError(
            f"{message} ({', '.join(differ)}): {reason}, or the file is another", "mismatch"
        )
