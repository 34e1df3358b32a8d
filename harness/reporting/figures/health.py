"""Training health: losses, gradient norms and non-finite steps of every run."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from harness.config.experiment import Experiment
from harness.reporting.figures.samples import scored_runs
from harness.reporting.figures.style import PHASE_COLOURS, PHASE_DASHES, THOUSANDS, plain_log

# Column prefixes of train.csv -> title.
PANELS = {"loss/": "loss", "grad_norm/": "gradient norm", "nonfinite/": "non-finite steps"}


def training_logs(experiment: Experiment, table: pd.DataFrame) -> dict[str, dict]:
    """train.csv of every run with scores in the table: `logs[student][seed]`."""
    logs: dict[str, dict] = {student: {} for student in experiment.students}
    for student, seed in sorted(scored_runs(table)):
        path = experiment.paths.run(student, seed) / "train.csv"
        if student in logs and path.exists():
            logs[student][seed] = pd.read_csv(path)
    return logs


def tidy_log(seeds: dict[int, pd.DataFrame], prefix: str) -> pd.DataFrame:
    """The columns of a student's logs with a prefix, one row per value: images, seed, phase,
    value."""
    parts = [
        log.filter(like=prefix)
        .rename(columns=lambda name: name.removeprefix(prefix))
        .assign(images=log.images, seed=seed)
        .melt(id_vars=["images", "seed"], var_name="phase")
        for seed, log in seeds.items()
    ]
    columns = ["images", "seed", "phase", "value"]
    return pd.concat(parts)[columns] if parts else pd.DataFrame(columns=columns)


def phases_of(logs: dict[str, dict]) -> list[str]:
    """The phases of all students, in the order of their first appearance."""
    columns = [c for seeds in logs.values() for log in seeds.values() for c in log.columns]
    phases = [c.removeprefix(p) for c in columns for p in PANELS if c.startswith(p)]
    return list(dict.fromkeys(phases))


def figure(experiment: Experiment, table: pd.DataFrame) -> Figure:
    """One column per student, one row per entry of PANELS, one line per phase and seed."""
    logs = training_logs(experiment, table)
    phases = phases_of(logs)
    size = (2.7 * len(logs), 6.6)
    figure, panels = plt.subplots(
        len(PANELS), len(logs), figsize=size, sharex=True, squeeze=False, layout="constrained"
    )
    handles = {}
    for column, (student, seeds) in zip(panels.T, logs.items(), strict=True):
        for panel, prefix in zip(column, PANELS, strict=True):
            for (phase, _), line in tidy_log(seeds, prefix).groupby(["phase", "seed"], sort=False):
                index = phases.index(phase)
                (handles[phase],) = panel.plot(
                    line.images,
                    line.value,
                    color=PHASE_COLOURS[index % len(PHASE_COLOURS)],
                    linestyle=PHASE_DASHES[index % len(PHASE_DASHES)],
                    linewidth=1.2,
                )
            if prefix == "grad_norm/" and panel.lines:
                panel.set_yscale("log")
                plain_log(panel.yaxis)
            panel.xaxis.set_major_formatter(THOUSANDS)
            panel.xaxis.set_major_locator(plt.MaxNLocator(4))
        column[0].set_title(student, fontsize=10)
        if not seeds:
            column[0].annotate("no run", (0.5, 0.5), xycoords="axes fraction", ha="center")
        column[-1].set_ylim(bottom=-0.5, top=max(5, column[-1].get_ylim()[1]))
        column[-1].set_xlabel("images")
    for panel, title in zip(panels[:, 0], PANELS.values(), strict=True):
        panel.set_ylabel(title)
    if handles:
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles)
        )
    return figure
