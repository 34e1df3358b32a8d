"""report.html: everything about an experiment on one page that needs nothing beside it.

What is drawn and tabled comes from the scores; claims, pairwise differences, agreement and
published numbers come from their tables, and their sections are left out where those are missing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
import yaml
from markupsafe import Markup, escape

from harness.config.experiment import Experiment
from harness.config.schema import Limit
from harness.errors import UserError
from harness.evaluation.columns import column_name
from harness.evaluation.registry import METRICS
from harness.io.artifacts import read_json, write_text
from harness.reporting import figures
from harness.reporting.claims import multiplicity
from harness.reporting.collect import flat, is_unavailable, main_column, main_metric_in
from harness.reporting.page import charts
from harness.reporting.tables import FLAGS, Comparison, cell, marked

TEMPLATE = Path(__file__).with_name("template.html.j2")
# Tables that other stages write, and the columns without which their sections cannot be shown.
TABLES = {
    "claims": "claim source reported better worse column difference low high verdict",
    "pairwise": "column a b difference low high verdict",
    "agreement": "quantity extractor ours library theirs relative_difference tolerance agrees",
    "paper": "paper method metric reported reproduced",
}
FACTS = ("student", "method", "seeds", "nfe", "parameters", "frozen", "data_free", "status")
UNITS = ("images", "flops", "seconds")
MISSING = "–"


@dataclass
class Cell:
    """`key`: what a click on the heading sorts by, a number or a text; None comes last."""

    text: object
    key: float | str | None = None
    small: str = ""
    kind: str = ""


@dataclass
class Column:
    label: str
    note: str = ""  # a second line
    title: str = ""  # the exact name, where the label is another
    number: bool = True


@dataclass
class Table:
    """`fixed`: rows that stay above the others however these are sorted."""

    name: str
    caption: object
    columns: list[Column]
    rows: list[list[Cell]]
    fixed: list[list[Cell]] = field(default_factory=list)
    sortable: bool = True


def minus(text: str) -> str:
    """A number's text with the sign that is as wide as a plus."""
    return text.replace("-", "−")


def known(value) -> bool:
    return value is not None and not pd.isna(value)


def number(value, std=None, form: str = "") -> Cell:
    """A number: three significant digits and its spread, or `form`."""
    if not known(value) or not math.isfinite(value):
        return Cell(MISSING)
    small = value and not form and (abs(value) < 1e-4 or abs(value) >= 1e6)
    form = form or (".2e" if small else "")
    return Cell(minus(format(value, form) if form else cell(value, std)), float(value))


def count(value, scale: float = 1) -> Cell:
    return number(value / scale if known(value) else value, form=",.0f")


def words(value, form: str = "") -> Cell:
    """A text, or whatever else a table holds; `form`: how numbers are shown."""
    if isinstance(value, bool | np.bool_):
        return Cell("yes" if value else "no", str(value))
    if isinstance(value, int | float | np.number):
        return number(value, form=form)
    text = str(value) if known(value) else ""
    return Cell(text or MISSING, text or None, kind="long" if len(text) > 40 else "")


def code_spans(text: str) -> Markup:
    """`name` as code; everything else escaped."""
    parts = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if i % 2 else escape(part)
        for i, part in enumerate(parts)
    )


def seeds_text(seeds: Iterable) -> str:
    return ", ".join(str(seed) for seed in sorted({int(seed) for seed in seeds if known(seed)}))


def budget_text(limits: Iterable[Limit]) -> str:
    return ", ".join(
        f"{limit.amount:,.0f} {limit.unit}"
        if limit.amount < 1e9
        else f"{limit.amount:g} {limit.unit}"
        for limit in limits
    )


def read_table(folder: Path, name: str) -> pd.DataFrame | None:
    """A table of TABLES, or None where it has not been written."""
    path = folder / f"{name}.csv"
    if not path.exists():
        return None
    try:
        table = pd.read_csv(path)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); delete it, and it is made again"
        ) from None
    if lacking := [column for column in TABLES[name].split() if column not in table]:
        raise UserError(
            f"{path} has no column {lacking[0]!r}, so another version wrote it; delete it, and it "
            "is made again"
        )
    return table if len(table) else None


