"""Errors that a user can fix."""

import errno
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches


class UserError(Exception):
    """A mistake that the user can fix. The message names the key or file and the fix; the command
    line prints it without a traceback. `code` identifies the kind of error for programs."""

    def __init__(self, message: str, code: str = "error"):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Problem:
    """One error in an experiment file: the path of its key, a code, and a message."""

    key: str
    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}"


class ConfigError(UserError):
    """All errors of an experiment file, reported together."""

    def __init__(self, source: str, problems: Iterable[Problem]):
        self.problems = tuple(dict.fromkeys(problems))
        title = f"{source}: {len(self.problems)} error{'s' * (len(self.problems) != 1)}"
        super().__init__("\n  ".join([title, *map(str, self.problems)]), "config")


INTERRUPTED = 130  # exit status after Ctrl-C, as of a shell: 128 + SIGINT

# Errors of a file system -> what to do.
_ELSEWHERE = "or work in another folder (snakemake --directory, or a link results -> /scratch/…)"
REMEDIES = {
    errno.ENOSPC: "free some space and repeat the command",
    errno.EDQUOT: f"free some space and repeat the command, {_ELSEWHERE}",
    errno.EROFS: f"make it writable, {_ELSEWHERE}",
    errno.EACCES: f"ask its owner for access, {_ELSEWHERE}",
    errno.EPERM: f"ask its owner for access, {_ELSEWHERE}",
    errno.ENOTDIR: "a part of this path is a file, not a folder; rename one of them",
    errno.ESTALE: "the network file system has replaced it; repeat the command",
    errno.EIO: "check the disk or the network file system, then repeat the command",
}


def file_system_error(error: BaseException) -> OSError | None:
    """The error of a file system (one of REMEDIES) in an exception: itself, its cause, or, from a
    library in Rust, its text. None for any other exception."""
    if isinstance(error, UserError):
        return None
    found = getattr(error, "errno", None)
    if found is None and (number := re.search(r"\(os error (\d+)\)", str(error))):
        found = int(number[1])
    if found is None:
        names = {os.strerror(number): number for number in (errno.ENOSPC, errno.EDQUOT)}
        found = next((number for name, number in names.items() if name in str(error)), None)
    if found in REMEDIES:
        return OSError(found, os.strerror(found), getattr(error, "filename", None))
    return file_system_error(error.__cause__) if error.__cause__ is not None else None


def file_system_message(error: OSError) -> str:
    """One line that names the file, if it is known, what is wrong and what to do."""
    file = f"{os.fsdecode(error.filename)}: " if error.filename is not None else ""
    return f"{file}{error.strerror}; {REMEDIES[error.errno]}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest of the known names, or a list of all of them."""
    by_lower_case = {text.lower(): text for text in sorted(known)}
    close = get_close_matches(name.lower(), by_lower_case, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {by_lower_case[close[0]]!r}?"
    return f"; known: {', '.join(by_lower_case.values())}" if by_lower_case else ""
