"""Colours, markers and axes that all figures share."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# Okabe and Ito's palette for colour-blind readers, with a grey that is visible on black and white;
# markers and dashes distinguish the students in grey print.
COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#CC79A7", "#009E73", "#E69F00", "#7F7F7F", "#8C8C00")
MARKERS = "oPs^DvX<"
DASHES = ("-", "--", "-", "-.", "-", "--", ":", "-.")
PHASE_COLOURS = tuple(COLOURS[i] for i in (0, 2, 4, 5, 3))
PHASE_DASHES = ("-", "--", ":", "-.")
THOUSANDS = FuncFormatter(lambda value, _: f"{value / 1000:.3g}k")

plt.rcParams.update(
    {
        "figure.dpi": 100,
        "savefig.dpi": 160,
        "savefig.bbox": "tight",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "pdf.fonttype": 42,
    }
)


def line_style(index: int) -> dict:
    """Colour, marker and dashes of the student at a position."""
    styles = {"color": COLOURS, "marker": MARKERS, "linestyle": DASHES}
    return {key: values[index % len(values)] for key, values in styles.items()}


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write a figure as PNG and PDF; the same figure gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{kind}" for kind in ("png", "pdf")]
    for path in paths:
        figure.savefig(path, metadata={"CreationDate": None} if path.suffix == ".pdf" else None)
    plt.close(figure)
    return paths


def plain_log(axis) -> None:
    """Label a logarithmic axis with plain numbers, at 1, 2 and 5 of each decade if there are few
    decades. Call it after the data are drawn."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def message_figure(text: str) -> Figure:
    """A figure that says why there is nothing to draw."""
    figure, axes = plt.subplots(figsize=(4, 1), layout="constrained")
    axes.set_axis_off()
    axes.annotate(text, (0.5, 0.5), xycoords="axes fraction", ha="center")
    return figure
