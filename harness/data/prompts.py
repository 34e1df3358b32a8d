"""Prompt files: plain text, one prompt per line."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from harness.errors import UserError
from harness.io.artifacts import (
    digest,
    sha256_file,
)


@dataclass(frozen=True)
class Prompts:
    """`texts` in their order; `sha256` of the file that they come from, or of themselves."""

    texts: tuple[str, ...]
    sha256: str

    def __len__(self) -> int:
        return len(self.texts)


def prompts_of(texts: tuple[str, ...]) -> Prompts:
    """Prompts that come from no file."""
    return Prompts(texts, digest(texts))


def read_prompts(path: Path, told: bool = False) -> Prompts:
    """The prompts of a text file. An empty line is refused; prompts that stand more than once, as
    in COCO's captions, are counted and (unless `told`) told: each line is a prompt of its own."""
    try:
        # Not splitlines: captions from the web hold what that takes for ends of lines, too.
        lines = Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text: {error}") from None
    texts = tuple(line.strip() for line in lines)
    if texts == ("",):
        raise UserError(f"{path} holds no prompts: one a line")
    if empty := [number for number, text in enumerate(texts, 1) if not text]:
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise UserError(f"{path}: line {empty[0]}{more} is empty; a prompt stands on each line")
    if not told and (repeated := len(texts) - len(set(texts))):
        print(
            f"warning: {path}: {repeated} of {len(texts)} prompts repeat an earlier one; each "
            "line counts as a prompt of its own",
            file=sys.stderr,
        )
    return Prompts(texts, sha256_file(path))
