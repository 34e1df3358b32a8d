"""comparison.{csv,md,tex}: one row per student, mean ± std over training seeds.

A training seed's number is its mean over the sampling seeds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pandas as pd

from harness.config.experiment import Experiment
from harness.config.schema import Limit
from harness.evaluation.checks import small_sample_warning
from harness.evaluation.registry import FRECHET, METRICS
from harness.features.base import FEATURES
from harness.io.artifacts import read_json
from harness.reporting.collect import is_unavailable, main_column, main_metric_in
from harness.reporting.intervals import TRAINING_SEEDS, pairwise, ranks

# What a row of scores may be flagged with: the mark at its numbers, and what that means.
FLAGS = {
    "trained-on-extractor": ("†", "trained against the network of that column"),
    "shares-pretraining": (
        "‡",
        "trained against a network that had seen the same images as that column's (a lead in it "
        "may vanish in other features)",
    ),
    "contended": ("§", "timed beside other work: its seconds are not to be compared"),
}


@dataclass
class Comparison:
    """`values`: numbers, one row per student: metric columns, `<column>_std` (over training seeds)
    and `<column>_sampling_std` (over sampling seeds, of one training seed: the root of the mean
    variance); `<column>_flag`, and `seconds_flag`, where some row has one of FLAGS. `columns`: the
    metric columns in order; `identity`: what they are of, one row each: metric, num_samples,
    extractor. `main`: those at the main sample count (or the most that a metric takes of it), and
    the main metrics at the held-out size; `pairs`: `pairwise` of these. `ranked`: those of each
    extractor's main metric, which have `<column>_rank`, too, and `<column>_best_of_<k>`, the best
    of the k sampling seeds, averaged over training seeds. `notes`: lines that belong under the
    table."""

    values: pd.DataFrame
    columns: list[str]
    identity: pd.DataFrame
    main: list[str]
    pairs: pd.DataFrame
    heading: dict[str, str]
    ranked: list[str] = field(default_factory=list)
    best_of: int = 1
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
    if flag := _flags(rows, "contended"):
        facts["seconds_flag"] = flag
    bad = rows[(rows.status != "ok") & ~is_unavailable(rows.status)]
    share = f"{len(bad)} of {len(seeds)} " if len(seeds) > 1 else ""
    facts["status"] = "ok" if bad.empty else share + bad.status.iloc[0]
    return facts


def _flags(rows: pd.DataFrame, *names: str) -> str:
    """Those of the flags that some of the rows have."""
    there = set(" ".join(rows.flag.dropna()).split())
    return " ".join(name for name in names if name in there)


def marked(text: str, flags: object) -> str:
    """A number's text with the marks of its `<column>_flag`."""
    if text == "–" or not isinstance(flags, str):
        return text
    return text + "".join(FLAGS[flag][0] for flag in flags.split())


def compare(experiment: Experiment, table: pd.DataFrame) -> Comparison:
    final, evaluation = table[table.final], experiment.evaluation
    identity = final[final.column != ""].drop_duplicates("column").set_index("column")
    identity = identity[["metric", "num_samples", "extractor"]]
    columns = list(identity[identity.num_samples == evaluation.num_samples].index)
    columns += [column for column in identity.index if column not in columns]
    main = [column for column in columns if _is_main(experiment, identity.loc[column])]
    of_main_metric = {main_column(experiment, name) for name in evaluation.extractors}
    ranked = [column for column in identity.index if column in of_main_metric]
    pairs = pairwise(experiment, table, main)
    best_of, rows = len(evaluation.sampling_seeds), []
    for name in [*experiment.scale_rows, *experiment.students]:
        mine = final[final.student == name]
        if mine.empty:
            continue
        row = _facts(experiment, name, mine)
        for column in columns:
            numbers = mine[mine.column == column]
            by_seed = numbers.value.astype(float).groupby(numbers.seed, dropna=False)
            values = by_seed.mean()
            row[column] = values.mean() if len(values) else None
            row[f"{column}_std"] = values.std(ddof=1) if len(values) > 1 else None
            row[f"{column}_sampling_std"] = by_seed.var(ddof=1).mean() ** 0.5
            if column in ranked and best_of > 1 and name != "floor":
                higher = METRICS[identity.metric[column]].higher_is_better
                best = by_seed.max() if higher else by_seed.min()
                row[f"{column}_best_of_{best_of}"] = best.mean()
            if flag := _flags(numbers, "trained-on-extractor", "shares-pretraining"):
                row[f"{column}_flag"] = flag
            missing = mine[(mine.column == column) & is_unavailable(mine.status)]
            if len(missing):
                row[f"{column}_status"] = missing.status.iloc[0]
        rows.append(row)
    for column in ranked:
        told = ranks(pairs, column, list(experiment.students))
        for row in rows:
            row[f"{column}_rank"] = told.get(row["student"])
    heading = {column: f"{column}{METRICS[identity.metric[column]].arrow}" for column in columns}
    notes = _notes(experiment, table)
    values = pd.DataFrame(rows)
    return Comparison(values, columns, identity, main, pairs, heading, ranked, best_of, notes)


