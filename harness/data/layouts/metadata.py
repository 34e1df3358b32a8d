"""Hugging Face's imagefolder with a table: `metadata.csv` or `metadata.jsonl` with the columns
`file_name` (relative to the table) and `label`, or `text` for text-to-image data."""

import csv
import io
import json

from harness.data.image_archive import MAX_INDEX_BYTES, TABLES, Files
from harness.data.layouts.base import (
    LAYOUTS,
    TEXT_COLUMNS,
    Layout,
    Listing,
    file_contents,
    find_column,
    same_type,
    split_folders,
)
from harness.errors import UserError


@LAYOUTS.register("metadata")
class MetadataLayout(Layout):
    description = "a table of labels"
    has_columns = True

    @classmethod
    def accepts(cls, files):
        tables = any(name in files.sizes for name in TABLES)
        return tables and not any(name in files.sizes for name in ("dataset.json", "labels"))

    def parts(self, files, label_column):
        names = files.images()
        table = next(name for name in TABLES if name in files.sizes)
        where, rows = files.where(table), _rows(files, table)
        if missing := sorted(set(names) - rows.keys()):
            raise UserError(f"{where} has no row for {missing[0]}", "labels")
        if extra := sorted(rows.keys() - set(names)):
            raise UserError(f"{where}: {extra[0]} does not exist", "labels")
        columns = [key for key in next(iter(rows.values()), {}) if key != "file_name"]
        column = find_column(where, columns, ("label", *TEXT_COLUMNS), label_column)
        reason = f"{where} has no column label, but {', '.join(columns) or 'no other column'}"
        folders = split_folders(files.top_folders(names)) or {"train": ""}
        parts = {}
        for part, folder in folders.items():
            own = [name for name in names if not folder or name.startswith(f"{folder}/")]
            labels = column and _labels(where, column, {name: rows[name] for name in own})
            parts[part] = Listing(own, file_contents(files, own), labels, reason)
        return parts


def _rows(files: Files, table: str) -> dict[str, dict]:
    """The rows by the name of their image."""
    where = files.where(table)
    try:
        text = files.read(table, MAX_INDEX_BYTES).decode("utf-8-sig")
        if table.endswith(".csv"):
            found = list(csv.DictReader(io.StringIO(text, newline="")))
        else:
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, RecursionError, csv.Error) as error:
        raise UserError(f"{where} could not be read ({error})", "labels") from None
    rows = {}
    for number, row in enumerate(found, 1):
        name = row.get("file_name") if isinstance(row, dict) else None
        if not isinstance(name, str):
            raise UserError(f"{where}: row {number} has no file_name", "labels")
        if None in row:  # of csv: cells beyond the header
            message = (
                f"row {number} has more cells than the header; put texts with commas in quotes"
            )
            raise UserError(f"{where}: {message}", "labels")
        name = name.replace("\\", "/").removeprefix("./")
        if name in rows:
            raise UserError(f"{where} has two rows for {name}", "labels")
        rows[name] = row
    return rows


def _labels(where: str, column: str, rows: dict[str, dict]) -> list:
    """A column; numbers in a CSV file are numbers."""
    values = [row.get(column) for row in rows.values()]
    if all(isinstance(v, str) and v.strip().isdecimal() for v in values):
        values = [int(value) for value in values]
    return same_type(f"{where}: {column}", list(rows), values)
