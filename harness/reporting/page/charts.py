"""The charts of report.html: inline SVG, drawn by matplotlib, in the page's colours and fonts."""

from __future__ import annotations

import base64
import io
import re
from html import escape

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from harness.config.experiment import Experiment
from harness.reporting import figures

# What matplotlib draws in -> the page's variable, which differs between light and dark.
PAGE_COLOURS = {colour.lower(): f"var(--series-{i})" for i, colour in enumerate(figures.COLOURS)}
PAGE_COLOURS |= {"#000000": "currentColor", "#b0b0b0": "var(--grid)"}
PAGE_COLOURS |= {"#595959": "var(--muted)", "#404040": "var(--muted)"}
SETTINGS = {
    "svg.fonttype": "none",  # text stays text: it can be read aloud, searched and restyled
    "svg.hashsalt": "report",  # the same numbers give the same file
    "savefig.bbox": None,
    "axes.linewidth": 0.8,
    "grid.alpha": 1.0,
    "font.size": 10.5,
    "legend.fontsize": 10.5,
}
WIDE, HIGH = 4.5, 3.1  # inches of one chart: on a phone its text is as large as the page's notes
FRACTION = re.compile(r"\d+\.\d{3,}")
TILE = 96  # sample images are shown at most that large


def inline(figure: Figure, name: str, text: str) -> Markup:
    """A figure as an `<svg>` for the middle of a page; `text` is its alternative.

    Its ids begin with `name`, and those that nothing refers to go.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    _, width, height = re.search(r'viewBox="0 0 ((\S+) (\S+))"', svg).groups()
    body = svg[svg.index("</defs>") + len("</defs>") : svg.rindex("</svg>")]
    body = body.replace("xlink:href", "href")
    body = re.sub(r'<g id="(series-\d+)"', r'<g class="\1"', body)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', body))
    body = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(href="|url\()#', rf"\1#{name}-", body)
    body = re.sub(
        r"(fill|stroke): (#\w{6})", lambda m: f"{m[1]}: {PAGE_COLOURS.get(m[2], m[2])}", body
    )
    body = re.sub(r"font-family: [^;\"]+;? ?", "", body)
    body = re.sub(r"<[^>]+>", lambda m: FRACTION.sub(lambda n: f"{float(n[0]):.2f}", m[0]), body)
    body = re.sub(r"\s+", " ", body)
    return Markup(
        f'<svg class="chart" role="img" viewBox="0 0 {width} {height}" '
        f'aria-label="{escape(text)}">{body}</svg>'
    )


def _axes(wide: float = WIDE, high: float = HIGH, left: float = 0.62, low: float = 0.52):
    """A figure with one panel at fixed margins (inches): a layout engine would draw it twice."""
    figure = Figure(figsize=(wide, high))
    box = (left / wide, low / high, 1 - (left + 0.12) / wide, 1 - (low + 0.1) / high)
    return figure, figure.add_axes(box)


def swatch(name: str, style: dict) -> Markup:
    """A student's (or phase's) line and marker, for a legend in HTML."""
    figure = Figure(figsize=(0.42, 0.17))
    panel = figure.add_axes((0, 0, 1, 1))
    panel.set_axis_off()
    panel.plot([0.04, 0.96], [0, 0], **(style | {"marker": "", "linewidth": 1.6}))
    panel.plot([0.5], [0], color=style["color"], marker=style.get("marker", ""), markersize=6)
    panel.set_xlim(0, 1)
    svg = str(inline(figure, name, ""))
    return Markup(svg.replace('role="img"', 'aria-hidden="true"').replace(' aria-label=""', ""))


def quality(
    experiment: Experiment, table: pd.DataFrame, axis: str, metric: str, extractor: str, text: str
) -> Markup:
    """One (metric, extractor) against "images" or "flops"."""
    figure, panel = _axes()
    figures.quality_panel(panel, experiment, table, axis, metric, extractor, inside=True)
    return inline(figure, f"{axis}-{metric}-{extractor}", text)


def final(
    experiment: Experiment, rows: pd.DataFrame, metric: str, extractor: str, text: str
) -> Markup:
    """The final value of every training seed, with two standard errors of its sampling.

    `rows`: the final numbers of one column, one per student and training seed.
    """
    styles = figures.students_style(experiment)
    names = [name for name in styles if (rows.student == name).any()]
    widest = max([0, *map(len, names)])
    figure, panel = _axes(high=0.95 + 0.27 * max(3, len(names)), left=0.3 + 0.082 * widest)
    for y, name in enumerate(names):
        mine = rows[rows.student == name].sort_values("seed")
        # Seeds lie a little apart, so that their bars can be told apart.
        at = y + (np.arange(len(mine)) - (len(mine) - 1) / 2) * min(0.22, 0.7 / len(mine))
        style = styles[name]
        panel.errorbar(
            mine.value.astype(float),
            at,
            xerr=2 * mine.stderr.astype(float).fillna(0),
            fmt=style["marker"],
            color=style["color"],
            markersize=5,
            elinewidth=1.2,
        )
    column = figures.drawn_column(experiment, metric, extractor)
    if figures.on_log_scale(metric) and (rows.value.astype(float) > 0).all():
        panel.set_xscale("log")
    for name in experiment.scale_rows:
        scale = rows[rows.student == name]
        # The teacher's one step is so far off that it would push the students together.
        if name.startswith("teacher-1step") or scale.empty:
            continue
        value = scale.value.iloc[0]
        panel.axvline(value, color="0.35", linewidth=1, linestyle=(0, (1, 2)))
        at = panel.transAxes.inverted().transform(panel.transData.transform((value, 0)))[0]
        right = at > 0.6
        panel.annotate(
            name,
            (value, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-3 if right else 3, -2),
            textcoords="offset points",
            ha="right" if right else "left",
            va="top",
            fontsize=9,
            color="0.25",
        )
    if panel.get_xscale() == "log":
        figures.plain_log(panel.xaxis)
        low, high = panel.get_xlim()
        shown = [tick for tick in panel.xaxis.get_majorticklocs() if low <= tick <= high]
        if not 2 <= len(shown) <= 5:  # within one decade they may be too few or too many
            panel.xaxis.set_major_locator(MaxNLocator(4))
    panel.set_ylim(len(names) - 0.4, -1.1)
    panel.set_yticks(range(len(names)), names)
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)
    panel.grid(False, axis="y")
    panel.set_xlabel(f"{column} ({figures.direction(metric)})")
    return inline(figure, f"final-{metric}-{extractor}", text)


def health(student: str, seeds: dict, prefix: str, order: list[str], text: str) -> Markup:
    figure, panel = _axes(3.6, 1.9, left=0.5, low=0.3)
    figures.health_panel(panel, seeds, prefix, order)
    return inline(figure, f"health-{prefix.strip('/')}-{student}", text)


def strip(images: np.ndarray) -> str:
    """Images `(N, C, H, W)` uint8 side by side, as the address of a PNG inside the page.

    The gaps between them are transparent.
    """
    from PIL import Image

    count, _, height, width = images.shape
    gap = max(1, width // 12)
    canvas = np.zeros((height, count * (width + gap) - gap, 4), np.uint8)
    for i, image in enumerate(images):
        left = i * (width + gap)
        # Grey images have one channel, which fills all three.
        canvas[:, left : left + width, :3] = image.transpose(1, 2, 0)
        canvas[:, left : left + width, 3] = 255
    picture = Image.fromarray(canvas)
    if height > TILE:
        size = (round(picture.width * TILE / height), TILE)
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def settings():
    """The context in which charts are drawn."""
    return plt.rc_context(SETTINGS)