def _is_main(experiment: Experiment, column: pd.Series) -> bool:
    metric = METRICS[column.metric]
    most = metric.count(experiment.evaluation.num_samples)
    return column.num_samples == most or metric == main_metric_in(experiment, column.extractor)


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
    noise = experiment.evaluation.sampling_seeds
    notes = [
        f"Mean ± std over {len(seeds)} training seeds, each the mean over sampling seeds "
        f"{', '.join(map(str, noise))} (the std over those: `_sampling_std` in comparison.csv); "
        f"EMA weights at the end of the budget ({budgets}); reference "
        f"{', '.join(reference.unique()) or 'missing'}."
        + (held_out if (table.student == "floor").any() else ""),
        "`rank`: by the intervals of pairwise.csv, for each pair by itself; `tie 1–3` where 0 lies "
        f"in some of them, `not ranked` with fewer than {TRAINING_SEEDS} training seeds.",
    ]
    if len(noise) > 1:
        notes.append(
            f"`best of {len(noise)}`: the best sampling seed, which papers publish; the more "
            "seeds, the better it looks. For comparison with such numbers alone."
        )
    critics: dict[str, list[str]] = {}
    for name, section in experiment.students.items():
        path = experiment.run_dir(name, seeds[0]) / "student.json"
        if not path.exists():
            continue
        record = read_json(path)
        for network in record["trained_against"]:
            critics.setdefault(network, []).append(name)
        changed = ", ".join(f"{k} {v}" for k, v in record["changed_settings"].items())
        deviations = "; ".join(record["deviations"])
        frozen = f"; {record['frozen_fraction']:.0%} frozen" if record["frozen_fraction"] else ""
        lost = sum(record["nonfinite"].values())
        notes.append(
            f"{name}: method {section.method} ({record['paper']}){frozen}. {deviations}. "
            f"Settings other than the method's defaults: {changed or 'none'}."
            + (f" {lost} non-finite steps skipped (seed {seeds[0]})." if lost else "")
        )
    # Networks of one experiment share their images and labels; from elsewhere, flags tell.
    learned = [n for n, item in experiment.features.items() if FEATURES[item.type].trained]
    scoring = [name for name in experiment.evaluation.extractors if name in learned]
    for critic, students in critics.items():
        others = [name for name in scoring if name != critic]
        if critic in learned and others:
            notes.append(
                f"{critic}, which {', '.join(students)} were trained against, has learned from the "
                f"same labelled images as the networks that score ({', '.join(others)})."
            )
    for name in experiment.evaluation.extractors:
        folder = experiment.features_dir(name)
        record = read_json(path) if (path := folder / "features.json").exists() else {}
        if "unavailable" in record:
            notes.append(f"{name} is unavailable: {record['reason']}; then delete {folder}.")
    distances = table[table.final & table.metric.isin(FRECHET)].drop_duplicates("column")
    floor = table[table.student == "floor"].num_samples
    for row in distances[distances.num_samples <= distances.features].itertuples():
        compared = int(floor.max()) if len(floor) else None
        told = small_sample_warning(row.extractor, row.features, row.num_samples, compared)
        notes.append(f"{row.column}: {told}.")
    for flag, (mark, text) in FLAGS.items():
        flagged = table[table.flag.fillna("").str.contains(flag)]
        who = [
            ", ".join(rows.student.unique()) + (f" in {extractor}" if flag != "contended" else "")
            for extractor, rows in flagged.groupby("extractor", sort=False)
        ]
        if who:
            notes.append(f"{mark} {flag} ({'; '.join(dict.fromkeys(who))}): {text}.")
    return notes


