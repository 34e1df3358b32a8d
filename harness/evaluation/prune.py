"""`harness prune`: remove the weights of snapshots that no report needs."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from harness.config.jobs import Scoring, StudentRun
from harness.errors import UserError
from harness.evaluation.fingerprints import run_scores
from harness.evaluation.pruned import keep_scores
from harness.evaluation.selection import best, criterion, scores_of
from harness.io.artifacts import size_text
from harness.io.locks import run_lock
from harness.io.records import ScoreRecord
from harness.networks import WEIGHTS


@dataclass(frozen=True)
class Prunable:
    """The weights of a run that can be removed. kept: names of the best and the last snapshot, or
    the reason why nothing can be removed. scores: of the run, if something can be removed."""

    files: dict[str, Path]  # snapshot -> weights
    kept: str
    scores: ScoreRecord | None = None

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())


def prunable(scoring: Scoring, job: StudentRun, path: Path) -> Prunable:
    """What can be removed of a run with the score file `path`: the weights of scored snapshots
    other than the last and the best one (the selected one, or without a selection that with the
    best mean score in the main metric)."""
    scores = run_scores(scoring, job, path)
    if scores is None:
        return Prunable({}, "not finished and scored")
    chosen = criterion(scoring)
    values = scores_of(scores.entries, chosen)
    reported = next((e.snapshot for e in scores.entries if e.selected is not None), None)
    if reported is None and not values:
        return Prunable({}, f"no scores in {chosen.metric.name}")
    last = next(entry.snapshot for entry in scores.entries if entry.final)
    keep = {reported or best(values, chosen), last}
    files = {name: job.folder / "snapshots" / name / WEIGHTS for name in values if name not in keep}
    files = {name: file for name, file in files.items() if file.exists()}
    return Prunable(files, " and ".join(sorted(keep)), scores)


def _remove(scoring: Scoring, job: StudentRun, found: Prunable) -> None:
    """Remove weights, after the scores of all snapshots that have weights were written next to
    them. Later selections compare the stored scores of the remaining snapshots as well: computed
    again on another device, they differ by rounding."""
    for name in dict.fromkeys(entry.snapshot for entry in found.scores.entries):
        folder = job.folder / "snapshots" / name
        if (folder / WEIGHTS).exists():
            keep_scores(scoring, found.scores, name, folder)
    for file in found.files.values():
        file.unlink()


def prune(scoring: Scoring, runs: Iterable[tuple[StudentRun, Path]], dry_run: bool = False) -> int:
    """Remove what can be removed of runs, given with their score files; print one line for each,
    and the total. Returns the bytes. dry_run: remove nothing. A run whose records cannot be read is
    skipped, and after the others a `UserError` (code "skipped") names it."""
    total, verb, skipped = 0, "would free" if dry_run else "freed", []
    for job, path in runs:
        if not (job.folder / "student.json").exists():
            print(f"{job.name}: not finished and scored")
            continue
        with run_lock(job.folder):
            try:
                found = prunable(scoring, job, path)
                size, count = found.bytes, len(found.files)
                if found.files and not dry_run:
                    _remove(scoring, job, found)
            except UserError as error:
                print(f"{job.name}: skipped: {error}")
                skipped.append(job.name)
                continue
        total += size
        freed = f"{verb} {size_text(size)} of {count} snapshots; keeps " if count else ""
        print(f"{job.name}: {freed}{found.kept}")
    print(f"{verb} {size_text(total)} ({total:,} bytes)")
    if skipped:
        raise UserError(f"skipped {', '.join(skipped)} (see above)", "skipped")
    return total
