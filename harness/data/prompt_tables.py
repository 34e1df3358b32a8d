"""Recognise prompt lists in other formats than one prompt per line. Read as lines, their numbers,
file names and quotation marks would become part of the prompts."""

import csv
import json
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

SUFFIXES = (
    *(".csv", ".tsv", ".tab", ".json", ".jsonl", ".ndjson", ".parquet", ".arrow", ".feather"),
    *(".ods", ".xls", ".xlsx"),
)
SEPARATORS = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "vertical bars"}
# Headings of published prompt lists (COCO, PartiPrompts, DrawBench, LAION).
TEXTS = {
    *("caption", "captions", "description", "prompt", "prompts", "sentence", "sentences", "text"),
}
COLUMNS = TEXTS | {
    *("category", "challenge", "class", "file", "file_name", "filename", "height", "id", "image"),
    *("image_file", "image_id", "index", "key", "label", "note", "path", "split", "url", "width"),
    "",  # of row numbers, as pandas writes them
}
_NAME = re.compile(r"[\w.-]*")  # of a column that is not in COLUMNS
_NUMBER = re.compile(r'"?\d+"?[,;|\t](?!\d{3}\b)')  # a field, unlike "1,000 ships"
_FILE = r'"?(https?://[^\s,;|"]+|[^\s,;|"]+\.(bmp|gif|jpe?g|png|webp))"?'
_FILE_FIELD = re.compile(rf"{_FILE}[,;|\t].*|.*[,;|\t]{_FILE}", re.IGNORECASE)
_ITEM = re.compile(r"(\d+)[.)]\s")  # of a numbered list
_QUOTED = re.compile(r'"([^"]|"")*"')  # a whole line as one field


def table_format(path: Path | str, lines: Sequence[str] = ()) -> str | None:
    """Why a prompt file with these lines is a table or JSON, as the end of a sentence; None for
    plain prompts. path: of a file, or a URL."""
    url = urlsplit(str(path))
    suffix = Path(url.path if url.netloc else path).suffix.lower()
    if suffix in SUFFIXES:
        return f"is a {suffix} file"
    if not any(lines):
        return None
    if _is_json("\n".join(lines)) or all(map(_is_json, lines)):
        return "is JSON"
    lines = [line.strip() for line in lines]
    if any(_is_heading(_fields(lines[0], separator)) for separator in SEPARATORS):
        return f"has a line of headings, {lines[0]!r}"
    return _quotation_marks(lines) or (_columns(lines) if len(lines) > 1 else None)


def _is_json(text: str) -> bool:
    if text[:1] not in ("[", "{"):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _fields(line: str, separator: str) -> list[str]:
    """The fields of a line of a table. A separator within quotation marks belongs to its field."""
    try:
        return next(csv.reader([line], delimiter=separator), [""])
    except csv.Error:  # too long
        return [line]


def _is_heading(fields: list[str]) -> bool:
    names = [field.strip().lower() for field in fields]
    if len(names) == 1:
        return names[0] in TEXTS
    # "text, watermark, logo" is a prompt: programs write no spaces between fields.
    spaces = any(field != field.strip() for field in fields)
    return COLUMNS.issuperset(names) or (
        not spaces and not TEXTS.isdisjoint(names) and all(map(_NAME.fullmatch, names))
    )


def _quotation_marks(lines: list[str]) -> str | None:
    """Why the prompts are in quotation marks that are not part of them."""
    quoted = [line for line in lines if _QUOTED.fullmatch(line)]
    if len(quoted) == len(lines):
        return "has quotation marks around every prompt"
    # Programs often quote only what needs it: fields with separators or with quotation marks.
    needed = len(quoted) > 1 and all("," in line for line in quoted)
    if needed:
        others = set(lines).difference(quoted)
        needed = not any("," in line or '"' in line for line in others)
    if needed or any('""' in line[1:-1] for line in quoted):
        return f"has quotation marks around some prompts, as in a CSV file: {quoted[0]}"
    odd = [line for line in lines if line.count('"') % 2]
    for first, last in zip(odd[::2], odd[1::2], strict=False):
        if first.startswith('"') and last.endswith('"'):
            return f"has quotation marks around a prompt of several lines: {first}"
    return None


def _columns(lines: list[str]) -> str | None:
    """Why the lines, more than one, have columns; the first may be an unknown line of headings."""
    headings = not SEPARATORS.keys().isdisjoint(lines[0])
    for field, name in ((_NUMBER.match, "a number"), (_FILE_FIELD.fullmatch, "a file name")):
        if (headings or field(lines[0])) and all(map(field, lines[1:])):
            return f"has {name} in a column of its own"
    if all("\t" in line for line in lines):
        return "has columns, separated by tabs"
    items = [_ITEM.match(line) for line in lines]
    if all(items) and all(int(b[1]) == int(a[1]) + 1 for a, b in pairwise(items)):
        return "has numbered lines"
    for separator, name in SEPARATORS.items():
        # Unlike in lists of tags, some fields have quotation marks, and all lines as many fields.
        if not any(f'"{separator}' in line or f'{separator}"' in line for line in lines):
            continue
        count = _count_fields(lines[0], separator)
        if count > 1 and all(_count_fields(line, separator) == count for line in lines):
            return f"has columns, separated by {name} without spaces"
    return None


def _count_fields(line: str, separator: str) -> int:
    """The number of fields; 1 if the separators are punctuation, or between digits."""
    fields = _fields(re.sub(r"(?<=\d),(?=\d)", "", line), separator)
    return len(fields) if all(field == field.strip() for field in fields) else 1
