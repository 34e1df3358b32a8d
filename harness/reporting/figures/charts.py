"""Parts of the charts: Vega-Lite specifications, built with Altair, for the page and for files.

Text and axes take the colour of their surroundings, so a chart serves light, dark and print.
"""

import math

import altair as alt
import pandas as pd

from harness.reporting.figures.styles import Style

AXIS = {f"{part}Color": "currentColor" for part in ("label", "title", "grid", "domain", "tick")}
AXIS |= {"gridOpacity": 0.1, "domainOpacity": 0.4, "tickOpacity": 0.4}
AXIS |= {"titleFontWeight": "normal", "labelLimit": 160}
CONFIG = {"background": None, "font": "inherit", "view": {"stroke": None}, "axis": AXIS}
CONFIG |= {"legend": {"disable": True}}  # the page has its own
LEGEND = {"orient": "bottom", "title": None, "columns": 8, "labelLimit": 0, "symbolOpacity": 1}
STATIC = {"background": "white", "font": "sans-serif", "legend": LEGEND}  # CONFIG of files
STATIC |= {"title": {"fontSize": 11, "anchor": "start"}}
# The page's legend sets this parameter to a student's name.
HIGHLIGHT = {"name": "highlight", "value": None}


def specification(chart: alt.TopLevelMixin, **config) -> dict:
    return chart.to_dict() | {"config": CONFIG | config, "params": [HIGHLIGHT]}


def data(table: pd.DataFrame) -> alt.Data:
    """A table's rows as inline data; NaN becomes null."""
    return alt.Data(values=table.astype(object).where(table.notna(), None).to_dict("records"))


def categories(channel, field: str, values: dict[str, object]):
    """A channel that gives each name of a field its value."""
    chosen = [list(value) if isinstance(value, tuple) else value for value in values.values()]
    scale = alt.Scale(domain=list(values), range=chosen)
    return channel(f"{field}:N", scale=scale)


def student_channels(found: dict[str, Style]) -> dict:
    """The channels `color`, `shape` and `strokeDash` of the students."""
    colours = {name: style.colour for name, style in found.items()}
    shapes = {name: style.shape for name, style in found.items()}
    dashes = {name: style.dash for name, style in found.items()}
    return {
        "color": categories(alt.Color, "student", colours),
        "shape": categories(alt.Shape, "student", shapes),
        "strokeDash": categories(alt.StrokeDash, "student", dashes),
    }


def when_highlighted(opacity: float):
    chosen = alt.when("highlight === null || datum.student === highlight")
    return chosen.then(alt.value(opacity)).otherwise(alt.value(opacity * 0.12))


def numbers(channel, field: str, title: str | None, log: bool, values, form=None, **options):
    """A quantitative channel, linear or logarithmic, whose axis holds the values."""
    values = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    if log and values:
        options["values"] = log_ticks(min(values), max(values))
    form = form or (".3~s" if values and max(values) >= 1000 else ".3~r")
    scale = alt.Scale(nice=False, padding=8, **({"type": "log"} if log else {"zero": False}))
    axis = alt.Axis(format=form, labelOverlap=True, **options)
    return channel(f"{field}:Q", title=title, scale=scale, axis=axis)


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks at 1, 2 and 5 of each decade between two values, or at 1 if there are many decades; the
    values themselves if there are fewer than two such ticks."""
    steps = (1, 2, 5) if high < 200 * low else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [t for decade in decades for step in steps if low <= (t := step * 10.0**decade) <= high]
    return ticks if len(ticks) > 1 else sorted({low, *ticks, high})


def tooltips(*names: str, **titles: str) -> list[alt.Tooltip]:
    numbers = [alt.Tooltip(f"{k}:Q", title=title, format=".4~g") for k, title in titles.items()]
    return [*map(alt.Tooltip, names), *numbers]


def lines_across(values: dict[str, float], axis: str, **text) -> list[alt.Chart]:
    """Dotted lines across the chart at some values of an axis, and their labels."""
    chart = alt.Chart(data(pd.DataFrame(values.items(), columns=["label", "value"])))
    rule = chart.mark_rule(strokeDash=[1, 2], color="currentColor", opacity=0.7)
    label = chart.mark_text(color="currentColor", opacity=0.8, fontSize=10, **text)
    at, end = {axis: "value:Q"}, {"x": alt.value("width")} if axis == "y" else {"y": alt.value(0)}
    return [rule.encode(**at), label.encode(text="label:N", **at, **end)] if values else []


def message(text: str) -> alt.Chart:
    """A chart that says why there is nothing to draw."""
    return alt.Chart(alt.Data(values=[{}])).mark_text(text=text).properties(width=300, height=40)
