"""Reject phrases that are not plain technical English: `python tools/check_language.py [FILE ...]`.

Prints every occurrence with its file and line; the exit status is 1 if there is one. Without
arguments, all tracked text files of the project are checked. CONTRIBUTING.md describes the style.
"""

import re
import subprocess
import sys
from pathlib import Path

PATHS = [
    *("harness", "methods", "tests", "tools", "benchmarks", "configs", "docs", "profiles"),
    *("Snakefile", "Makefile", "README.md", "CONTRIBUTING.md", "pyproject.toml"),
]
SUFFIXES = {".py", ".smk", ".j2", ".md", ".yaml", ".toml", ".rst", ""}

# Regular expressions, matched as whole words, also across the lines of a paragraph.
PHRASES = {
    r"(cannot|can|could not|to) be had": "is (not) available, could not download",
    r"(is|are|was|were|be) told": "is reported, gets, knows",
    r"told (all )?at once": "reported together",
    r"(is|are|was|were|be|been) said": "is reported, is printed",
    r"what is said": "the message",
    r"tells? (nothing|of|what|which|how|whether)": "shows, determines",
    r"says? (nothing of|of|what|which)": "describes, reports",
    r"(is|are|was|were|be) asked( for)?": "is requested, is required",
    r"asks? (for|it for|them for)": "requests, requires",
    r"stands? (twice|there|for|in|beside|whole|alone)": "is duplicate, is, replaces",
    r"means? nothing": "has no effect, is not allowed",
    r"what is (to be|there|missing|made|kept|left)": "name the thing",
    r"is to be (said|done|made|kept|had)": "must be",
    r"what of (a|an|the)": "name the thing",
    r"there need not be": "is optional",
    r"need not be there": "may be missing",
    r"(is|are|was|were) not there": "does not exist, is missing",
    r"is there (if|for|until)": "exists",
    r"goes? alone": "runs alone",
    r"(?<!there )is no(?! longer| later| more)": "is not",
    r"(?<!there )are no(?! longer| later| more)": "are not",
    r"(is|are) of no": "has no",
    r"(is|are) (mine|theirs|its own alone)": "belongs to",
    r"mine and theirs": "name both",
    r"(and|or) (its|their) like": "and similar",
    r"at hand": "available",
    r"outlives?": "remains valid",
    r"on (its|their) word": "trusting it",
    r"(kept|lies|lie|made|trained|run) beside": "next to, in addition to",
    r"beside (it|them|each other|one another|this|these|the others?)": "next to, in addition to",
    r"whatever there is": "everything",
    r"nothing but": "only",
    r"no (file|number|run|student|teacher|image|weight|word) but": "only",
    r"(knows|know) nothing of": "does not use",
    r"has it that": "states",
    r"as (it|they) (is|are|was|were) had": "as available",
    r"(one|some|all|each|none) of its own": "a separate one",
    r"what it (is|was) made (of|from)": "its source",
    r"of (which|whom|those) (there|it|they)": "rewrite as two sentences",
    r"(is|are) let go": "is freed",
    r"so to speak|as it were|be it": "delete",
    r"(gets?|got) hold of": "obtains",
    r"makes? sure of": "checks",
}
PATTERN = re.compile("|".join(rf"(?P<p{i}>\b(?:{p})\b)" for i, p in enumerate(PHRASES)), re.I)
ADVICE = list(PHRASES.values())


def findings(text: str) -> list[tuple[int, str, str]]:
    """Line, phrase and advice of every match. Comment signs at line breaks count as spaces."""
    flat = re.sub(r"\n[ \t]*(#|//|\*)?[ \t]*", lambda m: " " + "\0" * (len(m[0]) - 1), text)
    # Match on text without the fillers, and remember where each character came from.
    positions = [i for i, c in enumerate(flat) if c != "\0"]
    compact = flat.replace("\0", "")
    result = []
    for match in PATTERN.finditer(compact):
        line = text.count("\n", 0, positions[match.start()]) + 1
        result.append((line, match[0], ADVICE[int(match.lastgroup[1:])]))
    return result


def main() -> int:
    names = sys.argv[1:]
    if not names:
        listed = subprocess.run(
            ["git", "ls-files", *PATHS], capture_output=True, text=True, check=True
        )
        names = listed.stdout.splitlines()
    count = 0
    for path in map(Path, names):
        if path.suffix not in SUFFIXES or path.resolve() == Path(__file__).resolve():
            continue
        for line, phrase, advice in findings(path.read_text()):
            print(f"{path}:{line}: {phrase!r} (instead: {advice})")
            count += 1
    print(f"{count} phrases to rewrite" if count else "no phrases to rewrite", file=sys.stderr)
    return count > 0


if __name__ == "__main__":
    sys.exit(main())
