"""Column names of comparison tables: `fd_n2000_digits-cnn`."""

from __future__ import annotations

import re
from typing import NamedTuple


class Column(NamedTuple):
    """What the numbers of a column are."""

    metric: str
    num_samples: int
    extractor: str


def column_name(metric: str, num_samples: int, extractor: str) -> str:
    return f"{metric}_n{num_samples}_{extractor}"


def parse_column(name: str) -> Column:
    """The inverse of `column_name`; another text is a `ValueError`."""
    match = re.fullmatch(r"(.+?)_n(\d+)_(.+)", name)
    if match is None:
        raise ValueError(f"{name!r} is not a column name such as fd_n2000_cnn")
    return Column(match[1], int(match[2]), match[3])
