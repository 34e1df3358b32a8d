"""Samples of every student from the same noise, and those nearest to training images."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from harness.config.experiment import Experiment
from harness.data.datasets import load
from harness.data.registry import has_texts
from harness.io.artifacts import load_tensors
from harness.io.records import Samples, ScoreRecord
from harness.reporting.figures.style import message_figure

PROMPTS = 12  # columns of a grid of prompts
CLASS_COLUMNS = 20  # columns of a grid of classes


@dataclass
class ScoredSamples:
    """What scoring kept of a row's images: tensors `pixels`, `labels` and those of the nearest
    neighbours (`closest…`), and the record that describes them."""

    tensors: dict[str, np.ndarray]
    record: Samples


@dataclass
class Neighbours:
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


def _tile(rows: list[np.ndarray], gap: int = 1) -> np.ndarray:
    """Rows of images `(N, C, H, W)` as one image `(H', W', C)` with white gaps."""
    channels, height, width = rows[0].shape[1:]
    columns = max(map(len, rows))
    shape = (len(rows) * (height + gap) - gap, columns * (width + gap) - gap, channels)
    tiled = np.full(shape, 255, np.uint8)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            top, left = r * (height + gap), c * (width + gap)
            tiled[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    return tiled


def _show(axes, image: np.ndarray) -> None:
    axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.tick_params(length=0)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def sample_grid(samples: dict[str, ScoredSamples], texts: tuple[str, ...] = ()) -> Figure:
    """Rows: the teachers and each student (first seed). Columns: one noise and one condition."""
    images, conditions = select_samples(samples, texts)
    names, rows = list(images), list(images.values())
    if not rows:
        return message_figure("no samples")
    (height, width), columns, gap = rows[0].shape[2:], max(map(len, rows)), 1
    cell, head = (0.8, 2.6) if texts else (0.5, 0.7)
    size = (cell * columns + 1.2, (cell + 0.02) * len(rows) + head)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    _show(axes, _tile(rows, gap))
    axes.set_yticks([(i + 0.5) * (height + gap) - gap for i in range(len(rows))], names)
    positions = [(i + 0.5) * (width + gap) - gap for i in range(len(conditions))]
    axes.set_xticks(positions, conditions)
    axes.xaxis.tick_top()
    if texts:
        for label, text in zip(axes.get_xticklabels(), conditions, strict=True):
            label.set(text=textwrap.fill(text, 26), rotation=60, ha="left", rotation_mode="anchor")
    caption = "the noise is the same down each column"
    if conditions:
        caption = f"{'prompt' if texts else 'class'} (top); {caption}"
    axes.set_xlabel(caption, labelpad=8)
    return figure


def neighbour_grid(samples: dict[str, ScoredSamples]) -> Figure:
    """For each row, the samples nearest to training images, and below them these images."""
    neighbours, description = nearest_neighbours(samples)
    if not neighbours:
        return message_figure("no training images to compare with")
    first = next(iter(neighbours.values()))
    height, width = 2 * first.images.shape[2] + 1, first.images.shape[3] + 1
    columns = max(len(row.images) for row in neighbours.values())
    size = (0.56 * columns + 1.4, 1.33 * len(neighbours) + 0.3)
    figure, panels = plt.subplots(
        len(neighbours), 1, figsize=size, squeeze=False, layout="constrained"
    )
    for axes, (name, row) in zip(panels[:, 0], neighbours.items(), strict=True):
        _show(axes, _tile([row.images, row.training]))
        label = "floor (held out)" if name == "floor" else name
        axes.set_yticks([height / 4, 3 * height / 4], [label, "training"])
        positions = [(i + 0.5) * width for i in range(len(row.distance))]
        axes.set_xticks(positions, [f"{distance:.2f}" for distance in row.distance], fontsize=8)
    panels[-1, 0].set_xlabel(description, fontsize=9, labelpad=6)
    return figure