def cell(value, std, digits: int = 3) -> str:
    """A value to `digits` significant digits, and its spread to the same decimals."""
    if value is None or pd.isna(value):
        return "–"
    magnitude = math.floor(math.log10(abs(value))) if value else 0
    decimals = max(0, digits - 1 - magnitude)
    text = f"{value:.{decimals}f}"
    return text if std is None or pd.isna(std) else f"{text} ± {std:.{decimals}f}"


def formatted(
    comparison: Comparison, columns: list[str] | None = None, ranked: bool = True
) -> pd.DataFrame:
    """The table as text; `ranked`: with ranks and the best of the sampling seeds."""
    columns = comparison.columns if columns is None else columns
    lines = []
    for _, row in comparison.values.iterrows():

        def number(key: str, scale: float = 1, form: str = "{:,.0f}", row=row) -> str:
            value = row.get(key)
            return "–" if value is None or pd.isna(value) else form.format(value / scale)

        line = {"student": row.student}
        for c in columns:
            status = row.get(f"{c}_status")
            value = status
            if not isinstance(status, str):
                value = marked(cell(row[c], row[f"{c}_std"]), row.get(f"{c}_flag"))
            line[comparison.heading[c]] = value
            if not ranked or c not in comparison.ranked:
                continue
            rank, best = row.get(f"{c}_rank"), f"best_of_{comparison.best_of}"
            line[f"{c} rank"] = rank if isinstance(rank, str) else "–"
            if comparison.best_of > 1:
                value = status if isinstance(status, str) else cell(row[f"{c}_{best}"], None)
                line[f"{c} {best.replace('_', ' ')}"] = value
        line |= {
            "NFE": number("nfe"),
            "seeds": number("seeds"),
            "parameters": number("parameters"),
            "frozen": number("frozen", 0.01, "{:.0f} %"),
            "data-free": row.get("data_free") if isinstance(row.get("data_free"), str) else "–",
            "images": number("images"),
            "TFLOPs": number("flops", 1e12, "{:.3g}"),
            "seconds": marked(number("seconds"), row.get("seconds_flag")),
        }
        if (comparison.values.status != "ok").any():
            line["status"] = row.status
        lines.append(line)
    return pd.DataFrame(lines)


def to_markdown(comparison: Comparison, title: str, columns: list[str]) -> str:
    # Tabulate would strip and re-format text that looks like numbers.
    body = formatted(comparison, columns).to_markdown(index=False, disable_numparse=True)
    notes = "\n".join(f"* {note}" for note in comparison.notes)
    return f"# {title}\n\n{body}\n\n{notes}\n"


def to_latex(comparison: Comparison, title: str, columns: list[str]) -> str:
    text = formatted(comparison, columns)
    signs = tuple(mark for mark, _ in FLAGS.values())
    title = "\n% ".join([title, *(note for note in comparison.notes if note.startswith(signs))])
    return latex(text, title, "l" + "r" * (text.shape[1] - 1))


LATEX = {
    **{"±": r"$\pm$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "–": "--"},
    **{"†": r"$\dagger$", "‡": r"$\ddagger$", "§": r"\S{}"},
}


def latex(text: pd.DataFrame, title: str, column_format: str) -> str:
    """A booktabs table; needs \\usepackage{booktabs}."""
    body = text.to_latex(index=False, escape=True, column_format=column_format)
    body = f"% {title}\n{body}"
    for old, new in LATEX.items():
        body = body.replace(old, new)
    return body