class Report:
    """What the template shows, section by section; each method gives one, or None."""

    def __init__(
        self, experiment: Experiment, table: pd.DataFrame, comparison: Comparison, manifest: dict
    ):
        self.experiment, self.comparison, self.manifest = experiment, comparison, manifest
        self.table = table[~is_unavailable(table.status)]
        self.final = table[table.final]
        self.values = comparison.values
        evaluation = experiment.evaluation
        self.samples_count = evaluation.num_samples
        self.main = {name: main_column(experiment, name) for name in evaluation.extractors}
        self.styles = figures.students_style(experiment)
        stderr = self.final.stderr.astype(float)
        self.stated = stderr.groupby([self.final.student, self.final.column]).mean()
        self.identity = self.final.drop_duplicates("column").set_index("column")
        self.tables = {name: read_table(experiment.root / "tables", name) for name in TABLES}
        self.scored = figures.scored_samples(experiment, self.table)

    # -- words ---------------------------------------------------------------------------------

    def column(self, name: str) -> Column:
        """The heading of a metric column."""
        row = self.identity.loc[name]
        metric = METRICS[row.metric]
        more = f", n {row.num_samples:,}" if row.num_samples != self.samples_count else ""
        return Column(
            metric.label + metric.arrow.replace(" ", "\u00a0"), f"{row.extractor}{more}", name
        )

    def other_column(self, name: str) -> Column:
        """A column of comparison.csv that is about a metric column, or quite unknown."""
        for column in self.comparison.columns:
            if name.startswith(f"{column}_"):
                return Column(name[len(column) + 1 :].replace("_", " "), column, name)
        return Column(name.replace("_", " "), title=name)

    def value(self, row: pd.Series, column: str, sampling: bool = True) -> Cell:
        """A metric's cell: mean ± std over training seeds, small its sampling error, flags."""
        status = row.get(f"{column}_status")
        if isinstance(status, str):
            return Cell(status, kind="absent")
        shown = number(row[column], row.get(f"{column}_std"))
        spread = row.get(f"{column}_sampling_std")
        spread = spread if known(spread) else self.stated.get((row.student, column))
        if sampling and known(spread) and shown.key is not None:
            shown.small = "± " + minus(format(spread, ".1g" if spread < 1 else ".3g"))
        shown.text = marked(shown.text, row.get(f"{column}_flag"))
        return shown

    @property
    def flags(self) -> list[tuple[str, str]]:
        flags = " ".join(self.final.flag.dropna().unique())
        return [told for flag, told in FLAGS.items() if flag in flags]

    @property
    def failures(self) -> list[tuple[str, str]]:
        bad = self.values[self.values.status != "ok"]
        return list(zip(bad.student, bad.status, strict=True))

    @property
    def lede(self) -> str:
        e, seeds = self.experiment, len(self.experiment.training.seeds)
        teachers = []
        for name in e.teachers:
            nfe = self.table[self.table.student == e.teacher_row(name)].nfe.dropna()
            teachers.append(f"{name} ({nfe.iloc[0]} evaluations an image)" if len(nfe) else name)
        n = len(e.students)
        return (
            f"{n} one-step student{'s' * (n > 1)} of the teacher{'s' * (len(teachers) > 1)} "
            f"{' and '.join(teachers)}, each with {budget_text(e.training.budget)} of training"
            f"{'' if self.same_budgets else ' unless said otherwise'} and {seeds} training "
            f"seed{'s' * (seeds > 1)}; scored on {self.samples_count:,} samples in the features of "
            f"{' and '.join(e.evaluation.extractors)}."
        )

    @property
    def same_budgets(self) -> bool:
        plain = budget_text(self.experiment.training.budget)
        return all(
            budget_text(self.experiment.budget(s)) == plain for s in self.experiment.students
        )

    @property
    def finding(self) -> Markup | None:
        """Who leads in each feature space, and how far that can be trusted."""
        students = self.values[self.values.student.isin(list(self.experiment.students))]
        leaders: dict[str, list[Markup]] = {}
        for extractor, column in self.main.items():
            if column not in students or students[column].isna().all():
                continue
            metric, key = main_metric_in(self.experiment, extractor), students[column].astype(float)
            best = students.loc[key.idxmax() if metric.higher_is_better else key.idxmin()]
            text = Markup("<strong>{}</strong> in {} ({})")
            value = cell(best[column], best.get(f"{column}_std"))
            of = f"{'Highest' if metric.higher_is_better else 'Lowest'} {metric.label}"
            leaders.setdefault(of, []).append(text.format(best.student, extractor, minus(value)))
        if not leaders:
            return None
        trust = (
            " No ranks are given: they need at least three training seeds, and intervals of the "
            "differences that exclude zero."
        )
        if self.ranks:
            trust = " Whether a lead is more than noise is what the rank says."
        who = [
            Markup("{}: {}.").format(of, Markup(" and ").join(them)) for of, them in leaders.items()
        ]
        return Markup(" ").join(who) + trust

    @property
    def ranks(self) -> list[str]:
        """The columns of ranks in which anything is ranked."""
        named = [c for c in self.values.columns if c == "rank" or str(c).endswith("_rank")]
        return [c for c in named if any(known(rank_key(rank)) for rank in self.values[c])]

    @property
    def keys(self) -> list[tuple[str, object]]:
        """The few facts that stand under the title."""
        m = self.manifest
        commit = (m["commit"] or "unknown")[:10] + (", changed" if m["dirty"] else "")
        reference = ", ".join(self.final.reference.dropna().unique()) or "missing"
        device = m["device"]
        where = device["processor"] if device["used"] == "cpu" else device["used"]
        return [
            ("Reference", reference),
            ("Training seeds", seeds_text(self.experiment.training.seeds)),
            ("Sampling seeds", seeds_text(self.final.sample_seed) or "none"),
            ("Device", f"{where}, {device['usable_cpus']} CPUs"),
            ("Commit", commit),
            ("Written", m["written"][:16].replace("T", " ") + " UTC"),
        ]

    # -- summary -------------------------------------------------------------------------------

    def _table(self, name: str, caption, columns: list[Column], make) -> Table:
        """A table of students under the rows that give it its scale; `make`: row -> cells."""
        scale = self.values.student.isin(list(self.experiment.scale_rows))
        fixed, rows = (
            [[self._student(row), *make(row)] for _, row in self.values[mask].iterrows()]
            for mask in (scale, ~scale)
        )
        return Table(name, caption, [Column("student", number=False), *columns], rows, fixed)

    def _student(self, row: pd.Series) -> Cell:
        failed = row.status != "ok"
        small = row.status if failed else "data-free" if row.get("data_free") == "yes" else ""
        return Cell(row.student, row.student, small=small, kind="failed" if failed else "")

    def summary(self) -> Table:
        seen = set(self.table.extractor)  # by those that were to be had
        first = next((name for name in self.main if name in seen), next(iter(self.main)))
        main = list(self.main.values())
        # The floor stands at the held-out size only, so one column is of that size.
        wanted = main + [
            column_name(metric, METRICS[metric].count(self.samples_count), first)
            for metric in ("recall", "accuracy")
        ]
        floor = self.final[(self.final.student == "floor") & (self.final.extractor == first)]
        wanted += list(floor[floor.metric == main_metric_in(self.experiment, first).name].column)
        wanted = [c for c in dict.fromkeys(wanted) if c in self.comparison.columns]
        ranks = self.ranks
        columns = [Column("rank")] if "rank" in ranks else []
        for c in wanted:
            columns += [self.column(c)]
            columns += [Column("rank", self.identity.extractor[c])] * (f"{c}_rank" in ranks)
        columns += [
            Column("NFE", title="evaluations of the network per image"),
            Column("images", title="that received a generator update"),
            Column("TFLOPs", title="of training, every network and teacher pairs included"),
            Column("seconds", title="of training"),
        ]

        def make(row: pd.Series) -> list[Cell]:
            cells = [ranking(row["rank"])] if "rank" in ranks else []
            for c in wanted:
                cells += [self.value(row, c, sampling=c in main)]
                cells += [ranking(row[f"{c}_rank"])] if f"{c}_rank" in ranks else []
            seconds = count(row.get("seconds"))
            seconds.text = marked(seconds.text, row.get("seconds_flag"))
            flops = row.get("flops")
            tera = flops / 1e12 if known(flops) else None
            return [*cells, count(row.get("nfe")), count(row.get("images")), number(tera), seconds]

        seeds = len(self.experiment.training.seeds)
        caption = (
            f"Mean ± standard deviation over {seeds} training seeds. "
            if seeds > 1
            else "One training seed, so no spread over training. "
        )
        caption += (
            "Small: the sampling error of one evaluation; data-free: trained without real images. "
            "The teacher's rows and the floor (the real held-out images, at their own number) give "
            "the scale and stay on top. Choose a heading to sort the students."
        )
        return self._table("summary-table", caption, columns, make)

    def everything(self) -> Table:
        """All columns of comparison.csv, those of other versions included."""
        metrics = self.comparison.columns
        tails = ("_std", "_status", "_sampling_std", "_flag")
        told = {
            *FACTS,
            *UNITS,
            "seconds_flag",
            "rank",
            *metrics,
            *(c + tail for c in metrics for tail in tails),
        }
        extra = [c for c in self.values.columns if c not in told and self.values[c].notna().any()]
        columns = [self.column(c) for c in metrics] + [self.other_column(c) for c in extra]
        columns += [Column("parameters"), Column("frozen", "%"), Column("seeds")]

        def make(row: pd.Series) -> list[Cell]:
            frozen = row.get("frozen")
            share = frozen * 100 if known(frozen) else None
            cells = [self.value(row, c) for c in metrics] + [words(row[c]) for c in extra]
            return [*cells, count(row.get("parameters")), count(share), count(row.get("seeds"))]

        caption = (
            f"Every column of tables/comparison.csv; of {self.samples_count:,} samples, but where "
            "n says otherwise."
        )
        return self._table("all-metrics", caption, columns, make)

    def finals(self) -> list[dict]:
        """One chart per extractor: each training seed's final value."""
        drawn = []
        for extractor, column in self.main.items():
            rows = per_training_seed(self.final[(self.final.column == column)])
            if not rows.student.isin(list(self.experiment.students)).any():
                continue
            text = f"Final {self.column(column).label} ({column}): " + "; ".join(
                f"{name} " + ", ".join(f"{v:.3g}" for v in mine.value)
                for name, mine in rows.groupby("student", sort=False)
            )
            listed = [
                [
                    Cell(r.student, r.student),
                    number(r.seed if known(r.seed) else None, form=".0f"),
                    number(r.value),
                    number(r.stderr),
                ]
                for r in rows.itertuples()
            ]
            columns = [Column("row", number=False), Column("seed"), Column("value")]
            data = Table(
                f"data-final-{extractor}", column, [*columns, Column("sampling error")], listed
            )
            metric = self.identity.metric[column]
            svg = charts.final(self.experiment, rows, metric, extractor, text)
            drawn.append({"title": extractor, "svg": svg, "data": data})
        return drawn

    # -- curves --------------------------------------------------------------------------------

    def curves(self) -> list[dict]:
        """Groups of charts: against images, against compute."""
        pairs = figures.quality_metrics(self.experiment, self.table)
        if not pairs or not self.table.student.isin(list(self.experiment.students)).any():
            return []
        return [
            {"title": title, "charts": [self._curve(axis, *pair) for pair in pairs]}
            for axis, title in (("images", "At equal images"), ("flops", "At equal compute"))
        ]

    def _curve(self, axis: str, metric: str, extractor: str) -> dict:
        column = figures.drawn_column(self.experiment, metric, extractor)
        lines = figures.quality_lines(self.experiment, self.table, axis, column)
        scale = self.table[
            (self.table.column == column) & self.table.student.isin(self.experiment.scale_rows)
        ]
        ends = [f"{name} {line['mean'].iloc[-1]:.3g}" for name, line in lines.items()]
        means = scale.value.astype(float).groupby(scale.student, sort=False).mean()
        ends += [f"{name} {value:.3g}" for name, value in means.items()]
        text = (
            f"{METRICS[metric].label} in {extractor} ({figures.direction(metric)}) against "
            f"{figures.AXES[axis]}; at the end: {', '.join(ends)}"
        )
        unit = "images" if axis == "images" else "TFLOPs"
        rows = [
            [
                Cell(name, name),
                number(point.x, form=",.0f" if axis == "images" else ".3g"),
                number(point.mean),
                number(point.min),
                number(point.max),
            ]
            for name, line in lines.items()
            for point in line.itertuples()
        ]
        columns = [Column("student", number=False), Column(unit)]
        columns += [Column("mean"), Column("lowest seed"), Column("highest seed")]
        return {
            "title": METRICS[metric].label,
            "note": f"{extractor}, {figures.direction(metric)}",
            "svg": charts.quality(self.experiment, self.table, axis, metric, extractor, text),
            "data": Table(f"data-{axis}-{metric}-{extractor}", column, columns, rows),
        }

    def legend(self) -> list[dict]:
        drawn = set(self.table.student)
        return [
            {"series": i, "name": name, "svg": charts.swatch(f"key-{i}", style)}
            for i, (name, style) in enumerate(self.styles.items())
            if name in drawn
        ]

    # -- samples -------------------------------------------------------------------------------

    def samples(self) -> dict | None:
        texts = figures.prompts(self.experiment)
        images, asked_for = figures.samples(self.scored, texts)
        if not images:
            return None
        what = "prompts" if texts else "classes"
        asked = f" of the {what} {(', ' if texts else ' ').join(asked_for)}" if asked_for else ""
        first = next(iter(images.values()))
        rows = [
            {
                "name": name,
                "source": charts.strip(pixels),
                "alt": f"{len(pixels)} images by {name}{asked}",
            }
            for name, pixels in images.items()
        ]
        return {
            "rows": rows,
            "asked": asked_for,
            "what": "prompt" if texts else "class",
            "count": len(first),
            "pixelated": first.shape[-1] <= 32,
            "seed": self.experiment.training.seeds[0],
        }

    def neighbours(self) -> dict | None:
        pairs, reading = figures.closest(self.scored)
        if not pairs:
            return None
        first = next(iter(pairs.values()))
        rows = [
            {
                "name": name,
                "distances": [f"{distance:.2f}" for distance in pair.distance],
                "images": charts.strip(pair.images),
                "training": charts.strip(pair.training),
                "alt": f"The {len(pair.images)} images of {name} that come nearest to a training "
                f"image, at {pair.distance[0]:.2f} to {pair.distance[-1]:.2f}",
            }
            for name, pair in pairs.items()
        ]
        return {
            "rows": rows,
            "reading": reading,
            "floor": "floor" in pairs,
            "count": max(len(pair.images) for pair in pairs.values()),
            "pixelated": first.images.shape[-1] <= 32,
            "seed": self.experiment.training.seeds[0],
        }

    # -- training ------------------------------------------------------------------------------

    def _record(self, student: str, seed: int) -> dict | None:
        path = self.experiment.run_dir(student, seed) / "student.json"
        scored = (student, seed) in figures.present(self.table)
        return read_json(path) if scored and path.exists() else None

    def health(self) -> dict | None:
        logs = figures.training_logs(self.experiment, self.table)
        if not any(logs.values()):
            return None
        order = figures.phases(logs)
        rows, drawn = [], []
        for student, seeds in logs.items():
            for seed, log in seeds.items():
                record = self._record(student, seed) or {}
                lost = sum(record.get("nonfinite", {}).values())
                ledger = record.get("ledger", {})
                memory = ledger.get("peak_memory")
                rows.append(
                    [
                        Cell(student, student),
                        number(seed, form=".0f"),
                        count(log.images.iloc[-1] if len(log) else None),
                        Cell(f"{lost:,}", lost, kind="warning" if lost else ""),
                        number(log.images_per_second.median() if len(log) else None),
                        count(ledger.get("seconds")),
                        number(memory / 2**30 if memory else None, form=".2f"),
                    ]
                )
            panels = [
                {
                    "title": title,
                    "svg": charts.health(
                        student, seeds, prefix, order, self._health_text(student, seeds, prefix)
                    ),
                }
                for prefix, title in list(figures.HEALTH.items())[:2]
                if seeds
            ]
            drawn.append({"student": student, "panels": panels})
        columns = [
            Column("student", number=False),
            Column("seed"),
            Column("images"),
            Column("skipped steps", "non-finite"),
            Column("images/s", "median"),
            Column("seconds", "training"),
            Column("peak memory", "GiB"),
        ]
        keys = [
            {"name": phase, "svg": charts.swatch(f"phase-{k}", figures.phase_style(k))}
            for k, phase in enumerate(order)
        ]
        caption = "One row per run. A non-finite step is skipped and counted, never hidden."
        return {
            "table": Table("health-table", caption, columns, rows),
            "students": drawn,
            "legend": keys,
        }

    def _health_text(self, student: str, seeds: dict, prefix: str) -> str:
        """First and last value of each line of a panel."""
        lines = [
            f"{column.removeprefix(prefix)} of seed {seed} from {log[column].iloc[0]:.3g} to "
            f"{log[column].iloc[-1]:.3g}"
            for seed, log in seeds.items()
            for column in log.columns
            if column.startswith(prefix) and len(log)
        ]
        return f"{figures.HEALTH[prefix]} of {student} against images: {'; '.join(lines)}"

    # -- tables of other stages ----------------------------------------------------------------

    def claims(self) -> dict | None:
        table = self.tables["claims"]
        if table is None:
            return None
        cards: dict[str, dict] = {}
        for row in table.itertuples():
            difference, bounds = interval(row)
            found = f"{difference} ({bounds})" if bounds else difference or "no number"
            card = cards.setdefault(row.claim, {"row": row, "found": []})
            card["found"].append({"column": row.column, "text": found, "verdict": row.verdict})
        return {
            "cards": list(cards.values()),
            "counts": table.verdict.value_counts().to_dict(),
            "multiplicity": multiplicity(table),
        }

    def pairwise(self) -> dict | None:
        table = self.tables["pairwise"]
        if table is None:
            return None
        shown = [c for c in self.main.values() if (table.column == c).any()] or list(
            table.column.unique()[:1]
        )
        return {
            "matrices": [self._matrix(table[table.column == column], column) for column in shown],
            "all": csv_table("pairwise-table", "All pairs: a minus b, with its interval.", table),
        }

    def _matrix(self, pairs: pd.DataFrame, column: str) -> dict:
        """Row minus column of every two students, with the verdict of the table."""
        kinds = {"a better": ("better", "worse"), "b better": ("worse", "better")}
        cells = {}
        for row in pairs.itertuples():
            back = row._replace(
                a=row.b, b=row.a, difference=-row.difference, low=-row.high, high=-row.low
            )
            for pair, kind in zip((row, back), kinds.get(row.verdict, ("", "")), strict=True):
                difference, bounds = interval(pair)
                cells[pair.a, pair.b] = {"difference": difference, "bounds": bounds, "kind": kind}
        known_names = {name for pair in cells for name in pair}
        order = [*self.experiment.scale_rows, *self.experiment.students]
        names = [n for n in order if n in known_names] + sorted(known_names - set(order))
        heading = self.column(column) if column in self.identity.index else Column(column)
        return {"heading": heading, "name": column, "names": names, "cells": cells}

    def agreement(self) -> dict | None:
        table = self.tables["agreement"]
        if table is None:
            return None
        # Anything else than a yes or a no is why there is no number.
        tried, disagreeing = table[table.agrees.isin(["yes", "no"])], table[table.agrees == "no"]
        difference = tried.relative_difference.astype(float).abs()
        worst = tried.loc[difference.idxmax()] if difference.notna().any() else None
        signs = table.agrees.map({"yes": "✓ yes", "no": "✗ no"})
        caption = "The same images, scored here and by each library."
        return {
            "tried": len(tried),
            "agreeing": len(tried) - len(disagreeing),
            "worst": worst,
            "largest": number(difference.max(), form=".1e").text,
            "disagreeing": [
                f"{row.quantity} in {row.extractor} ({row.library})"
                for row in disagreeing.itertuples()
            ],
            "table": csv_table(
                "agreement-table", caption, table.assign(agrees=signs.fillna(table.agrees))
            ),
        }

    def paper(self) -> Table | None:
        table = self.tables["paper"]
        caption = "Reported: as each source says it. Difference: reproduced minus reported."
        return None if table is None else csv_table("paper-table", caption, table)

    # -- protocol and provenance ---------------------------------------------------------------

    def notes(self) -> dict:
        students, others = [], []
        for note in self.comparison.notes:
            name, _, text = note.partition(": ")
            known_student = name in self.experiment.students
            (students if known_student else others).append(
                (name, code_spans(text)) if known_student else code_spans(note)
            )
        return {"students": students, "others": others}

    def protocols(self) -> dict | None:
        """What all columns share, and a table of what they do not."""
        used = self.final[self.final.column != ""].drop_duplicates("column")
        records = {
            row.column: (row.protocol, self.manifest["protocols"][row.protocol])
            for row in used.itertuples()
            if row.protocol in self.manifest["protocols"]
        }
        if not records:
            return None
        records = {c: records[c] for c in self.comparison.columns if c in records}
        every = [flat(record) for _, record in records.values()]
        keys = list(dict.fromkeys(key for record in every for key in record))
        shared = {
            key: every[0][key]
            for key in keys
            if all(record.get(key) == every[0].get(key) for record in every)
        }
        hidden = ("metric", "extractor", "num_samples")  # they are the column's name
        own = [k for k in keys if k not in shared and k not in hidden]
        settings = [k for k in own if k.startswith("settings.")]
        rest = [k for k in own if k not in settings]
        rows = []
        for (column, (key, _)), record in zip(records.items(), every, strict=True):
            said = "; ".join(
                f"{k.removeprefix('settings.')} {record[k]}" for k in settings if k in record
            )
            cells = [Cell(short(record.get(k, MISSING)), str(record.get(k, ""))) for k in rest]
            rows.append([Cell(column, column), Cell(said or MISSING, said), *cells, Cell(key, key)])
        names = [k.replace("_", " ").replace(".", " ") for k in rest]
        columns = [Column(c, number=False) for c in ("column", "settings", *names, "protocol")]
        caption = "A column holds one protocol; its hash stands in each row of metrics.csv."
        return {"shared": shared, "table": Table("protocols", caption, columns, rows)}

    def runs(self) -> Table:
        rows = []
        for student, seed in self.experiment.runs:
            mine = self.final[(self.final.student == student) & (self.final.seed == seed)]
            record = self._record(student, seed) or {}
            bad = mine[(mine.status != "ok") & ~is_unavailable(mine.status)]
            stop = record.get("stop", {})
            ledger = record.get("ledger", {})
            rows.append(
                [
                    Cell(student, student),
                    number(seed, form=".0f"),
                    Cell("ok", "ok") if bad.empty else Cell(bad.status.iloc[0], kind="failed"),
                    Cell(f"{stop['amount']:,.0f} {stop['unit']}" if stop else MISSING),
                    count(ledger.get("images")),
                    number(ledger["flops"] / 1e12 if ledger else None),
                    count(ledger.get("seconds")),
                    words(record.get("device")),
                    Cell((record.get("sha256") or MISSING)[:12], kind="hash"),
                ]
            )
        texts = {"student", "status", "stopped at", "device", "weights (sha256)"}
        names = ("student", "seed", "status", "stopped at", "images", "TFLOPs", "seconds")
        columns = [
            Column(name, number=name not in texts)
            for name in (*names, "device", "weights (sha256)")
        ]
        return Table("runs-table", "Every run of the experiment.", columns, rows)

    def features(self) -> Table | None:
        rows = []
        for name, record in self.manifest["features"].items():
            accuracy = record.get("held_out_accuracy")
            rows.append(
                [
                    Cell(name, name),
                    Cell("scores" if name in self.experiment.evaluation.extractors else "trains"),
                    number(100 * accuracy if known(accuracy) else None),
                    Cell(str(record.get("sha256") or record.get("unavailable") or MISSING)[:12]),
                ]
            )
        names = ("network", "role", "held-out accuracy, %", "weights (sha256)")
        columns = [Column(n, number=n.startswith("held")) for n in names]
        caption = (
            "Feature networks: those that score, and those that students were trained against."
        )
        return Table("features-table", caption, columns, rows) if rows else None

    def provenance(self) -> dict:
        m = self.manifest
        return {
            "facts": [
                ("Command", m["command"]),
                (
                    "Commit",
                    f"{m['commit'] or 'unknown'}{' (with local changes)' * bool(m['dirty'])}",
                ),
                ("Python", m["python"]),
                ("Device", ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in m["device"].items())),
            ],
            "packages": {k: v for k, v in m["packages"].items() if v},
            "config": yaml.safe_dump(m["config"], sort_keys=False, allow_unicode=True),
            "outputs": m["outputs"],
        }


