"""Recognise prompt lists in other formats than one prompt per line. Read as lines, their numbers,
file names and quotation marks would become part of the prompts."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".xls", ".xlsx")
# Headings of published prompt lists (COCO, PartiPrompts, DrawBench).
COLUMNS = {
    *("caption", "captions", "category", "challenge", "file", "file_name", "filename", "id"),
    *("image", "image_file", "image_id", "label", "note", "path", "prompt", "prompts", "text"),
}
HEADINGS = {"caption", "captions", "prompt", "prompts"}  # as the only one
_NUMBER = re.compile(r'"?\d+"?[,;\t](?!\d{3}\b)')  # a field, unlike "1,000 ships"


def table_format(path: Path | str, lines: Sequence[str] = ()) -> str | None:
    """Why a prompt file with these lines is a table or JSON, as the end of a sentence; None for
    plain prompts."""
    suffix = Path(path).suffix.lower()
    if suffix in SUFFIXES:
        return f"is a {suffix} file"
    if not any(lines):
        return None
    if _is_json("\n".join(lines)) or all(map(_is_json, lines)):
        return "is JSON"
    heading = [field.strip(' "').lower() for field in re.split("[,;\t]", lines[0])]
    if COLUMNS.issuperset(heading) and (len(heading) > 1 or heading[0] in HEADINGS):
        return f"has a line of headings, {lines[0].strip()!r}"
    if len(lines) > 1 and all(map(_NUMBER.match, lines[1:])):  # the first may be another heading
        return "has a number in a column of its own"
    if "\t" in lines[0] and len({line.count("\t") for line in lines}) == 1:
        return "has columns, separated by tabs"
    if all(len(line) > 1 and line[0] == line[-1] == '"' for line in map(str.strip, lines)):
        return "has quotation marks around every prompt"
    return None


def _is_json(text: str) -> bool:
    if text[:1] not in ("[", "{"):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
