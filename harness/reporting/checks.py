"""Checks of the sections `paper` and `claims`."""

from collections.abc import Iterable, Iterator

from harness.config.schema import ExperimentFile, Names, PaperSection
from harness.errors import Problem, did_you_mean
from harness.reporting.published.match import published


def _unknown(key: str, message: str, name: str | None, known: Iterable[str]) -> Problem:
    return Problem(key, "unknown-name", message + did_you_mean(name or "", known))


def check(file: ExperimentFile, names: Names, files: bool) -> Iterator[Problem]:
    """Errors in `claims` and `paper` (see `harness.validation.CHECKS`)."""
    students, teachers = names["students"], names["teachers"]
    for i, claim in enumerate(file.claims):
        for role in ("better", "worse"):
            name = getattr(claim, role)
            if name not in students:
                yield _unknown(f"claims.{i}.{role}", f"unknown student {name!r}", name, students)
        if claim.better == claim.worse:
            message = f"{claim.better!r} is both better and worse"
            yield Problem(f"claims.{i}", "same-student", message)
    if file.paper is not None:
        references = ["teacher"] if len(teachers) == 1 else [f"teacher/{n}" for n in teachers]
        yield from _check_paper(file.paper, [*references, *students])


def _check_paper(paper: PaperSection, rows: list[str]) -> Iterator[Problem]:
    """Errors in `paper`, for an experiment with these rows of teachers and students."""
    dataset, conditioning = paper.dataset, paper.conditioning
    entries = [entry for entry in published() if entry["dataset"] == dataset]
    kinds = sorted({entry["conditioning"] for entry in entries})
    if not entries:
        known = {entry["dataset"] for entry in published()}
        yield _unknown("paper.dataset", f"no published numbers on {dataset!r}", dataset, known)
    elif conditioning is None and len(kinds) > 1:
        message = f"missing; {dataset} has {' and '.join(kinds)} numbers"
        yield Problem("paper.conditioning", "missing-key", message)
    elif conditioning not in (None, *kinds):
        message = f"{dataset} has no {conditioning!r} numbers"
        yield _unknown("paper.conditioning", message, conditioning, kinds)
    else:
        entries = [e for e in entries if conditioning in (None, e["conditioning"])]
        for row, name in paper.methods.items():
            key, message = f"paper.methods.{row}", "no published numbers of {!r}"
            if row not in rows:
                yield _unknown(key, "unknown student", row, rows)
            variants = {entry["variant"] for entry in entries if entry["method"] == name.method}
            if not variants:
                known = {entry["method"] for entry in entries}
                yield _unknown(f"{key}.method", message.format(name.method), name.method, known)
            elif name.variant not in variants:
                known = variants - {None}
                yield _unknown(f"{key}.variant", message.format(name.variant), name.variant, known)
