"""Write the tables of README.md from results/reference/, in place.

    python -m tools.readme_tables

A table of README belongs to the experiment of HEADLINES whose headline table has all its columns;
the table of claims shows the verdicts of digits-claims. Columns that README omits stay omitted.
"""

import re
from pathlib import Path

import pandas as pd

from harness.reporting.formatting import escape_cell

ROOT = Path(__file__).parent.parent
REFERENCE = ROOT / "results" / "reference"
HEADLINES = ("digits", "fashion", "digits-t2i")


def split(line: str) -> list[str]:
    """The cells of a row, whose own `|` are written `\\|`."""
    return re.split(r"(?<!\\)\|", line.strip().strip("|"))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in split(line)]


def headlines() -> dict[tuple[str, ...], list[str]]:
    """The lines of the headline tables, by their columns."""
    files = [REFERENCE / name / "tables" / "headline.md" for name in HEADLINES]
    tables = [file.read_text().splitlines() for file in files]
    return {tuple(cells(table[0])): table for table in tables}


def columns_of(table: list[str], wanted: list[str]) -> list[str]:
    """The lines of a table with these columns only; columns keep their widths."""
    kept = [cells(table[0]).index(column) for column in wanted]
    rows = [split(line) for line in table]
    return ["|" + "|".join(row[i] for i in kept) + "|" for row in rows]


def verdicts() -> list[str]:
    claims = pd.read_csv(REFERENCE / "digits-claims" / "tables" / "claims.csv")
    columns = [f"in {column.rsplit('_', 1)[1]}" for column in claims.column.unique()]
    lines = [f"| claim | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for claim, rows in claims.groupby("claim", sort=False):
        lines.append(f"| {escape_cell(claim)} | {' | '.join(rows.verdict)} |")
    return lines


def with_tables(readme: str) -> str:
    """README's text with the tables of today's reference results."""
    known, lines, out = headlines(), readme.splitlines(), []
    while lines:
        table: list[str] = []
        while lines and lines[0].startswith("|"):
            table.append(lines.pop(0))
        if not table:
            out.append(lines.pop(0))
            continue
        wanted = cells(table[0])
        if wanted[0] == "claim":
            table = verdicts()
        for columns, headline in known.items():
            if set(wanted) <= set(columns):
                table = columns_of(headline, wanted)
        out += table
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    file = ROOT / "README.md"
    file.write_text(with_tables(file.read_text()))