def per_training_seed(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per student and training seed: its mean over the sampling seeds, whose draws are
    independent, and the standard error of that."""
    rows = rows[rows.status == "ok"].astype({"value": float, "stderr": float})
    grouped = rows.groupby(["student", "seed"], dropna=False, sort=False)
    errors = grouped.stderr.agg(lambda e: math.sqrt((e**2).sum(min_count=1)) / len(e))
    return grouped.value.mean().to_frame().assign(stderr=errors).reset_index()


def rank_key(rank) -> int | None:
    """What a rank is sorted by: "2", "tie 2–4"; None where nothing is ranked."""
    found = re.search(r"\d+", str(rank)) if known(rank) else None
    return int(found[0]) if found else None


def ranking(rank) -> Cell:
    return Cell(rank if known(rank) else "", rank_key(rank), kind="rank")


def short(value) -> str:
    """A hash by its beginning."""
    text = str(value)
    return text[:12] if len(text) == 64 and set(text) <= set("0123456789abcdef") else text


def interval(row) -> tuple[str, str]:
    """A difference and its interval, to the decimals that the interval's width leaves."""
    if not known(row.difference):
        return "", ""
    bounded = known(row.low) and known(row.high) and row.high > row.low
    size = (row.high - row.low) / 2 if bounded else abs(row.difference) / 10
    decimals = max(0, 1 - math.floor(math.log10(size))) if size else 2
    form = f"+.{decimals}f" if decimals <= 6 else "+.1e"
    bounds = [minus(format(bound, form)) for bound in (row.low, row.high) if known(bound)]
    return minus(format(row.difference, form)), " to ".join(bounds)


def csv_table(name: str, caption: str, table: pd.DataFrame) -> Table:
    """A table as it was written, columns that this version does not know included."""
    table = table.dropna(axis="columns", how="all")
    columns = [
        Column(str(c).replace("_", " "), number=pd.api.types.is_numeric_dtype(table[c]))
        for c in table.columns
    ]
    rows = [[words(value, ".6g") for value in row] for row in table.itertuples(index=False)]
    return Table(name, caption, columns, rows)


def write_html(
    experiment: Experiment, table: pd.DataFrame, comparison: Comparison, manifest: dict
) -> Path:
    """results/<experiment>/report.html, from the tidy table of `collect`, its comparison, and what
    will be the manifest; returns its path."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    with charts.settings():
        text = template.render(report=Report(experiment, table, comparison, manifest))
    path = experiment.root / "report.html"
    write_text(path, text)
    return path
