"""Samples of every student from the same noise, and those nearest to training images."""

from __future__ import annotations

import base64
import io
import json
import math
from dataclasses import dataclass
from typing import NamedTuple

import altair as alt
import numpy as np
import pandas as pd
from PIL import Image

from harness.config.experiment import Experiment
from harness.data.datasets import load
from harness.data.registry import has_texts
from harness.io.artifacts import load_tensors
from harness.io.records import Samples, ScoreRecord
from harness.reporting.figures import charts

CELL = 40  # size of an image in a figure
THUMBNAIL = 96  # pixels: larger images are scaled down
PROMPTS = 12  # columns of a grid of prompts
CLASS_COLUMNS = 20  # columns of a grid of classes


@dataclass
class ScoredSamples:
    """The images that scoring saved of a row: tensors `pixels`, `labels` and those of the nearest
    neighbours (`closest…`), and the record that describes them."""

    tensors: dict[str, np.ndarray]
    record: Samples


class Neighbours(NamedTuple):
    """Samples `(N, C, H, W)`, nearest first, their nearest training images, and the distances
    `(N,)`."""

    images: np.ndarray
    training: np.ndarray
    distance: np.ndarray


def scored_runs(table: pd.DataFrame) -> set[tuple[str, int]]:
    """The (student, seed) with scores in the table; folders of other runs may be out of date."""
    ok = table[(table.status == "ok") & table.seed.notna()]
    return set(zip(ok.student, ok.seed.astype(int), strict=True))


def read_samples(experiment: Experiment, table: pd.DataFrame) -> dict[str, ScoredSamples]:
    """The kept samples of the teachers and of each student's first training seed, by row."""
    paths, seed = {}, experiment.training.seeds[0]
    for teacher in experiment.teachers:
        row = experiment.teacher_row(teacher)
        if ((table.student == row) & (table.status == "ok")).any():
            paths[row] = experiment.paths.reference_scores(teacher)
    for student in experiment.students:
        if (student, seed) in scored_runs(table):
            paths[student] = experiment.paths.scores(student, seed)
    samples = {}
    for row, path in paths.items():
        record = ScoreRecord.read(path).samples
        tensors = load_tensors(path.parent / record.file, record.sha256)
        samples[row] = ScoredSamples({k: t.numpy() for k, t in tensors.items()}, record)
    return samples


def _grid_columns(labels: np.ndarray, texts: tuple[str, ...]) -> np.ndarray:
    """The indices of the samples in a grid: equally many of each class, of the first classes if
    there are many; one of each of PROMPTS prompts, evenly spaced."""
    classes = np.unique(labels)
    if texts:
        spread = np.linspace(0, len(classes) - 1, min(len(classes), PROMPTS)).round().astype(int)
        return np.array([np.flatnonzero(labels == c)[0] for c in classes[spread]])
    classes = classes[:CLASS_COLUMNS]
    each = CLASS_COLUMNS // len(classes)
    return np.concatenate([np.flatnonzero(labels == c)[:each] for c in classes])


