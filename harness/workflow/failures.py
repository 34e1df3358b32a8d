"""Why a stage failed, kept beside what it would have made, for the tables and `status`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from harness.config.experiment import Experiment
from harness.io.artifacts import read_json, write_json
from harness.workflow.machine import is_first

FILE = "failure.json"


@contextlib.contextmanager
def recorded(folder: Path, stage: str) -> Iterator[None]:
    """Write `failure.json` if the block fails; a new attempt removes the old one."""
    if is_first():
        (folder / FILE).unlink(missing_ok=True)
    try:
        yield
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        with contextlib.suppress(OSError):  # the disk may be full
            write_json(folder / FILE, {"stage": stage, "reason": reason})
        raise


def reason(experiment: Experiment, student: str, seed: int) -> str:
    """The status of a run without scores: what failed first on the way to them."""
    needs, between = experiment.requirements(student), []
    if needs.features:
        between.append(experiment.features_dir(needs.features))
    if needs.pairs:
        between.append(experiment.pairs_dir(experiment.pairs_name(student)))
    last = experiment.run_dir(student, seed)
    return _first(experiment, experiment.teacher_of(student), [*between, last])


def teacher_reason(experiment: Experiment, teacher: str) -> str:
    """The same for the rows of a teacher."""
    return _first(experiment, teacher, [])


def _first(experiment: Experiment, teacher: str, later: list[Path]) -> str:
    folders = [experiment.features_dir(name) for name in experiment.evaluation.extractors]
    for folder in [experiment.data_dir(), *folders, experiment.teacher_dir(teacher), *later]:
        if (folder / FILE).exists():
            record = read_json(folder / FILE)
            return f"failed ({record['stage']}: {record['reason']})"
    return f"missing (not finished; see {experiment.root / 'logs'})"
