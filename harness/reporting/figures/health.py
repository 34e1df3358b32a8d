"""Training health: losses, gradient norms and non-finite steps of every run."""

import altair as alt
import pandas as pd

from harness.config.experiment import Experiment
from harness.reporting.figures import charts
from harness.reporting.figures.samples import scored_runs

# Column prefixes of train.csv -> title.
PANELS = {"loss/": "loss", "grad_norm/": "gradient norm", "nonfinite/": "non-finite steps"}
COLOURS = tuple(charts.COLOURS[i] for i in (0, 2, 4, 5, 3))
DASHES = (charts.SOLID, charts.DASHED, charts.DOTTED, charts.MIXED)
MAX_POINTS = 300  # of one line


def training_logs(experiment: Experiment, table: pd.DataFrame) -> dict[str, dict]:
    """train.csv of every run with scores in the table: `logs[student][seed]`."""
    logs: dict[str, dict] = {student: {} for student in experiment.students}
    for student, seed in sorted(scored_runs(table)):
        path = experiment.paths.run(student, seed) / "train.csv"
        if student in logs and path.exists():
            logs[student][seed] = pd.read_csv(path)
    return logs


def phases_of(logs: dict[str, dict]) -> list[str]:
    """The phases of all students, in the order of their first appearance."""
    columns = [c for seeds in logs.values() for log in seeds.values() for c in log.columns]
    phases = [c.removeprefix(p) for c in columns for p in PANELS if c.startswith(p)]
    return list(dict.fromkeys(phases))


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
    return pd.concat(parts)


def chart(
    student: str,
    seeds: dict[int, pd.DataFrame],
    phases: list[str],
    prefix: str,
    legend: bool = False,
) -> alt.Chart:
    """One quantity of PANELS of a student against images, a line per phase and seed."""
    log = tidy_log(seeds, prefix)
    lines = log.groupby(["phase", "seed"], sort=False)
    ends = [
        f"{phase} of seed {seed} from {line.value.iloc[0]:.3g} to {line.value.iloc[-1]:.3g}"
        for (phase, seed), line in lines
    ]
    text = f"{PANELS[prefix]} of {student} against images: {'; '.join(ends)}"
    log = lines.nth(slice(None, None, max(1, len(log) // (MAX_POINTS * lines.ngroups))))
    values = log.value.dropna()
    is_log = prefix == "grad_norm/" and (values > 0).all()
    chart = alt.Chart(charts.data(log)).mark_line(strokeWidth=1.3)
    chart = chart.encode(
        x=charts.numbers(alt.X, "images", None, False, log.images, form=".3~s", tickCount=4),
        y=charts.numbers(alt.Y, "value", None, is_log, values, tickCount=4),
        detail="seed:N",
        color=charts.categories(alt.Color, "phase", phases, COLOURS, legend),
        strokeDash=charts.categories(alt.StrokeDash, "phase", phases, DASHES, legend),
        tooltip=charts.tooltips("phase:N", "seed:N", images="images", value="value"),
    )
    return chart.properties(width="container", height=120, description=text)


def figure(experiment: Experiment, table: pd.DataFrame) -> alt.VConcatChart:
    """One column per student with a run, one row per entry of PANELS."""
    logs = training_logs(experiment, table)
    phases = phases_of(logs)
    rows = [
        alt.hconcat(
            *(
                chart(student, seeds, phases, prefix, legend=True).properties(
                    width=180, title=[student, title]
                )
                for student, seeds in logs.items()
                if seeds
            )
        )
        for prefix, title in PANELS.items()
        if phases
    ]
    return alt.vconcat(*rows or [charts.message("no run")])
