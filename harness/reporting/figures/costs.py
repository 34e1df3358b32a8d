"""What it costs to reach a score: one mark per student and level, along the cost."""

import altair as alt
import pandas as pd

from harness.config.experiment import Experiment
from harness.evaluation.registry import Metric
from harness.reporting import cost_to_reach
from harness.reporting.collect import main_column, main_metric_in, ranking_extractors
from harness.reporting.cost_to_reach import UNITS, cost_table, cost_text, seconds_heading
from harness.reporting.figures import charts
from harness.reporting.figures.styles import student_styles
from harness.reporting.formatting import rounded_text

TITLES = {
    "images": "images that received a generator update",
    "flops": "training compute (TFLOPs)",
    "seconds": "training time ({})",
}


def chart(
    experiment: Experiment, rows: pd.DataFrame, metric: Metric, unit: str, seconds: str
) -> alt.LayerChart:
    """The costs of one column of `cost_table` in a unit. metric: of the column. Filled marks: all
    training seeds reach the level; hollow: some do, at the lowest cost. Bars: the interval over
    training seeds, or from the lowest to the highest seed where there is none."""
    rows, title = rows[rows.unit == unit], TITLES[unit].format(seconds)
    found = [f"{r.student} {rounded_text(r.level)} at {cost_text(r)}" for r in rows.itertuples()]
    text = f"{title} to reach each level of {rows.column.iloc[0]}: {'; '.join(found)}"
    sign = cost_to_reach.sign(metric)
    labels = {level: f"{sign} {rounded_text(level)}" for level in rows.level}
    drawn = rows[rows.reached > 0]
    drawn = drawn.assign(
        at=drawn.cost.fillna(drawn.lowest),
        start=drawn.low.fillna(drawn.lowest),
        end=drawn.high.fillna(drawn.highest),
        label=[labels[level] for level in drawn.level],
        filled=drawn.reached == drawn.seeds,
        text=[cost_text(row) for row in drawn.itertuples()],
    )
    numbers = ["at", "start", "end"]
    drawn[numbers] = drawn[numbers].astype(float) / UNITS[unit][1]
    students = [name for name in experiment.students if name in set(rows.student)]
    look = charts.student_channels(student_styles(experiment))
    values = [*drawn.start, *drawn.end]
    base = alt.Chart().encode(
        y=alt.Y(
            "label:N", sort=list(labels.values()), title=None, axis=alt.Axis(grid=True, ticks=False)
        ),
        yOffset=alt.YOffset("student:N", sort=students),
        color=look["color"],
        opacity=charts.when_highlighted(1.0),
        tooltip=[alt.Tooltip("student:N"), alt.Tooltip("label:N", title="level"), "text:N"],
    )
    x = charts.numbers(alt.X, "start", title, True, values)
    bars = base.mark_rule(strokeWidth=1.3).encode(x=x, x2="end:Q")
    layers = [alt.layer(bars, data=charts.data(drawn))]
    for filled, marks in drawn.groupby("filled"):
        points = base.mark_point(filled=bool(filled), size=45, strokeWidth=1.5)
        points = points.encode(x="at:Q", shape=look["shape"])
        layers.append(alt.layer(points, data=charts.data(marks)))
    height = max(90, 9 * len(students) * len(labels))
    return alt.layer(*layers).properties(width="container", height=height, description=text)


def figure(experiment: Experiment, table: pd.DataFrame) -> alt.VConcatChart | alt.ConcatChart:
    """One row of charts per main column, one column per unit."""
    costs, seconds, panels = cost_table(experiment, table), seconds_heading(table), []
    units = [unit for unit in UNITS if unit in set(costs.unit)]
    for extractor in ranking_extractors(experiment):
        column, metric = main_column(experiment, extractor), main_metric_in(experiment, extractor)
        rows = costs[costs.column == column]
        for unit in units if (rows.reached > 0).any() else ():
            panel = chart(experiment, rows, metric, unit, seconds)
            panels.append(panel.properties(width=300, title=[f"cost to reach {column}"]))
    if not panels:
        return alt.vconcat(charts.message("no student has scores at several snapshots"))
    return alt.concat(*panels, columns=len(units), align="all", spacing=30)
