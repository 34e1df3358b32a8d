"""Samples of every student from the same noise, and those nearest to training images."""

import textwrap
from typing import NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from harness.config.experiment import Experiment
from harness.data.datasets import load
from harness.data.registry import has_texts
from harness.io.artifacts import load_tensors
from harness.io.records import Samples, ScoreRecord

matplotlib.rcParams.update({"pdf.fonttype": 42, "savefig.dpi": 160, "savefig.bbox": "tight"})
PROMPTS = 12  # columns of a grid of prompts
CLASS_COLUMNS = 20  # columns of a grid of classes
NAME_LETTERS = 6  # of a class name that fits above one column


class ScoredSamples(NamedTuple):
    """Tensors that scoring saved of a row (`pixels`, `labels`, `closest…`), and their record."""

    tensors: dict[str, np.ndarray]
    record: Samples


class Neighbours(NamedTuple):
    """Samples, nearest first, and their nearest training images."""

    images: np.ndarray  # (N, C, H, W)
    training: np.ndarray  # (N, C, H, W)
    distance: np.ndarray  # (N,)


def read_samples(experiment: Experiment, table: pd.DataFrame) -> dict[str, ScoredSamples]:
    """The kept samples of the teachers and of each student's first training seed, by row."""
    paths, seed, samples = experiment.paths, experiment.training.seeds[0], {}
    files = {experiment.teacher_row(t): paths.reference_scores(t) for t in experiment.teachers}
    files |= {student: paths.scores(student, seed) for student in experiment.students}
    # Files of rows without scores may be out of date. The teachers' rows have no training seed.
    scored = set(table.student[(table.status == "ok") & (table.seed.fillna(seed) == seed)])
    for row in (row for row in files if row in scored):
        record = ScoreRecord.read(files[row]).samples
        tensors = load_tensors(files[row].parent / record.file, record.sha256)
        samples[row] = ScoredSamples({k: t.numpy() for k, t in tensors.items()}, record)
    return samples


class Grid(NamedTuple):
    """Images of every row and the conditions of their columns."""

    images: dict[str, np.ndarray]  # row -> (N, C, H, W) uint8; image i has the same noise in all
    kind: str  # of the conditions: "class" or "prompt"
    conditions: list[str]  # in order, each of `width` adjacent columns; empty if unconditional
    width: int

    @property
    def is_numbered(self) -> bool:
        """Whether the conditions are too long for headings: numbers, with a list below."""
        longest = max(map(len, self.conditions), default=0)
        return self.kind == "prompt" or longest > NAME_LETTERS * self.width

    @property
    def headings(self) -> list[str]:
        """The headings of groups of `width` columns."""
        numbers = [str(i + 1) for i in range(len(self.conditions))]
        return numbers if self.is_numbered else self.conditions


def condition_names(experiment: Experiment) -> tuple[str, tuple[str, ...]]:
    """The kind of the conditions ("class" or "prompt") and their names, by label."""
    kind = "prompt" if has_texts(experiment.data) else "class"
    if not (experiment.paths.data / "data.json").exists():
        return kind, ()
    dataset = load(experiment.paths.data, images=False)
    return kind, dataset.evaluation_prompts.texts if kind == "prompt" else dataset.class_names


def select_samples(experiment: Experiment, samples: dict[str, ScoredSamples]) -> Grid:
    """Equally many images of each class, of the first classes if there are many; one of each of
    PROMPTS prompts, evenly spaced."""
    images, conditions, each = {}, [], 1
    kind, texts = condition_names(experiment)
    for row, kept in samples.items():
        labels = kept.tensors["labels"]
        classes = np.unique(labels)
        spread = np.linspace(0, len(classes) - 1, min(len(classes), PROMPTS)).round().astype(int)
        prompts = kind == "prompt"
        drawn = classes[spread] if prompts else classes[:CLASS_COLUMNS]
        each = 1 if prompts else CLASS_COLUMNS // len(drawn)
        chosen = [np.flatnonzero(labels == c)[:each] for c in drawn]
        each = min(map(len, chosen))
        images[row] = kept.tensors["pixels"][np.concatenate([c[:each] for c in chosen])]
        names = [texts[i] if len(texts) > i else str(i) for i in drawn]
        conditions = names if len(classes) > 1 else []
    return Grid(images, kind, conditions, each if conditions else 1)


