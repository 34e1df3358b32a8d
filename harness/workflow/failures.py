"""Records of failed stages: `failure.json` in the folder of what the stage would have made."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from harness.config.experiment import Experiment
from harness.io.artifacts import read_json, write_json
from harness.workflow.machine import is_first

FILE = "failure.json"


@contextlib.contextmanager
def record_failure(folder: Path, stage: str) -> Iterator[None]:
    """Write `failure.json` if the block raises; a new attempt removes the old record."""
    if is_first():
        (folder / FILE).unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        with contextlib.suppress(OSError):  # the disk may be full
            write_json(folder / FILE, {"stage": stage, "reason": reason})
        raise


def run_status(experiment: Experiment, student: str, seed: int) -> str:
    """Status of a run without scores: its first failed dependency, or "missing (…)"."""
    run = experiment.student_run(student, seed)
    folders = filter(None, (run.features, run.pairs, run.folder))
    return teacher_status(experiment, run.student.teacher, *folders)


def teacher_status(experiment: Experiment, teacher: str, *more: Path) -> str:
    """Status of a teacher without scores, likewise; `more`: further folders of dependencies."""
    paths = experiment.paths
    extractors = map(paths.features, experiment.evaluation.extractors)
    for folder in (paths.data, *extractors, paths.teacher(teacher), *more):
        if (folder / FILE).exists():
            record = read_json(folder / FILE)
            return f"failed ({record['stage']}: {record['reason']})"
    return f"missing (not finished; see {paths.logs})"
