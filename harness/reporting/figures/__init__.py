"""Figures as PNG and PDF: quality against budget, the cost to reach a score, samples, nearest
neighbours, training health."""

import io
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from harness.config.experiment import Experiment
from harness.reporting.collect import is_unavailable
from harness.reporting.figures import charts, costs, health, quality, samples


def draw(experiment: Experiment, table: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw all figures from `collect`'s table; returns their paths."""
    import vl_convert

    folder.mkdir(parents=True, exist_ok=True)
    table = table[~is_unavailable(table.status)]
    kept, paths = samples.read_samples(experiment, table), []
    for name, figure in {
        "quality_vs_images": quality.figure(experiment, table, "images"),
        "quality_vs_compute": quality.figure(experiment, table, "flops"),
        "cost_to_reach": costs.figure(experiment, table),
        "training_health": health.figure(experiment, table),
        "samples": samples.sample_grid(experiment, kept),
        "nearest_neighbours": samples.neighbour_grid(kept),
    }.items():
        png, pdf = (folder / f"{name}.{kind}" for kind in ("png", "pdf"))
        if isinstance(figure, Figure):
            figure.savefig(png)
            figure.savefig(pdf, metadata={"CreationDate": None})
        else:
            static = charts.specification(figure, **charts.STATIC)
            _write_png(vl_convert.vegalite_to_png(static, scale=2), png)
            pdf.write_bytes(vl_convert.vegalite_to_pdf(static))
        paths += [png, pdf]
    return paths


def _write_png(data: bytes, path: Path) -> None:
    """Write a PNG file of opaque pixels, compressed to about a third of vl_convert's."""
    with Image.open(io.BytesIO(data)) as image:
        image.convert("RGB").save(path, optimize=True)