def nearest_neighbours(samples: dict[str, ScoredSamples]) -> tuple[dict[str, Neighbours], str]:
    """The samples nearest to training images by row, first those of real held-out images, and a
    description of the distances; empty if there are no training images."""
    neighbours: dict[str, Neighbours] = {}
    for name, (tensors, _) in samples.items():
        for row, prefix in (("floor", "floor_closest"), (name, "closest")):
            if prefix in tensors and row not in neighbours:
                parts = (tensors[prefix + part] for part in ("", "_training", "_distance"))
                neighbours[row] = Neighbours(*parts)
    records = (kept.record for kept in samples.values() if kept.record.neighbour_extractor)
    if (record := next(records, None)) is None:
        return {}, ""
    unit = "" if record.neighbour_unit == "features" else ", as a multiple of the held-out median"
    return neighbours, (
        f"nearest of {record.neighbour_rows:,} training images in the features of "
        f"{record.neighbour_extractor}; its distance{unit}"
    )


def tile(rows: list[np.ndarray]) -> np.ndarray:
    """Rows of images `(N, C, H, W)` uint8 as one image `(H', W', 4)` with transparent gaps."""
    height, width = rows[0].shape[2:]
    gap, columns = max(1, width // 12), max(map(len, rows))
    cells = np.zeros((len(rows), height + gap, columns, width + gap, 4), np.uint8)
    for cell, row in zip(cells, rows, strict=True):
        image = cell[:height, : len(row), :width]
        image[..., :3] = row.transpose(2, 0, 3, 1)  # grey fills three channels
        image[..., 3] = 255
    return cells.reshape(len(rows) * (height + gap), -1, 4)[:-gap, :-gap]


def _show(axes, rows: list[np.ndarray], names: list[str], columns: list[str]) -> None:
    """Draw rows of images with the names of the rows and columns."""
    image = tile(rows)
    axes.imshow(image, interpolation="nearest")
    height, width = image.shape[:2]
    for axis, labels, size in ((axes.yaxis, names, height), (axes.xaxis, columns, width)):
        axis.set_ticks((np.arange(len(labels)) + 0.5) * size / max(1, len(labels)), labels)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _message(text: str) -> Figure:
    """A figure that says why there is nothing to draw."""
    figure = Figure(figsize=(4, 1))
    figure.text(0.5, 0.5, text, ha="center")
    return figure


def sample_grid(experiment: Experiment, samples: dict[str, ScoredSamples]) -> Figure:
    """Rows: the teachers and each student (first seed). Columns: one noise and one condition; long
    conditions are numbered and listed below."""
    grid = select_samples(experiment, samples)
    if not grid.images:
        return _message("no samples")
    columns = max(map(len, grid.images.values()))
    cell = 0.8 if grid.kind == "prompt" else 0.5
    listed = []
    if grid.is_numbered:
        letters = max(24, int(columns * cell * 15))  # of a line at font size 8
        lines = [f"{i + 1}  {text}" for i, text in enumerate(grid.conditions)]
        listed = [textwrap.fill(line, letters, subsequent_indent="     ") for line in lines]
    below = 0.14 * sum(text.count("\n") + 1 for text in listed)
    size = (cell * columns + 1.2, (cell + 0.02) * len(grid.images) + 0.7 + below)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    _show(axes, list(grid.images.values()), list(grid.images), grid.headings)
    axes.xaxis.tick_top()
    top = f"{grid.kind} (top); " if grid.conditions else ""
    axes.set_xlabel(f"{top}the noise is the same down each column", labelpad=8)
    if listed:
        label = axes.get_xlabel()
        text = "\n".join(listed)
        axes.set_xlabel(f"{label}\n\n{text}", loc="left", multialignment="left", fontsize=8)
    return figure


def neighbour_grid(samples: dict[str, ScoredSamples]) -> Figure:
    """For each row, the samples nearest to training images, and below them these images."""
    neighbours, description = nearest_neighbours(samples)
    if not neighbours:
        return _message("no training images to compare with")
    columns = max(len(row.images) for row in neighbours.values())
    size = (0.56 * columns + 1.4, 1.33 * len(neighbours) + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(neighbours), squeeze=False)[:, 0]
    for axes, (name, row) in zip(panels, neighbours.items(), strict=True):
        label = "floor (held out)" if name == "floor" else name
        distances = [f"{distance:.2f}" for distance in row.distance]
        _show(axes, [row.images, row.training], [label, "training"], distances)
        axes.tick_params(axis="x", labelsize=8)
    panels[-1].set_xlabel(description, fontsize=9, labelpad=6)
    return figure
