"""Quality against the images that received a generator update, or against training compute."""

import math

import altair as alt
import pandas as pd

from harness.config.experiment import Experiment
from harness.data.registry import has_captions
from harness.evaluation.registry import FRECHET, METRICS
from harness.reporting.collect import column_of, main_column, main_metric_in, ranking_extractors
from harness.reporting.figures import charts
from harness.reporting.figures.styles import student_styles
from harness.reporting.formatting import number_text

AXES = {  # column of the table -> title, unit
    "images": ("images that received a generator update", 1),
    "flops": ("training compute, teacher pairs included (TFLOPs)", 1e12),
}
DIRECTIONS = {True: "higher is better", False: "lower is better", None: "no preferred direction"}


def direction(metric: str) -> str:
    return DIRECTIONS[METRICS[metric].higher_is_better]


def drawn_metrics(experiment: Experiment, table: pd.DataFrame, axis: str) -> list[tuple[str, str]]:
    """The (metric, extractor) pairs that are drawn against an axis of AXES: main metrics, then
    accuracies, if a student has scores at more than one of its points."""
    extractors = experiment.evaluation.extractors
    ranking = ranking_extractors(experiment)
    pairs = [(main_metric_in(experiment, name).name, name) for name in ranking]
    accuracy = "attribute-accuracy" if has_captions(experiment.data) else "accuracy"
    pairs += [(accuracy, name) for name in extractors]

    def has_curve(metric: str, extractor: str) -> bool:
        points = curves(experiment, table, axis, column_of(experiment, METRICS[metric], extractor))
        return bool((points.groupby("student").x.nunique() > 1).any())

    return [pair for pair in dict.fromkeys(pairs) if has_curve(*pair)]


def curves(experiment: Experiment, table: pd.DataFrame, axis: str, column: str) -> pd.DataFrame:
    """The curves of a column against an axis of AXES: student, x; mean, low and high over training
    seeds, whose scores are means over sampling seeds. Snapshots: the axis's own grid, and the last.
    With a selection seed, snapshots before the last have that seed's noise, the best one, too.
    """
    order, numbers = list(experiment.students), ["images", "flops", "value"]
    rows = table[(table.column == column) & table.student.isin(order)]
    last = rows.groupby(["student", "seed", "snapshot"], dropna=False).final.transform("any")
    on_grid = rows.grid.str.contains(axis) & rows.selected.isna() & ~last.astype(bool)
    rows = rows[on_grid | rows.final].astype(dict.fromkeys(numbers, float))
    per_seed = rows.groupby(["student", "snapshot", "seed"])[numbers].mean().reset_index()
    points = per_seed.groupby(["student", "images"])
    result = points.value.agg(mean="mean", low="min", high="max")
    result = result.assign(x=points[axis].mean() / AXES[axis][1]).reset_index("student")
    return result.sort_values("student", key=lambda s: s.map(order.index), kind="stable")


def reference_lines(experiment: Experiment, table: pd.DataFrame, column: str, log: bool) -> dict:
    """Label -> value of the teachers, with many steps and with one, and of the floor. log: without
    values that a logarithmic axis cannot show."""
    lines = {}
    for name in experiment.reference_rows:
        rows = table[(table.student == name) & (table.column == column)]
        if rows.empty or (log and rows.value.iloc[0] <= 0):
            continue
        label = name.replace("teacher-1step", "teacher").replace("/", " ")
        nfe = rows.nfe.iloc[0]
        lines[label if pd.isna(nfe) else f"{label}, {nfe} NFE"] = float(rows.value.mean())
    return lines


