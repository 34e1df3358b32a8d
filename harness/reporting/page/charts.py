"""The charts of report.html: Vega-Lite specifications, built with Altair.

Their text and axes take the page's colour, so one specification serves light, dark and print.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import altair as alt
import pandas as pd

from harness.reporting.figures.style import COLOURS, DASHES, PHASE_COLOURS, PHASE_DASHES

SHAPES = ("circle", "cross", "square", "triangle-up", "diamond", "triangle-down", "triangle-left")
GLYPHS = dict(zip(SHAPES, "●✚■▲◆▼◀", strict=True))
DASH_LENGTHS = {"-": [1, 0], "--": [6, 4], ":": [1, 3], "-.": [6, 3, 1, 3]}
MAX_POINTS = 300  # of one line of training health
AXIS = {"labelColor": "currentColor", "titleColor": "currentColor", "titleFontWeight": "normal"}
AXIS |= {"gridColor": "currentColor", "domainColor": "currentColor", "tickColor": "currentColor"}
CONFIG = {
    "background": None,
    "font": "inherit",
    "view": {"stroke": None},
    "axis": AXIS
    | {"gridOpacity": 0.1, "domainOpacity": 0.4, "tickOpacity": 0.4, "labelLimit": 160},
}


@functools.cache
def javascript() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script for a `<script>` element."""
    import vl_convert

    return vl_convert.javascript_bundle().replace("</script", "<\\/script")


def legend(names: list[str], drawn: set[str]) -> list[dict]:
    """Name, colour and glyph of each student that is drawn."""
    marks = [
        {"name": name, "colour": _cycle(COLOURS, i), "glyph": GLYPHS[_cycle(SHAPES, i)]}
        for i, name in enumerate(names)
    ]
    return [mark for mark in marks if mark["name"] in drawn]


def phase_legend(phases: list[str]) -> list[dict]:
    return [{"name": p, "colour": _cycle(PHASE_COLOURS, i)} for i, p in enumerate(phases)]


def quality(
    curves: pd.DataFrame,
    reference: dict[str, float],
    names: list[str],
    x_title: str,
    log_y: bool,
    description: str,
) -> dict:
    """One metric against a budget; `curves` and `reference` as `figures.quality` gives them."""
    chosen, encoding = _highlight(), _student_encoding(names)
    y = _axis("mean", None, log_y, [*curves.low, *curves.high, *reference.values()], alt.Y)
    base = alt.Chart().encode(
        x=_axis("x", x_title, True, curves.x, alt.X),
        color=encoding["color"],
        tooltip=_tooltips(
            "student:N", x=x_title, mean="mean", low="lowest seed", high="highest seed"
        ),
    )
    bands = base.mark_area().encode(y="low:Q", y2="high:Q", opacity=_when(chosen, 0.15))
    lines = base.mark_line().encode(y=y, opacity=_when(chosen, 1.0), strokeDash=encoding["dash"])
    points = base.mark_point(filled=True, size=45)
    points = points.encode(y=y, opacity=_when(chosen, 1.0), shape=encoding["shape"])
    labels = {f"{name}: {value:.3g}": value for name, value in reference.items()}
    layers = [alt.layer(bands, lines, points, data=_data(curves))]
    layers += _reference(labels, "y", align="right", dy=-6)
    return _specification(layers, chosen, description, height=230)


def final_scores(
    scores: pd.DataFrame,
    reference: dict[str, float],
    names: list[str],
    x_title: str,
    log_x: bool,
    description: str,
) -> dict:
    """The final score of every training seed (student, seed, value, stderr) with two standard
    errors of its sampling to each side."""
    chosen, encoding = _highlight(), _student_encoding(names)
    error = 2 * scores.stderr.fillna(0)
    scores = scores.assign(low=scores.value - error, high=scores.value + error)
    log_x = log_x and (scores.low > 0).all()
    x = _axis("value", x_title, log_x, [*scores.low, *scores.high, *reference.values()], alt.X)
    base = alt.Chart().encode(
        y=alt.Y("student:N", sort=names, title=None, axis=alt.Axis(grid=False, ticks=False)),
        yOffset=alt.YOffset("seed:N"),
        color=encoding["color"],
        opacity=_when(chosen, 1.0),
        tooltip=_tooltips("student:N", "seed:N", value="score", stderr="sampling error"),
    )
    points = base.mark_point(filled=True, size=50).encode(x=x, shape=encoding["shape"])
    bars = base.mark_rule(strokeWidth=1.3).encode(x="low:Q", x2="high:Q")
    layers = [alt.layer(bars, points, data=_data(scores)), *_reference(reference, "x", dy=-8)]
    height = 30 * max(3, scores.student.nunique())
    return _specification(layers, chosen, description, height)


