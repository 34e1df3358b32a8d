"""Prompt files: plain text, one prompt per line."""

from dataclasses import dataclass
from pathlib import Path

from harness.errors import UserError
from harness.io.artifacts import sha256_file


@dataclass(frozen=True)
class Prompts:
    """Texts by number, which is the line; `sha256` of their file, or of themselves."""

    texts: tuple[str, ...]
    sha256: str

    def __len__(self) -> int:
        return len(self.texts)


def read_prompts(path: Path) -> Prompts:
    """Read a prompt file. Empty lines are errors; prompts may repeat, as COCO's captions do."""
    try:
        # Not splitlines: captions from the web contain other characters that it splits at.
        lines = Path(path).read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist", "missing-file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}", "encoding") from None
    texts = tuple(line.strip() for line in lines)
    if texts == ("",):
        raise UserError(f"{path} is empty; expected one prompt per line", "no-prompts")
    if empty := [number for number, text in enumerate(texts, 1) if not text]:
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise UserError(f"{path}: line {empty[0]}{more} is empty", "empty-prompt")
    return Prompts(texts, sha256_file(path))