def chart(
    experiment: Experiment, table: pd.DataFrame, axis: str, metric: str, extractor: str
) -> alt.LayerChart:
    """One metric against a budget, at the largest sample count that the metric accepts. Lines:
    means over training seeds; bands: from the lowest to the highest seed."""
    column, log = column_of(experiment, METRICS[metric], extractor), metric in FRECHET
    look, x_title = charts.student_channels(student_styles(experiment)), AXES[axis][0]
    lines = curves(experiment, table, axis, column)
    reference = reference_lines(experiment, table, column, log)
    last = lines.groupby("student", sort=False)["mean"].last()
    ends = [f"{name} {value:.3g}" for name, value in [*last.items(), *reference.items()]]
    title = f"{METRICS[metric].label} in {extractor} ({direction(metric)})"
    text = f"{title} against {x_title}; at the end: {', '.join(ends)}"

    y = charts.numbers(alt.Y, "mean", None, log, [*lines.low, *lines.high, *reference.values()])
    seeds = {"mean": "mean", "low": "lowest seed", "high": "highest seed"}
    base = alt.Chart().encode(
        x=charts.numbers(alt.X, "x", x_title, True, lines.x),
        color=look["color"],
        tooltip=charts.tooltips("student:N", x=x_title, **seeds),
    )
    opaque = charts.when_highlighted(1.0)
    bands = base.mark_area().encode(y="low:Q", y2="high:Q", opacity=charts.when_highlighted(0.15))
    drawn = base.mark_line().encode(y=y, opacity=opaque, strokeDash=look["strokeDash"])
    points = base.mark_point(filled=True, size=45).encode(y=y, opacity=opaque, shape=look["shape"])
    labels = {f"{name}: {value:.3g}": value for name, value in reference.items()}
    layers = [alt.layer(bands, drawn, points, data=charts.data(lines))]
    layers += charts.lines_across(labels, "y", align="right", dy=-6)
    return alt.layer(*layers).properties(width="container", height=230, description=text)


def final_chart(
    experiment: Experiment, final: pd.DataFrame, extractor: str
) -> alt.LayerChart | None:
    """The final score of every training seed in an extractor's main column, with two standard
    errors of the mean over its sampling seeds to each side; None if no student has several seeds,
    because a table then shows as much."""
    names, column = list(experiment.students), main_column(experiment, extractor)
    metric = main_metric_in(experiment, extractor)
    rows = final[(final.column == column) & (final.status == "ok")]
    rows = rows.astype({"value": float, "stderr": float})
    by_seed = rows.groupby(["student", "seed"], dropna=False, sort=False, as_index=False)
    # The draws of different sampling seeds are independent.
    stderr = ("stderr", lambda errors: math.sqrt((errors**2).sum(min_count=1)) / len(errors))
    scores = by_seed.agg(value=("value", "mean"), stderr=stderr)
    by_student = scores.groupby("student", sort=False).value
    listed = [f"{name} {', '.join(map(number_text, values))}" for name, values in by_student]
    text = f"Final {metric.label} ({column}): {'; '.join(listed)}"
    error = 2 * scores.stderr.fillna(0)
    scores = scores.assign(low=scores.value - error, high=scores.value + error)
    scores = scores[scores.student.isin(names)]
    if not (scores.groupby("student").seed.nunique() > 1).any():
        return None
    # The teacher's single step is far off and would squeeze the students together.
    near = final[~final.student.str.startswith("teacher-1step")]
    reference = reference_lines(experiment, near, column, metric.name in FRECHET)
    log = metric.name in FRECHET and (scores.low > 0).all()
    values = [*scores.low, *scores.high, *reference.values()]
    x = charts.numbers(alt.X, "value", f"{column} ({direction(metric.name)})", log, values)
    look = charts.student_channels(student_styles(experiment))
    base = alt.Chart().encode(
        y=alt.Y("student:N", sort=names, title=None, axis=alt.Axis(grid=False, ticks=False)),
        yOffset=alt.YOffset("seed:N"),
        color=look["color"],
        opacity=charts.when_highlighted(1.0),
        tooltip=charts.tooltips("student:N", "seed:N", value="score", stderr="sampling error"),
    )
    points = base.mark_point(filled=True, size=50).encode(x=x, shape=look["shape"])
    bars = base.mark_rule(strokeWidth=1.3).encode(x="low:Q", x2="high:Q")
    layers = [alt.layer(bars, points, data=charts.data(scores))]
    layers += charts.lines_across(reference, "x", dy=-8)
    height = 30 * max(3, scores.student.nunique())
    return alt.layer(*layers).properties(width="container", height=height, description=text)


def figure(experiment: Experiment, table: pd.DataFrame, axis: str) -> alt.HConcatChart:
    """One panel per drawn metric and extractor against `axis` ("images" or "flops")."""
    panels = []
    for metric, extractor in drawn_metrics(experiment, table, axis):
        count = METRICS[metric].count(experiment.evaluation.num_samples)
        title = [f"{METRICS[metric].label} ({direction(metric)})", f"in {extractor}, n {count:,}"]
        panel = chart(experiment, table, axis, metric, extractor)
        panels.append(panel.properties(width=380, height=260, title=title))
    return alt.hconcat(
        *panels or [charts.message("no student has scores at several snapshots")], spacing=30
    )
