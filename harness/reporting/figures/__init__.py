"""Figures as PNG and PDF: quality against budget, samples, nearest neighbours, training health."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from harness.config.experiment import Experiment
from harness.reporting.collect import is_unavailable
from harness.reporting.figures import health, quality, samples
from harness.reporting.figures.style import save


def draw(experiment: Experiment, table: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw all figures from `collect`'s table; returns their paths."""
    table = table[~is_unavailable(table.status)]
    metrics = quality.drawn_metrics(experiment, table)
    kept = samples.read_samples(experiment, table)
    figures = {
        "quality_vs_images": quality.figure(experiment, table, "images", metrics),
        "quality_vs_compute": quality.figure(experiment, table, "flops", metrics),
        "samples": samples.sample_grid(kept, samples.prompt_texts(experiment)),
        "nearest_neighbours": samples.neighbour_grid(kept),
        "training_health": health.figure(experiment, table),
    }
    return [path for name, figure in figures.items() for path in save(figure, folder, name)]
