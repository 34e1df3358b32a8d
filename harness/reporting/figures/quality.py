"""Quality against the images that received a generator update, or against training compute."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from harness.config.experiment import Experiment
from harness.evaluation.columns import column_name
from harness.evaluation.registry import FRECHET, METRICS
from harness.reporting.collect import main_metric_in
from harness.reporting.figures.style import THOUSANDS, line_style, plain_log

AXES = {
    "images": "images that received a generator update",
    "flops": "training compute, teacher pairs included (TFLOPs)",
}
DIRECTIONS = {True: "higher is better", False: "lower is better", None: "no preferred direction"}


def direction(metric: str) -> str:
    return DIRECTIONS[METRICS[metric].higher_is_better]


def has_log_scale(metric: str) -> bool:
    return metric in FRECHET


def drawn_column(experiment: Experiment, metric: str, extractor: str) -> str:
    """The column of a metric that is drawn: at the largest sample count that it accepts."""
    count = METRICS[metric].count(experiment.evaluation.num_samples)
    return column_name(metric, count, extractor)


def drawn_metrics(experiment: Experiment, table: pd.DataFrame) -> list[tuple[str, str]]:
    """The (metric, extractor) pairs that are drawn if scored: main metrics, then accuracies."""
    scored = set(zip(table.metric, table.extractor, strict=True))
    extractors = experiment.evaluation.extractors
    candidates = [(main_metric_in(experiment, name).name, name) for name in extractors]
    candidates += [("accuracy", name) for name in extractors]
    return [pair for pair in dict.fromkeys(candidates) if pair in scored]


def curves(experiment: Experiment, table: pd.DataFrame, axis: str, column: str) -> pd.DataFrame:
    """The curves of a column against "images" or "flops": student, x, mean, low, high.

    mean, low and high are over training seeds, whose scores are means over their sampling seeds.
    The snapshots are those on the axis's own grid, and the last; FLOPs are in units of 1e12.
    """
    rows = table[(table.column == column) & (table.grid.str.contains(axis) | table.final)]
    rows = rows[rows.student.isin(list(experiment.students))]
    rows = rows.astype({"value": float, "images": float, "flops": float})
    keys = ["student", "snapshot", "seed"]
    per_seed = rows.groupby(keys)[["images", "flops", "value"]].mean().reset_index()
    points = per_seed.groupby(["student", "images"], sort=True)
    values = points.value
    x = points[axis].first() if axis == "images" else points.flops.mean() / 1e12
    result = pd.DataFrame(
        {"x": x, "mean": values.mean(), "low": values.min(), "high": values.max()}
    ).reset_index()
    order = {name: i for i, name in enumerate(experiment.students)}
    result = result.sort_values("student", key=lambda names: names.map(order), kind="stable")
    return result[["student", "x", "mean", "low", "high"]].reset_index(drop=True)


def per_training_seed(final: pd.DataFrame, column: str) -> pd.DataFrame:
    """One row per student and training seed: student, seed, value, stderr of the mean over the
    sampling seeds, whose draws are independent."""
    rows = final[(final.column == column) & (final.status == "ok")]
    rows = rows.astype({"value": float, "stderr": float})
    grouped = rows.groupby(["student", "seed"], dropna=False, sort=False)
    errors = grouped.stderr.agg(lambda e: math.sqrt((e**2).sum(min_count=1)) / len(e))
    return grouped.value.mean().to_frame().assign(stderr=errors).reset_index()


def reference_lines(
    experiment: Experiment, table: pd.DataFrame, column: str, log: bool = False
) -> dict[str, float]:
    """Label -> value of the horizontal lines: the teachers, with many steps and with one, and the
    floor. log: without values that a logarithmic axis cannot show."""
    lines = {}
    for name in experiment.reference_rows:
        rows = table[(table.student == name) & (table.column == column)]
        if rows.empty or (log and rows.value.iloc[0] <= 0):
            continue
        label = name.replace("teacher-1step", "teacher").replace("/", " ")
        nfe = rows.nfe.iloc[0]
        lines[label if pd.isna(nfe) else f"{label}, {nfe} NFE"] = float(rows.value.mean())
    return lines


def _panel(
    panel, experiment: Experiment, table: pd.DataFrame, axis: str, column: str, log: bool
) -> None:
    names = list(experiment.students)
    for name, line in curves(experiment, table, axis, column).groupby("student", sort=False):
        style = line_style(names.index(name))
        panel.plot(line.x, line["mean"], label=name, markersize=5, **style)
        panel.fill_between(line.x, line.low, line.high, color=style["color"], alpha=0.15, lw=0)
    for label, value in reference_lines(experiment, table, column, log).items():
        panel.axhline(value, color="0.35", linewidth=1, linestyle=(0, (1, 2)))
        panel.annotate(
            f"{label}: {value:.3g}",
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color="0.25",
        )
    panel.set_xscale("log", base=2 if axis == "images" else 10)
    if log:
        panel.set_yscale("log")
        plain_log(panel.yaxis)
    if axis == "images":
        panel.xaxis.set_major_formatter(THOUSANDS)
    else:
        plain_log(panel.xaxis)
    panel.set_xlabel(AXES[axis])


def figure(
    experiment: Experiment, table: pd.DataFrame, axis: str, metrics: list[tuple[str, str]]
) -> Figure:
    """One panel per (metric, extractor) against `axis` ("images" or "flops"): means over training
    seeds, and bands from the lowest to the highest seed."""
    count = max(1, len(metrics))
    size = (5.4 * count, 4.2)
    figure, panels = plt.subplots(1, count, figsize=size, squeeze=False, layout="constrained")
    for panel, (metric, extractor) in zip(panels[0], metrics, strict=bool(metrics)):
        column = drawn_column(experiment, metric, extractor)
        _panel(panel, experiment, table, axis, column, has_log_scale(metric))
        panel.set_title(f"{METRICS[metric].label} ({direction(metric)})\n{column}", fontsize=10)
    handles, labels = panels[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure
