"""Parquet files, as `datasets` and the Hugging Face hub have them: a column of images, files as
`struct{bytes, path}` or plain bytes, and a column of labels: numbers, names, or numbers whose names
are in the schema (`ClassLabel`). Several files are parts of one table, in the order of their names;
train, test and validation in the names make a split. It needs pyarrow."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from harness.data.image_archive import INDEXES, TABLES, Files
from harness.data.layouts.base import (
    LAYOUTS,
    SPLITS,
    TEXT_COLUMNS,
    Layout,
    Listing,
    find_column,
    same_type,
)
from harness.errors import UserError

ROWS = 64  # that are in memory at a time
LABEL_COLUMNS = ("label", "labels", "fine_label", "class")
SUFFIX = ".parquet"


@LAYOUTS.register("parquet")
class ParquetLayout(Layout):
    description = "parquet files"
    has_columns = True

    @classmethod
    def accepts(cls, files):
        others = any(name in files.sizes for name in (*INDEXES, *TABLES))
        return not others and any(name.lower().endswith(SUFFIX) for name in files.sizes)

    def parts(self, files, label_column):
        names = sorted(name for name in files.sizes if name.lower().endswith(SUFFIX))
        if images := files.images():
            message = f"{files.path} has both parquet files and images ({images[0]})"
            raise UserError(f"{message}; use one of them as data.source", "mixed-layouts")
        grouped: dict[str, list[str]] = {}
        for name in names:
            grouped.setdefault(_part(name) or "train", []).append(name)
        if "train" not in grouped:  # a test set alone
            grouped = {"train": names}
        if len(folders := {name.rpartition("/")[0] for name in grouped["train"]}) > 1:
            message = f"has parquet files in the folders {', '.join(sorted(folders))}"
            raise UserError(f"{files.path} {message}; use one of them as data.source", "subsets")
        return {part: _listing(files, own, label_column) for part, own in grouped.items()}


def _part(name: str) -> str | None:
    """The part of a split that a file's name or folder means."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((part for part, known in SPLITS.items() if not set(known).isdisjoint(words)), None)


def _pyarrow(files: Files):
    try:
        import pyarrow.parquet
    except ImportError:
        message = f"{files.path} needs pyarrow: pip install -e '.[parquet]'"
        raise UserError(message, "missing-package") from None
    return pyarrow


def _open(files: Files, name: str):
    pyarrow = _pyarrow(files)
    try:
        return pyarrow.parquet.ParquetFile(files.open(name))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _damaged(files, name, error) from None


def _damaged(files: Files, name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(f"{files.where(name)} could not be read ({reason})", "damaged")


def _listing(files: Files, names: Sequence[str], label_column: str | None) -> Listing:
    pyarrow, schema, tables, values = _pyarrow(files), None, [], []
    for name in names:
        file = _open(files, name)
        if schema is None:
            schema, first = file.schema_arrow, name
            features = _features(schema)
            image = _image_column(files.where(name), schema, features)
            classes = _class_labels(features)
            known = (*(classes if len(classes) == 1 else ()), *LABEL_COLUMNS, *TEXT_COLUMNS)
            columns = [column for column in schema.names if column != image]
            column = find_column(files.where(name), columns, known, label_column)
            named = classes.get(column)
        elif not {image, column} - {None} <= set(file.schema_arrow.names):
            message = f"{files.where(name)} has other columns than {first}"
            raise UserError(message, "subsets")
        tables.append((name, file.metadata.num_rows))
        if column is not None:
            try:
                values += file.read([column])[column].to_pylist()
            except (pyarrow.ArrowException, OSError, KeyError) as error:  # KeyError: two of a name
                raise _damaged(files, name, error) from None
    rows = [f"{name}, row {i}" for name, count in tables for i in range(count)]
    if files.path.is_file():
        rows = [f"row {i}" for i in range(len(rows))]
    where = f"{files.where(first)}: {column}"
    labels = None
    if column is not None:
        labels = same_type(where, rows, values)
        numbers = [value for value in labels if isinstance(value, int)]
        if named and (bad := [value for value in numbers if not 0 <= value < len(named)]):
            message = f"{bad[0]} is none of its {len(named)} classes"
            raise UserError(f"{where}: {message}", "label-range")
    reason = f"{files.where(first)} has no column of labels, but {', '.join(columns) or 'no other'}"
    contents = partial(_images, files, names, image)
    return Listing(rows, contents, labels, f"{reason}; name one as data.label_column", named)


def _features(schema) -> dict[str, dict]:
    """Column -> type, as `datasets` writes them into the schema."""
    try:
        stored = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {key: value for key, value in stored.items() if isinstance(value, dict)}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _class_labels(features: dict[str, dict]) -> dict[str, tuple[str, ...]]:
    """Column -> names of its numbers."""
    return {
        column: tuple(map(str, feature["names"]))
        for column, feature in features.items()
        if feature.get("_type") == "ClassLabel" and isinstance(feature.get("names"), list)
    }


def _image_column(where: str, schema, features: dict[str, dict]) -> str:
    """The column of images: the one that `datasets` calls so, or the only one that may be."""
    from pyarrow import types

    def may_be(kind) -> bool:
        if types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0 and may_be(kind.field("bytes").type)
        return types.is_binary(kind) or types.is_large_binary(kind)

    found = [name for name in schema.names if features.get(name, {}).get("_type") == "Image"]
    found = found or [field.name for field in schema if may_be(field.type)]
    usual = [name for name in found if name in ("image", "img")]
    if len(chosen := usual or found) != 1 or not may_be(schema.field(chosen[0]).type):
        message = f"one column of images (files as bytes, or struct{{bytes, path}}), not {found}"
        raise UserError(f"{where}: expected {message}", "image-format")
    return chosen[0]


def _images(files: Files, names: Sequence[str], column: str) -> Iterator[Callable[[], bytes]]:
    """The images, a few rows at a time. An image that the table only names is an error."""
    pyarrow = _pyarrow(files)
    for name in names:
        file, row = _open(files, name), 0
        try:
            for batch in file.iter_batches(ROWS, columns=[column]):
                for value in batch.column(0).to_pylist():
                    value = value["bytes"] if isinstance(value, dict) else value
                    if value is None:
                        message = f"{files.where(name)}: row {row} has no bytes in {column}"
                        raise UserError(message, "damaged")
                    yield partial(bytes, value)
                    row += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise _damaged(files, name, error) from None
