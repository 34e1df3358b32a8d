"""Training health: losses, gradient norms and non-finite steps of every run."""

from itertools import cycle

import altair as alt
import pandas as pd

from harness.config.experiment import Experiment
from harness.reporting.figures import charts, styles

# Column prefixes of train.csv -> title.
PANELS = {"loss/": "loss", "grad_norm/": "gradient norm", "nonfinite/": "non-finite steps"}
# Of the phases; a phase keeps its colour in all panels of an experiment.
COLOURS = tuple(styles.HUES[hue][0] for hue in ("blue", "vermillion", "green", "orange", "violet"))
DASHES = (styles.SOLID, styles.DASHED, styles.DOTTED, styles.MIXED)
MAX_POINTS = 300  # of one line


def training_logs(experiment: Experiment, table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """train.csv of each student's runs with scores in the table, with a column `seed`."""
    scored = table[table.status == "ok"].groupby(["student", "seed"]).groups
    logs: dict[str, list] = {}
    for student, seed in experiment.runs:
        path = experiment.paths.run(student, seed) / "train.csv"
        if (student, seed) in scored and path.exists():
            logs.setdefault(student, []).append(pd.read_csv(path).assign(seed=seed))
    return {student: pd.concat(runs) for student, runs in logs.items()}


def phases_of(logs: dict[str, pd.DataFrame]) -> list[str]:
    """The phases of all students, in the order of their first appearance."""
    columns = [column for log in logs.values() for column in log]
    phases = [c.removeprefix(p) for c in columns for p in PANELS if c.startswith(p)]
    return list(dict.fromkeys(phases))


def chart(student: str, log: pd.DataFrame, phases: list[str], prefix: str) -> alt.Chart:
    """One quantity of PANELS of a student against images, a line per phase and seed."""
    tidy = log.melt(["images", "seed"], log.filter(like=prefix).columns, "phase")
    tidy = tidy.assign(phase=tidy.phase.str.removeprefix(prefix))
    lines = tidy.sort_values("seed", kind="stable").groupby(["phase", "seed"], sort=False)
    ends = [
        f"{phase} of seed {seed} from {line.value.iloc[0]:.3g} to {line.value.iloc[-1]:.3g}"
        for (phase, seed), line in lines
    ]
    text = f"{PANELS[prefix]} of {student} against images: {'; '.join(ends)}"
    drawn = lines.nth(slice(None, None, max(1, len(tidy) // (MAX_POINTS * lines.ngroups))))
    values = drawn.value.dropna()
    is_log = prefix == "grad_norm/" and (values > 0).all()
    chart = alt.Chart(charts.data(drawn)).mark_line(strokeWidth=1.3)
    chart = chart.encode(
        x=charts.numbers(alt.X, "images", None, False, drawn.images, form=".3~s", tickCount=4),
        y=charts.numbers(alt.Y, "value", None, is_log, values, tickCount=4),
        detail="seed:N",
        color=charts.categories(alt.Color, "phase", dict(zip(phases, cycle(COLOURS)))),
        strokeDash=charts.categories(alt.StrokeDash, "phase", dict(zip(phases, cycle(DASHES)))),
        tooltip=charts.tooltips("phase:N", "seed:N", images="images", value="value"),
    )
    return chart.properties(width="container", height=120, description=text)


def has_curve(log: pd.DataFrame) -> bool:
    """Whether a run of this student logged more than one point."""
    return log.groupby("seed").images.nunique().max() > 1


def panels_of(logs: dict[str, pd.DataFrame]) -> dict[str, str]:
    """The PANELS to draw: non-finite steps only if a run had some."""
    columns = [log.filter(like="nonfinite/") for log in logs.values()]
    skipped = any((counts > 0).any(axis=None) for counts in columns)
    return {prefix: t for prefix, t in PANELS.items() if prefix != "nonfinite/" or skipped}


def figure(experiment: Experiment, table: pd.DataFrame) -> alt.VConcatChart | alt.ConcatChart:
    """One column per student with a curve, one row per drawn entry of PANELS."""
    logs = training_logs(experiment, table)
    logs = {student: log for student, log in logs.items() if has_curve(log)}
    phases, panels, drawn = phases_of(logs), panels_of(logs), []
    for prefix, title in panels.items() if phases else ():
        for student, log in logs.items():
            panel = chart(student, log, phases, prefix)
            drawn.append(panel.properties(width=180, title=[student, title]))
    if not drawn:
        return alt.vconcat(charts.message("no run logged more than one point"))
    return alt.concat(*drawn, columns=len(logs), align="all")
