"""Figures as PNG and PDF: quality against budget, samples, nearest neighbours, training health."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from harness.config.experiment import Experiment
from harness.reporting.collect import is_unavailable
from harness.reporting.figures import charts, health, quality, samples


def draw(experiment: Experiment, table: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw all figures from `collect`'s table; returns their paths."""
    table = table[~is_unavailable(table.status)]
    saved = samples.read_samples(experiment, table)
    figures = {
        "quality_vs_images": quality.figure(experiment, table, "images"),
        "quality_vs_compute": quality.figure(experiment, table, "flops"),
        "samples": samples.sample_grid(saved, samples.prompt_texts(experiment)),
        "nearest_neighbours": samples.neighbour_grid(saved),
        "training_health": health.figure(experiment, table),
    }
    return [path for name, chart in figures.items() for path in charts.save(chart, folder, name)]
