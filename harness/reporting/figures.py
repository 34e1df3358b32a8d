"""Figures, each as png and pdf: quality against budget, samples, nearest neighbours, training."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from harness.config.experiment import Experiment
from harness.data.datasets import load
from harness.evaluation.columns import column_name
from harness.evaluation.registry import FRECHET, METRICS
from harness.io.artifacts import load_tensors, read_json
from harness.reporting.collect import is_unavailable, main_metric_in

# Okabe and Ito's palette, safe for colour-blind readers; markers and dashes carry it in grey too.
COLOURS = ("#0072B2", "#56B4E9", "#D55E00", "#CC79A7", "#009E73", "#E69F00", "#000000", "#8C8C00")
MARKERS = "oPs^DvX<"
DASHES = ("-", "--", "-", "-.", "-", "--", ":", "-.")
PHASE_COLOURS = (0, 2, 4, 5, 3)
PHASE_DASHES = ("-", "--", ":", "-.")
AXES = {
    "images": "images that received a generator update",
    "flops": "training compute, teacher pairs included (TFLOPs)",
}
HEALTH = {"loss/": "loss", "grad_norm/": "gradient norm", "nonfinite/": "non-finite steps"}
PROMPTS = 12  # columns of a grid of prompts
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


def students_style(experiment: Experiment) -> dict[str, dict]:
    return {
        name: {
            "color": COLOURS[i % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": DASHES[i % len(DASHES)],
        }
        for i, name in enumerate(experiment.students)
    }


def _save(figure, folder: Path, name: str) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{kind}" for kind in ("png", "pdf")]
    for path in paths:
        # No dates inside: the same numbers give the same file.
        figure.savefig(path, metadata={"CreationDate": None} if path.suffix == ".pdf" else None)
    plt.close(figure)
    return paths


def plain_log(axis) -> None:
    """Ticks of a logarithmic axis as plain numbers, at 1, 2 and 5 of each decade if these are few.

    To be called when the data are drawn.
    """
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5) if high < 100 * low else (1,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _scale_lines(
    axes, experiment: Experiment, table: pd.DataFrame, column: str, log: bool, inside: bool
) -> None:
    """Horizontal lines: teachers with many steps and with one, and the floor.

    `inside`: their labels stand in the panel, above the lines, not beside it.
    """
    for name in experiment.scale_rows:
        text = name.replace("teacher-1step", "teacher").replace("/", " ")
        rows = table[(table.student == name) & (table.column == column)]
        if rows.empty or (log and rows.value.iloc[0] <= 0):
            continue
        value, nfe = rows.value.mean(), rows.nfe.iloc[0]
        label = text if pd.isna(nfe) else f"{text}, {nfe} NFE"
        axes.axhline(value, color="0.35", linewidth=1, linestyle=(0, (1, 2)))
        axes.annotate(
            f"{label}: {value:.3g}",
            (1, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, 2) if inside else (4, 0),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="bottom" if inside else "center",
            fontsize=9 if inside else 8,
            color="0.25",
        )


def direction(metric: str) -> str:
    told = {True: "higher is better", False: "lower is better", None: "neither end is better"}
    return told[METRICS[metric].higher_is_better]


def on_log_scale(metric: str) -> bool:
    return metric in FRECHET


def drawn_column(experiment: Experiment, metric: str, extractor: str) -> str:
    """Where a metric stands that is drawn: at the most samples that it takes."""
    count = METRICS[metric].count(experiment.evaluation.num_samples)
    return column_name(metric, count, extractor)


def quality_lines(
    experiment: Experiment, table: pd.DataFrame, axis: str, column: str
) -> dict[str, pd.DataFrame]:
    """What is drawn of each student: `x`, and `mean`, `min` and `max` over training seeds.

    The snapshots are those on the axis's own grid, and the last; FLOPs are in units of 1e12.
    """
    rows = table[(table.column == column) & (table.grid.str.contains(axis) | table.final)]
    lines = {}
    for name in experiment.students:
        mine = rows[rows.student == name]
        if not mine.empty:
            mine = mine.astype({"value": float, "images": float, "flops": float})
            # A training seed's number is its mean over the sampling seeds.
            per_seed = mine.groupby(["snapshot", "seed"])[["images", "flops", "value"]].mean()
            by = per_seed.groupby("images")
            x = by[axis].mean() / (1 if axis == "images" else 1e12)
            values = by.value
            lines[name] = pd.DataFrame(
                {"x": x, "mean": values.mean(), "min": values.min(), "max": values.max()}
            )
    return lines


def quality_panel(
    panel,
    experiment: Experiment,
    table: pd.DataFrame,
    axis: str,
    metric: str,
    extractor: str,
    inside: bool = False,
) -> None:
    column = drawn_column(experiment, metric, extractor)
    styles, log = students_style(experiment), on_log_scale(metric)
    for name, line in quality_lines(experiment, table, axis, column).items():
        style = styles[name]
        # The group id lets the report find a student's line.
        own = {"gid": f"series-{list(styles).index(name)}"}
        panel.plot(line.x, line["mean"], label=name, markersize=5, **style, **own)
        panel.fill_between(
            line.x, line["min"], line["max"], color=style["color"], alpha=0.15, lw=0, **own
        )
    _scale_lines(panel, experiment, table, column, log, inside)
    panel.set_xscale("log", base=2 if axis == "images" else 10)
    if log:
        panel.set_yscale("log")
        plain_log(panel.yaxis)
    if axis == "images":
        panel.xaxis.set_major_formatter(THOUSANDS)
    else:
        plain_log(panel.xaxis)
    panel.set_xlabel(AXES[axis])


def quality(
    experiment: Experiment, table: pd.DataFrame, axis: str, metrics: list[tuple[str, str]]
) -> plt.Figure:
    """One panel per (metric, extractor) against `axis` ("images" or "flops").

    Lines are means over training seeds, bands reach from the lowest to the highest of them; each
    seed's point is the mean over the sampling seeds that it has. Shown are the snapshots on the
    axis's own grid, and the last.
    """
    figure, panels = plt.subplots(
        1,
        max(1, len(metrics)),
        figsize=(5.4 * max(1, len(metrics)), 4.2),
        squeeze=False,
        layout="constrained",
    )
    for panel, (metric, extractor) in zip(panels[0], metrics, strict=bool(metrics)):
        quality_panel(panel, experiment, table, axis, metric, extractor)
        column = drawn_column(experiment, metric, extractor)
        panel.set_title(f"{METRICS[metric].label} ({direction(metric)})\n{column}", fontsize=10)
    handles, labels = panels[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def present(table: pd.DataFrame) -> set[tuple[str, int]]:
    """The runs whose scores are in the table; what lies in the folders of others may be old."""
    ok = table[(table.status == "ok") & table.seed.notna()]
    return set(zip(ok.student, ok.seed.astype(int), strict=True))


def _columns(labels: np.ndarray, texts: tuple[str, ...] = (), limit: int = 20) -> np.ndarray:
    """Which samples a grid shows: as many of each class, of the first classes if there are many; of
    prompts one each, from the first to the last."""
    classes = np.unique(labels)
    if texts:
        spread = np.linspace(0, len(classes) - 1, min(len(classes), PROMPTS)).round().astype(int)
        return np.array([np.flatnonzero(labels == c)[0] for c in classes[spread]])
    classes = classes[:limit]
    each = limit // len(classes)
    return np.concatenate([np.flatnonzero(labels == c)[:each] for c in classes])


@dataclass
class Scored:
    """A scored run's part in the figures: images and, of the nearest neighbours, `pairs_*`."""

    tensors: dict[str, np.ndarray]
    record: dict


