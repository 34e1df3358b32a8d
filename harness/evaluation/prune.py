"""`harness prune`: remove the weights of snapshots that no report needs."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from harness.config.jobs import Scoring, StudentRun
from harness.evaluation.fingerprints import run_scores
from harness.evaluation.selection import best, criterion, scores_of
from harness.io.artifacts import size_text
from harness.io.locks import run_lock
from harness.networks import WEIGHTS


@dataclass(frozen=True)
class Prunable:
    """The weights of a run that can be removed. kept: names of the best and the last snapshot, or
    the reason why nothing can be removed."""

    files: dict[str, Path]  # snapshot -> weights
    kept: str

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
    return Prunable(files, " and ".join(sorted(keep)))


def prune(scoring: Scoring, runs: Iterable[tuple[StudentRun, Path]], dry_run: bool = False) -> int:
    """Remove what can be removed of runs, given with their score files; print one line for each,
    and the total. Returns the bytes. dry_run: remove nothing."""
    total, verb = 0, "would free" if dry_run else "freed"
    for job, path in runs:
        if not (job.folder / "student.json").exists():
            print(f"{job.name}: not finished and scored")
            continue
        with run_lock(job.folder):
            found = prunable(scoring, job, path)
            size, count = found.bytes, len(found.files)
            for file in () if dry_run else found.files.values():
                file.unlink()
        total += size
        freed = f"{verb} {size_text(size)} of {count} snapshots; keeps " if count else ""
        print(f"{job.name}: {freed}{found.kept}")
    print(f"{verb} {size_text(total)} ({total:,} bytes)")
    return total