def select_samples(
    samples: dict[str, ScoredSamples], texts: tuple[str, ...] = ()
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The images `(N, C, H, W)` uint8 of a grid by row, and their N conditions: classes or, from
    `texts`, prompts (empty for unconditional data). Image i has the same noise in all rows."""
    images, conditions = {}, []
    for row, kept in samples.items():
        chosen = _grid_columns(kept.tensors["labels"], texts)
        images[row], labels = kept.tensors["pixels"][chosen], kept.tensors["labels"][chosen]
        conditions = [texts[i] if texts else str(i) for i in labels]
        if len(np.unique(kept.tensors["labels"])) < 2:
            conditions = []
    return images, conditions


def prompt_texts(experiment: Experiment) -> tuple[str, ...]:
    """The evaluation prompts that sample labels index; empty for data without texts."""
    if not has_texts(experiment.data) or not (experiment.paths.data / "data.json").exists():
        return ()
    return load(experiment.paths.data, images=False).evaluation_prompts.texts


def nearest_neighbours(samples: dict[str, ScoredSamples]) -> tuple[dict[str, Neighbours], str]:
    """The samples nearest to training images by row, first those of real held-out images, and a
    description of the distances; empty if there are no training images."""
    neighbours: dict[str, Neighbours] = {}
    for name, kept in samples.items():
        for row, prefix in (("floor", "floor_"), (name, "")):
            if f"{prefix}closest" in kept.tensors and row not in neighbours:
                parts = (f"{prefix}closest{part}" for part in ("", "_training", "_distance"))
                neighbours[row] = Neighbours(*(kept.tensors[part] for part in parts))
    records = (kept.record for kept in samples.values())
    record = next((record for record in records if record.neighbour_extractor), None)
    if record is None:
        return {}, ""
    unit = "" if record.neighbour_unit == "features" else ", as a multiple of the held-out median"
    return neighbours, (
        f"nearest of {record.neighbour_rows:,} training images in the features of "
        f"{record.neighbour_extractor}; its distance{unit}"
    )


def png(images: np.ndarray) -> str:
    """Images `(N, C, H, W)` uint8 side by side, with transparent gaps, as a data URL."""
    count, _, height, width = images.shape
    gap = max(1, width // 12)
    canvas = np.zeros((height, count * (width + gap) - gap, 4), np.uint8)
    for i, image in enumerate(images):
        cell = canvas[:, i * (width + gap) :][:, :width]
        cell[..., :3] = image.transpose(1, 2, 0)  # grey fills three channels
        cell[..., 3] = 255
    picture = Image.fromarray(canvas)
    if height > THUMBNAIL:
        size = (round(picture.width * THUMBNAIL / height), THUMBNAIL)
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _grid(rows: dict[str, np.ndarray], columns: list[str], title: str | None = None) -> alt.Chart:
    """Rows of images `(N, C, H, W)` with their names, and the N columns with theirs."""
    cells = []
    for name, images in rows.items():
        factor = math.ceil(CELL / images.shape[-1])  # enlarged without smoothing
        for i, image in enumerate(images.repeat(factor, axis=2).repeat(factor, axis=3)):
            cells.append({"row": name, "column": i, "url": png(image[None])})
    no_lines = {"domain": False, "ticks": False}
    axis = alt.Axis(
        orient="top",
        labelExpr=f"{json.dumps(columns)}[datum.value] || ''",
        labelAngle=-60 if any(len(text) > 6 for text in columns) else 0,
        labelLimit=200,
        **no_lines,
    )
    chart = alt.Chart(alt.Data(values=cells)).mark_image(width=CELL, height=CELL)
    chart = chart.encode(
        x=alt.X("column:O", title=None, axis=axis),
        y=alt.Y("row:N", title=None, sort=list(rows), axis=alt.Axis(**no_lines)),
        url="url:N",
    )
    step = alt.Step(CELL + 2)
    return chart.properties(width=step, height=step, **({"title": title} if title else {}))


def sample_grid(samples: dict[str, ScoredSamples], texts: tuple[str, ...]) -> alt.Chart:
    """Rows: the teachers and each student (first seed). Columns: one noise and one condition."""
    images, conditions = select_samples(samples, texts)
    if not images:
        return charts.message("no samples")
    caption = "The noise is the same down each column"
    if conditions:
        caption += f", and so is the {'prompt' if texts else 'class'}"
    return _grid(images, conditions, f"{caption}.")


def neighbour_grid(samples: dict[str, ScoredSamples]) -> alt.TopLevelMixin:
    """For each row, the samples nearest to training images, and below them these images."""
    neighbours, description = nearest_neighbours(samples)
    grids = []
    for name, row in neighbours.items():
        label = "floor (held out)" if name == "floor" else name
        distances = [f"{distance:.2f}" for distance in row.distance]
        grids.append(_grid({label: row.images, "training": row.training}, distances))
    if not grids:
        return charts.message("no training images to compare with")
    return alt.vconcat(*grids, spacing=4, title=f"Above: samples. Below: {description}.")
