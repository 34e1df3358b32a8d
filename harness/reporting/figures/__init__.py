"""Figures as PNG and PDF: quality against budget, samples, nearest neighbours, training health."""

from pathlib import Path

import pandas as pd

from harness.config.experiment import Experiment
from harness.reporting.collect import is_unavailable
from harness.reporting.figures import charts, health, quality, samples


def draw(experiment: Experiment, table: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw all figures from `collect`'s table; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    table = table[~is_unavailable(table.status)]
    saved = samples.read_samples(experiment, table)
    grid = samples.sample_grid(saved, samples.prompt_texts(experiment))
    return [
        *charts.save(quality.figure(experiment, table, "images"), folder, "quality_vs_images"),
        *charts.save(quality.figure(experiment, table, "flops"), folder, "quality_vs_compute"),
        *charts.save(health.figure(experiment, table), folder, "training_health"),
        *samples.save(grid, folder, "samples"),
        *samples.save(samples.neighbour_grid(saved), folder, "nearest_neighbours"),
    ]
