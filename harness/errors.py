"""The one exception that a user's mistake raises."""


class UserError(Exception):
    """A mistake that the user can mend.

    The message names the key or file and the way out; the command line prints it without a
    traceback.
    """


def did_you_mean(name: str, known) -> str:
    """`"; did you mean 'x'?"` for the nearest of `known`, or the list of what is known."""
    from difflib import get_close_matches

    known = {text.lower(): text for text in sorted(known)}
    near = get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {known[near[0]]!r}?"
    return f"; known: {', '.join(known.values())}" if known else ""
