"""Errors that a user can fix."""

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


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest of the known names, or a list of all of them."""
    by_lower_case = {text.lower(): text for text in sorted(known)}
    close = get_close_matches(name.lower(), by_lower_case, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {by_lower_case[close[0]]!r}?"
    return f"; known: {', '.join(by_lower_case.values())}" if by_lower_case else ""