def scored_samples(experiment: Experiment, table: pd.DataFrame) -> dict[str, Scored]:
    """What was kept of the teachers' samples and of each student's (first seed), by row."""
    sources, seed = {}, experiment.training.seeds[0]
    for teacher in experiment.teachers:
        row = experiment.teacher_row(teacher)
        if ((table.student == row) & (table.status == "ok")).any():
            sources[row] = experiment.reference_score_path(teacher)
    for student in experiment.students:
        if (student, seed) in present(table):
            sources[student] = experiment.score_path(student, seed)
    found = {}
    for name, path in sources.items():
        record = read_json(path)["samples"]
        tensors = load_tensors(path.parent / record["file"], record["sha256"])
        found[name] = Scored({key: t.numpy() for key, t in tensors.items()}, record)
    return found


def samples(
    scored: dict[str, Scored], texts: tuple[str, ...] = ()
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Images `(N, C, H, W)` uint8 by row, and what was asked for: N classes or, of `texts`, prompts
    (nothing without either). Image i of all comes from one noise and one of these."""
    images, asked = {}, []
    for name, kept in scored.items():
        chosen = _columns(kept.tensors["labels"], texts)
        images[name], labels = kept.tensors["pixels"][chosen], kept.tensors["labels"][chosen]
        asked = [texts[i] if texts else str(i) for i in labels]
        if len(np.unique(kept.tensors["labels"])) < 2:
            asked = []
    return images, asked


def prompts(experiment: Experiment) -> tuple[str, ...]:
    """What the numbers that samples are labelled with ask for, where these are texts."""
    if not experiment.data.texts or not (experiment.data_dir() / "data.json").exists():
        return ()
    return load(experiment.data_dir(), images=False).evaluation_prompts.texts


@dataclass
class Pairs:
    """Images `(N, C, H, W)`, nearest first, the training images that they are nearest to, and the
    distances `(N,)`."""

    images: np.ndarray
    training: np.ndarray
    distance: np.ndarray


def closest(scored: dict[str, Scored]) -> tuple[dict[str, Pairs], str]:
    """The samples nearest to training images by row, after those of real held-out images, and how
    their distances are to be read; nothing where there are no training images."""
    pairs: dict[str, Pairs] = {}
    for name, kept in scored.items():
        for row, prefix in (("floor", "floor_"), (name, "")):
            if f"{prefix}closest" in kept.tensors and row not in pairs:
                parts = (f"{prefix}closest{part}" for part in ("", "_training", "_distance"))
                pairs[row] = Pairs(*(kept.tensors[part] for part in parts))
    record = next((kept.record for kept in scored.values() if "pairs_in" in kept.record), None)
    if record is None:
        return {}, ""
    unit = "" if record["pairs_unit"] == "features" else ", as a multiple of the held-out median"
    return pairs, (
        f"nearest of {record['pairs_among']:,} training images in the features of "
        f"{record['pairs_in']}; its distance{unit}"
    )


def _canvas(rows: list[np.ndarray], gap: int = 1) -> np.ndarray:
    """Rows of images `(N, C, H, W)` as one `(H', W', C)`, white between them."""
    channels, height, width = rows[0].shape[1:]
    columns = max(map(len, rows))
    canvas = np.full(
        (len(rows) * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, np.uint8
    )
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            top, left = r * (height + gap), c * (width + gap)
            canvas[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    return canvas


def _picture(axes, canvas: np.ndarray) -> None:
    axes.imshow(canvas, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axes.tick_params(length=0)
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _empty(text: str) -> plt.Figure:
    figure, axes = plt.subplots(figsize=(4, 1), layout="constrained")
    axes.set_axis_off()
    axes.annotate(text, (0.5, 0.5), xycoords="axes fraction", ha="center")
    return figure


def sample_grid(scored: dict[str, Scored], texts: tuple[str, ...] = ()) -> plt.Figure:
    """Rows: the teacher and each student (first seed). One column: one noise and one label or, of
    `texts`, prompt."""
    images, asked = samples(scored, texts)
    names, rows = list(images), list(images.values())
    if not rows:
        return _empty("no samples")
    (height, width), columns, gap = rows[0].shape[2:], max(map(len, rows)), 1
    cell, head = (0.8, 2.6) if texts else (0.5, 0.7)
    figure, axes = plt.subplots(
        figsize=(cell * columns + 1.2, (cell + 0.02) * len(rows) + head), layout="constrained"
    )
    _picture(axes, _canvas(rows, gap))
    axes.set_yticks([(i + 0.5) * (height + gap) - gap for i in range(len(rows))], names)
    axes.set_xticks([(i + 0.5) * (width + gap) - gap for i in range(len(asked))], asked)
    axes.xaxis.tick_top()
    if texts:
        for label, text in zip(axes.get_xticklabels(), asked, strict=True):
            label.set(text=textwrap.fill(text, 26), rotation=60, ha="left", rotation_mode="anchor")
    what = "prompt" if texts else "class"
    same = "the noise is the same down each column"
    axes.set_xlabel(f"{what} asked for (top); {same}" if asked else same, labelpad=8)
    return figure


def nearest_neighbours(scored: dict[str, Scored]) -> plt.Figure:
    """Of each row's samples those nearest to a training image (above), and that image (below)."""
    pairs, reading = closest(scored)
    if not pairs:
        return _empty("no training images to compare with")
    first = next(iter(pairs.values()))
    height, columns = 2 * first.images.shape[2] + 1, max(len(p.images) for p in pairs.values())
    width = first.images.shape[3] + 1
    figure, panels = plt.subplots(
        len(pairs),
        1,
        figsize=(0.56 * columns + 1.4, 1.33 * len(pairs) + 0.3),
        squeeze=False,
        layout="constrained",
    )
    for axes, (name, pair) in zip(panels[:, 0], pairs.items(), strict=True):
        _picture(axes, _canvas([pair.images, pair.training]))
        label = "floor (held out)" if name == "floor" else name
        axes.set_yticks([height / 4, 3 * height / 4], [label, "training"])
        axes.set_xticks(
            [(i + 0.5) * width for i in range(len(pair.distance))],
            [f"{distance:.2f}" for distance in pair.distance],
            fontsize=8,
        )
    panels[-1, 0].set_xlabel(reading, fontsize=9, labelpad=6)
    return figure


def training_logs(experiment: Experiment, table: pd.DataFrame) -> dict[str, dict]:
    """train.csv of every run whose scores are in the table: `logs[student][seed]`."""
    logs: dict[str, dict] = {student: {} for student in experiment.students}
    for student, seed in sorted(present(table)):
        path = experiment.run_dir(student, seed) / "train.csv"
        if student in logs and path.exists():
            logs[student][seed] = pd.read_csv(path)
    return logs


def phases(logs: dict[str, dict]) -> list[str]:
    """The phases of all students, in the order in which they are first met."""
    found = {
        column.removeprefix(prefix): None
        for seeds in logs.values()
        for log in seeds.values()
        for prefix in HEALTH
        for column in log.columns
        if column.startswith(prefix)
    }
    return list(found)


def phase_style(k: int) -> dict:
    colour = COLOURS[PHASE_COLOURS[k % len(PHASE_COLOURS)]]
    return {"color": colour, "linestyle": PHASE_DASHES[k % len(PHASE_DASHES)], "linewidth": 1.2}


def health_panel(panel, seeds: dict, prefix: str, order: list[str]) -> None:
    """One student's losses (or what else `prefix` names), one line per phase and seed."""
    for log in seeds.values():
        for column in (c for c in log.columns if c.startswith(prefix)):
            phase = column.removeprefix(prefix)
            style = phase_style(order.index(phase))
            panel.plot(log.images, log[column], label=phase, **style)
    if prefix == "grad_norm/" and panel.lines:
        panel.set_yscale("log")
        plain_log(panel.yaxis)
    panel.xaxis.set_major_formatter(THOUSANDS)
    panel.xaxis.set_major_locator(plt.MaxNLocator(4))


def training_health(experiment: Experiment, table: pd.DataFrame) -> plt.Figure:
    """Losses, gradient norms and skipped steps of every student, one line per seed."""
    logs = training_logs(experiment, table)
    order = phases(logs)
    figure, panels = plt.subplots(
        3,
        len(logs),
        figsize=(2.7 * len(logs), 6.6),
        sharex=True,
        squeeze=False,
        layout="constrained",
    )
    for j, (student, seeds) in enumerate(logs.items()):
        for i, prefix in enumerate(HEALTH):
            health_panel(panels[i][j], seeds, prefix, order)
        panels[0][j].set_title(student, fontsize=10)
        if not seeds:
            panels[0][j].annotate("no run", (0.5, 0.5), xycoords="axes fraction", ha="center")
        panels[2][j].set_ylim(bottom=-0.5, top=max(5, panels[2][j].get_ylim()[1]))
        panels[2][j].set_xlabel("images")
    for i, text in enumerate(HEALTH.values()):
        panels[i][0].set_ylabel(text)
    handles = {}
    for panel in panels.flat:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    if handles:
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles)
        )
    return figure


def quality_metrics(experiment: Experiment, table: pd.DataFrame) -> list[tuple[str, str]]:
    """The (metric, extractor) pairs that are drawn where they are scored: each extractor's main
    metric, and accuracy."""
    available = set(zip(table.metric, table.extractor, strict=True))
    extractors = experiment.evaluation.extractors
    wanted = [(main_metric_in(experiment, name).name, name) for name in extractors]
    wanted += [("accuracy", name) for name in extractors]
    return [pair for pair in dict.fromkeys(wanted) if pair in available]


def draw(experiment: Experiment, table: pd.DataFrame, folder: Path) -> list[Path]:
    """All figures; returns their paths."""
    table = table[~is_unavailable(table.status)]
    metrics, scored = quality_metrics(experiment, table), scored_samples(experiment, table)
    figures = {
        "quality_vs_images": quality(experiment, table, "images", metrics),
        "quality_vs_compute": quality(experiment, table, "flops", metrics),
        "samples": sample_grid(scored, prompts(experiment)),
        "nearest_neighbours": nearest_neighbours(scored),
        "training_health": training_health(experiment, table),
    }
    return [path for name, figure in figures.items() for path in _save(figure, folder, name)]
