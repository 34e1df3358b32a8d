"""Checks of the sections `paper` and `claims`."""

from collections.abc import Collection, Sequence

from harness.config.schema import ClaimSection, PaperSection
from harness.errors import Problem, did_you_mean
from harness.reporting.published.catalogue import published


def check_claims(claims: Sequence[ClaimSection], students: Collection[str]) -> list[Problem]:
    """Errors in `claims`, for an experiment with these students."""
    problems = []
    for i, claim in enumerate(claims):
        for role in ("better", "worse"):
            name = getattr(claim, role)
            if name not in students:
                message = f"unknown student {name!r}{did_you_mean(name, students)}"
                problems.append(Problem(f"claims.{i}.{role}", "unknown-name", message))
        if claim.better == claim.worse:
            message = f"{claim.better!r} is both better and worse"
            problems.append(Problem(f"claims.{i}", "same-student", message))
    return problems


def check_paper(
    paper: PaperSection, teachers: Collection[str], students: Collection[str]
) -> list[Problem]:
    """Errors in `paper`, for an experiment with these teachers and students."""
    entries = [entry for entry in published() if entry["dataset"] == paper.dataset]
    if not entries:
        hint = did_you_mean(paper.dataset, {entry["dataset"] for entry in published()})
        message = f"no published numbers on {paper.dataset!r}{hint}"
        return [Problem("paper.dataset", "unknown-name", message)]
    kinds = sorted({entry["conditioning"] for entry in entries})
    if paper.conditioning is None and len(kinds) > 1:
        message = f"missing; {paper.dataset} has {' and '.join(kinds)} numbers"
        return [Problem("paper.conditioning", "missing-key", message)]
    if paper.conditioning not in (None, *kinds):
        hint = did_you_mean(paper.conditioning, kinds)
        message = f"{paper.dataset} has no {paper.conditioning!r} numbers{hint}"
        return [Problem("paper.conditioning", "unknown-name", message)]
    problems = []
    rows = ["teacher"] if len(teachers) == 1 else [f"teacher/{name}" for name in teachers]
    rows += students
    entries = [e for e in entries if paper.conditioning in (None, e["conditioning"])]
    for row, name in paper.methods.items():
        key = f"paper.methods.{row}"
        if row not in rows:
            message = f"unknown student{did_you_mean(row, rows)}"
            problems.append(Problem(key, "unknown-name", message))
        variants = [entry["variant"] for entry in entries if entry["method"] == name.method]
        if not variants:
            hint = did_you_mean(name.method, {entry["method"] for entry in entries})
            message = f"no published numbers of {name.method!r}{hint}"
            problems.append(Problem(f"{key}.method", "unknown-name", message))
        elif name.variant not in variants:
            hint = did_you_mean(name.variant or "", set(filter(None, variants)))
            message = f"no published numbers of {name.variant!r}{hint}"
            problems.append(Problem(f"{key}.variant", "unknown-name", message))
    return problems
