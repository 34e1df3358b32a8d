"""Numbers as text, and text tables as markdown and LaTeX."""

import math
import re
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from harness.io.artifacts import write_text

MISSING = "–"
# Flags of scores: the mark after the number, and its meaning.
FLAGS = {
    "trained-on-extractor": ("†", "the student was trained against this column's network"),
    "shares-pretraining": (
        "‡",
        "the student was trained against a network pretrained on the same images as this column's "
        "(its lead may not hold in other features)",
    ),
    "released": ("¶", "the authors' released weights, not trained here"),
    "contended": ("§", "other jobs shared the machine: do not compare its seconds"),
}
LATEX = {
    **{"±": r"$\pm$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "–": "--", "−": "$-$"},
    **{"≤": r"$\leq$", "≥": r"$\geq$", "×": r"$\times$"},
    **{"†": r"$\dagger$", "‡": r"$\ddagger$", "§": r"\S{}", "¶": r"\P{}"},
}


def listed(names: Iterable[str]) -> str:
    """`"a, b and c"`."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def spread_text(value: float | None, std: float | None = None) -> str:
    """A value to three significant digits and its spread to the same decimals."""
    if not pd.notna(value):
        return MISSING
    decimals = max(0, 2 - math.floor(math.log10(abs(value or 1))))
    text = f"{value:.{decimals}f}"
    return f"{text} ± {std:.{decimals}f}" if pd.notna(std) else text


def number_text(value: object, form: str = ".3g", scale: float = 1) -> str:
    """A number in a format, divided by `scale`; "–" if unknown."""
    return format(value / scale, form) if pd.notna(value) else MISSING


def rounded_text(value: float) -> str:
    """A number with three significant digits and no exponent: "11,300", "0.83"; "–" if unknown."""
    if not pd.notna(value) or math.isinf(value):
        return MISSING
    decimals = 2 - math.floor(math.log10(abs(value))) if value else 0
    text = f"{round(value, decimals):,.{max(0, decimals)}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def minus(text: str) -> str:
    """A number's text with a typographic minus sign."""
    return text.replace("-", "−")


def interval_text(row) -> tuple[str, str]:
    """A row's difference and its interval (low, high), rounded to the decimals that the width of
    the interval supports."""
    if not pd.notna(row.difference):
        return "", ""
    size = (row.high - row.low) / 2 if row.high > row.low else abs(row.difference) / 10
    decimals = max(0, 1 - math.floor(math.log10(size))) if size else 2
    form = f"+.{decimals}f" if decimals <= 6 else "+.1e"
    bounds = [minus(format(bound, form)) for bound in (row.low, row.high) if pd.notna(bound)]
    return minus(format(row.difference, form)), f"({' to '.join(bounds)})" if bounds else ""


def as_text(table: pd.DataFrame, missing: str = MISSING) -> pd.DataFrame:
    """A table of texts, numbers with six significant digits."""
    texts = table.astype(object).map(lambda v: f"{v:g}" if isinstance(v, float) else str(v))
    return texts.where(table.notna(), missing)


def rounded(table: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """A copy with some columns as text of three significant digits."""
    return table.assign(**{column: table[column].map(number_text) for column in columns})


def flagged(text: str, flags: object) -> str:
    """A number's text with the marks of its space-separated flags."""
    if text == MISSING or not isinstance(flags, str):
        return text
    return text + "".join(FLAGS[flag][0] for flag in flags.split())


def escape_cell(value: object) -> object:
    """A cell of a markdown table: a text on one line, whose `|` do not end the cell."""
    return re.sub(r"\s*\n\s*", " ", value).replace("|", r"\|") if isinstance(value, str) else value


def markdown(table: pd.DataFrame, **options) -> str:
    """A markdown table of texts (tabulate would reformat those that look like numbers). For the
    terminal, with another `tablefmt`, texts are unchanged."""
    if "tablefmt" not in options:
        table = table.rename(columns=escape_cell).map(escape_cell)
    return table.to_markdown(index=False, disable_numparse=True, **options)


def write_table(
    table: pd.DataFrame, folder: Path, name: str, title: str, caption: str, texts: pd.DataFrame
) -> list[Path]:
    """Write a table as CSV and its `texts` as markdown with a title; returns the paths."""
    paths = [folder / f"{name}.csv", folder / f"{name}.md"]
    write_text(paths[0], table.to_csv(index=False))
    write_text(paths[1], f"# {title}\n\n{markdown(texts)}\n\n{caption}\n")
    return paths


def latex(table: pd.DataFrame, comment: str, column_format: str) -> str:
    """A booktabs table (requires \\usepackage{booktabs}) after a comment line."""
    body = table.to_latex(index=False, escape=True, column_format=column_format)
    return f"% {comment}\n{body}".translate(str.maketrans(LATEX))
