"""Figures as PNG and PDF: quality against budget, samples, nearest neighbours, training health."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from harness.config.experiment import Experiment
from harness.reporting.collect import is_unavailable
from harness.reporting.figures import charts, health, quality, samples


def draw(experiment: Experiment, table: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw all figures from `collect`'s table; returns their paths."""
    import vl_convert

    folder.mkdir(parents=True, exist_ok=True)
    table = table[~is_unavailable(table.status)]
    kept, paths = samples.read_samples(experiment, table), []
    for name, figure in {
        "quality_vs_images": quality.figure(experiment, table, "images"),
        "quality_vs_compute": quality.figure(experiment, table, "flops"),
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
            png.write_bytes(vl_convert.vegalite_to_png(static, scale=2))
            pdf.write_bytes(vl_convert.vegalite_to_pdf(static))
        paths += [png, pdf]
    return paths