def health(log: pd.DataFrame, phases: list[str], log_y: bool, description: str) -> dict:
    """One student's losses or gradient norms (images, seed, phase, value), a line per phase and
    seed."""
    lines = log.groupby(["phase", "seed"], sort=False)
    log = lines.nth(slice(None, None, max(1, len(log) // (MAX_POINTS * lines.ngroups))))
    log_y = log_y and (log.value.dropna() > 0).all()
    dashes = [DASH_LENGTHS[dash] for dash in _cycled(PHASE_DASHES, phases)]
    scale = alt.Scale(domain=phases, range=_cycled(PHASE_COLOURS, phases))
    chart = alt.Chart(_data(log)).mark_line(strokeWidth=1.3)
    chart = chart.encode(
        x=_axis("images", None, False, log.images, alt.X, form=".3~s", tickCount=4),
        y=_axis("value", None, log_y, log.value.dropna(), alt.Y, tickCount=4),
        detail="seed:N",
        color=alt.Color("phase:N", legend=None, scale=scale),
        strokeDash=alt.StrokeDash(
            "phase:N", legend=None, scale=alt.Scale(domain=phases, range=dashes)
        ),
        tooltip=_tooltips("phase:N", "seed:N", images="images", value="value"),
    )
    return _specification([chart], None, description, height=120)


# -- parts --------------------------------------------------------------------------------------


def _cycle(values: tuple | str, index: int):
    return values[index % len(values)]


def _cycled(values: tuple | str, names: list[str]) -> list:
    return [_cycle(values, i) for i in range(len(names))]


def _data(table: pd.DataFrame) -> alt.Data:
    """A table's rows as inline data; NaN becomes null."""
    table = table.astype(object).where(table.notna(), None)
    return alt.Data(values=table.to_dict("records"))


def _student_encoding(names: list[str]) -> dict[str, Any]:
    def options(values: list) -> dict:
        return {"legend": None, "scale": alt.Scale(domain=names, range=values)}

    dashes = [DASH_LENGTHS[dash] for dash in _cycled(DASHES, names)]
    return {
        "color": alt.Color("student:N", **options(_cycled(COLOURS, names))),
        "shape": alt.Shape("student:N", **options(_cycled(SHAPES, names))),
        "dash": alt.StrokeDash("student:N", **options(dashes)),
    }


def _highlight() -> alt.Parameter:
    """The parameter that the page's legend sets to a student's name."""
    return alt.param(name="highlight", value=None)


def _when(chosen: alt.Parameter, opacity: float):
    shown = (chosen == None) | (alt.datum.student == chosen)  # noqa: E711 (a Vega expression)
    return alt.when(shown).then(alt.value(opacity)).otherwise(alt.value(opacity * 0.12))


def _axis(field: str, title: str | None, log: bool, values, channel, form=None, **options):
    """A quantitative channel, linear or logarithmic."""
    values = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
    if log and values:
        options["values"] = log_ticks(min(values), max(values))
    form = form or (".3~s" if values and max(values) >= 1000 else ".3~r")
    scale = alt.Scale(nice=False, padding=8, **({"type": "log"} if log else {"zero": False}))
    axis = alt.Axis(format=form, labelOverlap=True, **options)
    return channel(f"{field}:Q", title=title, scale=scale, axis=axis)


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks at 1, 2 and 5 of each decade between two values, or at 1 if there are many decades."""
    steps = (1, 2, 5) if high < 200 * low else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    return [tick for tick in ticks if low <= tick <= high]


def _tooltips(*names: str, **titles: str) -> list[alt.Tooltip]:
    numbers = [alt.Tooltip(f"{k}:Q", title=title, format=".4~g") for k, title in titles.items()]
    return [*map(alt.Tooltip, names), *numbers]


def _reference(values: dict[str, float], axis: str, **text) -> list[alt.Chart]:
    """Dotted lines across the chart at some values of an axis, and their labels."""
    if not values:
        return []
    rows = [{"label": label, "value": value} for label, value in values.items()]
    chart = alt.Chart(alt.Data(values=rows))
    rule = chart.mark_rule(strokeDash=[1, 2], color="currentColor", opacity=0.7)
    label = chart.mark_text(color="currentColor", opacity=0.8, fontSize=10, **text)
    end = {"y": {"x": alt.value("width")}, "x": {"y": alt.value(0)}}[axis]
    at = {axis: "value:Q"}
    return [rule.encode(**at), label.encode(text="label:N", **at, **end)]


def _specification(
    layers: list[alt.Chart], chosen: alt.Parameter | None, description: str, height: int
) -> dict:
    chart = alt.layer(*layers)
    if chosen is not None:
        chart = chart.add_params(chosen)
    chart = chart.properties(width="container", height=height, description=description)
    return chart.to_dict() | {"config": CONFIG}
