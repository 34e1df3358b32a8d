"""comparison.{csv,md,tex}: one row per student, mean ± std over training seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pandas as pd

from harness.artifacts import read_json
from harness.config import Experiment, Limit
from harness.evaluation.metrics import METRICS
from harness.reporting.collect import is_unavailable


@dataclass
class Comparison:
    """`values`: numbers, one row per student, metric columns and `<column>_std`. `columns`: the
    metric columns in order. `notes`: lines that belong under the table."""

    values: pd.DataFrame
    columns: list[str]
    heading: dict[str, str]
    notes: list[str] = field(default_factory=list)


def _facts(experiment: Experiment, name: str, rows: pd.DataFrame) -> dict:
    """What a row says beside its scores."""
    seeds = sorted(rows.seed.dropna().unique())
    facts = {"student": name, "method": rows.method.iloc[0] or "", "seeds": len(seeds) or None}
    facts["nfe"] = rows.nfe.dropna().iloc[0] if rows.nfe.notna().any() else None
    records = [
        read_json(path)
        for seed in seeds
        if (path := experiment.run_dir(name, int(seed)) / "student.json").exists()
    ]
    if records:
        facts["parameters"] = records[0]["parameters"]
        facts["frozen"] = records[0]["frozen_fraction"]
        facts["data_free"] = "yes" if records[0]["data_free"] else "no"
        for unit in ("images", "flops", "seconds"):
            facts[unit] = sum(r["ledger"][unit] for r in records) / len(records)
    teacher = experiment.scale_rows.get(name)
    if teacher and (made := experiment.teacher_dir(teacher) / "teacher.json").exists():
        record = read_json(made)
        facts |= {"parameters": record["parameters"], "frozen": 0.0, "data_free": "no"}
        facts |= {u: record.get("ledger", {}).get(u) for u in ("images", "flops", "seconds")}
    bad = rows[(rows.status != "ok") & ~is_unavailable(rows.status)]
    share = f"{len(bad)} of {len(seeds)} " if len(seeds) > 1 else ""
    facts["status"] = "ok" if bad.empty else share + bad.status.iloc[0]
    return facts


def compare(experiment: Experiment, table: pd.DataFrame) -> Comparison:
    final = table[table.final]
    main, columns = experiment.evaluation.num_samples, []
    for column, group in final[final.column != ""].groupby("column", sort=False):
        columns.append((group.num_samples.iloc[0] != main, column))
    columns = [column for _, column in sorted(columns, key=lambda pair: pair[0])]
    rows = []
    for name in [*experiment.scale_rows, *experiment.students]:
        mine = final[final.student == name]
        if mine.empty:
            continue
        row = _facts(experiment, name, mine)
        for column in columns:
            values = mine[mine.column == column].value.astype(float)
            row[column] = values.mean() if len(values) else None
            row[f"{column}_std"] = values.std(ddof=1) if len(values) > 1 else None
            missing = mine[(mine.column == column) & is_unavailable(mine.status)]
            if len(missing):
                row[f"{column}_status"] = missing.status.iloc[0]
        rows.append(row)
    metric_of = final.drop_duplicates("column").set_index("column").metric
    heading = {
        column: f"{column} {'↑' if METRICS[metric_of[column]].higher_is_better else '↓'}"
        for column in columns
    }
    comparison = Comparison(pd.DataFrame(rows), columns, heading)
    comparison.notes = _notes(experiment, table)
    return comparison


def _budget(limits: list[Limit]) -> str:
    return ", ".join(f"{limit.amount:g} {limit.unit}" for limit in limits)


def _notes(experiment: Experiment, table: pd.DataFrame) -> list[str]:
    seeds = experiment.training.seeds
    reference = table.reference.dropna()
    held_out = (
        " `_n…` is the sample count; at the held-out size, values are means over disjoint subsets; "
        "`floor` is the real held-out part."
    )
    said = {s: _budget(experiment.budget(s)) for s in experiment.students}
    budgets = _budget(experiment.training.budget)
    budgets += "".join(f"; {s}: {text}" for s, text in said.items() if text != budgets)
    notes = [
        f"Mean ± std over {len(seeds)} training seeds; EMA weights at the end of the budget "
        f"({budgets}); "
        f"sampling seed {experiment.evaluation.sampling_seed}; reference "
        f"{', '.join(reference.unique()) or 'missing'}."
        + (held_out if (table.student == "floor").any() else "")
    ]
    for name, section in experiment.students.items():
        path = experiment.run_dir(name, seeds[0]) / "student.json"
        if not path.exists():
            continue
        record = read_json(path)
        changed = ", ".join(f"{k} {v}" for k, v in record["changed_settings"].items())
        deviations = "; ".join(record["deviations"])
        frozen = f"; {record['frozen_fraction']:.0%} frozen" if record["frozen_fraction"] else ""
        lost = sum(record["nonfinite"].values())
        notes.append(
            f"{name}: method {section.method} ({record['paper']}){frozen}. {deviations}. "
            f"Settings other than the method's defaults: {changed or 'none'}."
            + (f" {lost} non-finite steps skipped (seed {seeds[0]})." if lost else "")
        )
    for name in experiment.evaluation.extractors:
        folder = experiment.features_dir(name)
        record = read_json(path) if (path := folder / "features.json").exists() else {}
        if "unavailable" in record:
            notes.append(f"{name} is unavailable: {record['why']}; then delete {folder}.")
    for flag, text in (
        ("trained-on-extractor", "were trained against the network of that column"),
        (
            "shares-pretraining",
            "were trained against a network that had seen the same images as that column's (a "
            "lead in it may vanish in other features)",
        ),
        ("contended", "were timed beside other work: do not compare their seconds"),
    ):
        flagged = table[table.flag.fillna("").str.contains(flag)]
        if len(flagged):
            notes.append(f"Flag {flag}: {', '.join(flagged.student.unique())} {text}.")
    return notes


def cell(value, std, digits: int = 3) -> str:
    """A value to `digits` significant digits, and its spread to the same decimals."""
    if value is None or pd.isna(value):
        return "–"
    magnitude = math.floor(math.log10(abs(value))) if value else 0
    decimals = max(0, digits - 1 - magnitude)
    text = f"{value:.{decimals}f}"
    return text if std is None or pd.isna(std) else f"{text} ± {std:.{decimals}f}"


def formatted(comparison: Comparison, columns: list[str] | None = None) -> pd.DataFrame:
    """The table as text."""
    columns = comparison.columns if columns is None else columns
    lines = []
    for _, row in comparison.values.iterrows():

        def number(key: str, scale: float = 1, form: str = "{:,.0f}", row=row) -> str:
            value = row.get(key)
            return "–" if value is None or pd.isna(value) else form.format(value / scale)

        line = {"student": row.student}
        for c in columns:
            status = row.get(f"{c}_status")
            value = status if isinstance(status, str) else cell(row[c], row[f"{c}_std"])
            line[comparison.heading[c]] = value
        line |= {
            "NFE": number("nfe"),
            "seeds": number("seeds"),
            "parameters": number("parameters"),
            "frozen": number("frozen", 0.01, "{:.0f} %"),
            "data-free": row.get("data_free") if isinstance(row.get("data_free"), str) else "–",
            "images": number("images"),
            "TFLOPs": number("flops", 1e12, "{:.3g}"),
            "seconds": number("seconds"),
        }
        if (comparison.values.status != "ok").any():
            line["status"] = row.status
        lines.append(line)
    return pd.DataFrame(lines)


def main_columns(comparison: Comparison, main_metric: str, num_samples: int) -> list[str]:
    """Columns at the main sample count (or the most that a metric takes of it), and the main metric
    at the held-out size."""

    def main(column: str) -> bool:
        metric = METRICS[column.split("_n")[0]]
        return metric.name == main_metric or f"_n{metric.count(num_samples)}_" in column

    return [column for column in comparison.columns if main(column)]


def to_markdown(comparison: Comparison, title: str, columns: list[str]) -> str:
    # Tabulate would strip and re-format text that looks like numbers.
    body = formatted(comparison, columns).to_markdown(index=False, disable_numparse=True)
    notes = "\n".join(f"* {note}" for note in comparison.notes)
    return f"# {title}\n\n{body}\n\n{notes}\n"


def to_latex(comparison: Comparison, title: str, columns: list[str]) -> str:
    text = formatted(comparison, columns)
    return latex(text, title, "l" + "r" * (text.shape[1] - 1))


def latex(text: pd.DataFrame, title: str, column_format: str) -> str:
    """A booktabs table; needs \\usepackage{booktabs}."""
    body = text.to_latex(index=False, escape=True, column_format=column_format)
    for old, new in (("±", r"$\pm$"), ("↑", r"$\uparrow$"), ("↓", r"$\downarrow$"), ("–", "--")):
        body = body.replace(old, new)
    return f"% {title}\n{body}"
