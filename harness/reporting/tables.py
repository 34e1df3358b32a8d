"""comparison.{md,tex}, headline.md and the terminal's table: pivots of the summary as text."""

from collections.abc import Callable

import pandas as pd

from harness.config.experiment import Experiment
from harness.data.registry import has_captions, has_texts
from harness.evaluation.registry import METRICS
from harness.reporting.collect import main_column, main_metric_in
from harness.reporting.formatting import (
    FLAGS,
    MISSING,
    flagged,
    latex,
    markdown,
    number_text,
    spread_text,
)
from harness.reporting.summary import Summary

# Metrics of the headline of text-to-image experiments, in any extractor.
TEXT_METRICS = ("clip-score", "clip-score-100-plain", "aesthetic", "aesthetic-v2")


def score_text(row) -> str:
    """A row of `Summary.scores` as `mean ± std` with its flags, or its status."""
    return row.status if row.status != "ok" else flagged(spread_text(row.mean, row.std), row.flag)


def column_label(column, part: str = "") -> str:
    """`fd_n2000_digits-cnn ↓` for a row of `Summary.columns`, or `fd_n2000_digits-cnn rank`."""
    return f"{column.name} {part}" if part else f"{column.name}{METRICS[column.metric].arrow}"


def text_table(
    summary: Summary,
    columns: list[str],
    ranked: bool = True,
    score: Callable = score_text,
    label: Callable = column_label,
) -> pd.DataFrame:
    """A text table indexed by student: `columns`, the costs of training and, if a student failed,
    the status. ranked: with ranks and the best sampling seed. score, label: as `score_text` and
    `column_label`."""
    students = summary.students.set_index("student")
    table = pd.DataFrame(index=students.index)
    for name in columns:
        column = summary.columns.loc[name]
        rows = summary.scores[summary.scores.column == name].set_index("student")
        texts = [score(row) for row in rows.reset_index().itertuples()]
        table[label(column)] = pd.Series(texts, rows.index, dtype=object)
        if ranked and column.ranked:
            table[label(column, "rank")] = rows["rank"]
            if summary.sampling_seeds > 1:
                best = label(column, f"best of {summary.sampling_seeds}")
                table[best] = rows.best.map(spread_text)
    for heading, unit, form, scale in (
        ("NFE", "nfe", ",.0f", 1),
        ("seeds", "seeds", ",.0f", 1),
        ("parameters", "parameters", ",.0f", 1),
        ("frozen", "frozen", ".0%", 1),
        ("data-free", "data_free", "", 1),
        ("images", "images", ",.0f", 1),
        ("TFLOPs", "flops", ".3g", 1e12),
        ("seconds", "seconds", ",.0f", 1),
    ):
        values = students[unit]
        if form:
            values = values.map(lambda v, f=form, s=scale: number_text(v, f, s))
        table[heading] = values
    table["seconds"] = list(map(flagged, table.seconds, students.flag))
    if (students.status != "ok").any():
        table["status"] = students.status
    return table.astype(object).where(table.notna(), MISSING)


def comparison_columns(summary: Summary) -> list[str]:
    """The main columns, without the metrics of a run's last snapshot only: few enough to read."""
    return [c for c in summary.main if not METRICS[summary.columns.metric[c]].final_only]


def to_markdown(summary: Summary, title: str) -> str:
    body = markdown(text_table(summary, comparison_columns(summary)).reset_index())
    notes = "\n".join(f"* {note}" for note in summary.notes)
    return f"# {title}\n\n{body}\n\n{notes}\n"


def to_latex(summary: Summary, title: str) -> str:
    table = text_table(summary, comparison_columns(summary)).reset_index()
    marks = tuple(mark for mark, _ in FLAGS.values())
    comment = "\n% ".join([title, *(note for note in summary.notes if note.startswith(marks))])
    return latex(table, comment, "l" + "r" * (table.shape[1] - 1))


def headline(experiment: Experiment, summary: Summary) -> str:
    """A markdown table of few columns: quality in the first available extractor, agreement of
    images and texts, and the costs."""
    extractors = experiment.evaluation.extractors
    scored = set(summary.scores.column[summary.scores["mean"].notna()])
    available = [name for name in extractors if main_column(experiment, name) in scored]
    extractor = (available or extractors)[0]
    accuracy = "attribute-accuracy" if has_captions(experiment.data) else "accuracy"
    names = (main_metric_in(experiment, extractor).name, "recall", accuracy)
    columns = summary.columns.loc[summary.main]
    chosen = (columns.extractor == extractor) & columns.metric.isin(names)
    if has_texts(experiment.data):
        chosen |= columns.metric.isin(TEXT_METRICS)
    table = text_table(summary, list(columns.index[chosen]), ranked=False)
    return markdown(table.drop(columns=["parameters", "frozen"]).reset_index()) + "\n"
