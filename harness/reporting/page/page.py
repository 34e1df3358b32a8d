"""report.html: an experiment's results on one self-contained page.

Scores come from the summary; claims, pairwise differences, agreement and published numbers come
from their tables in tables/, and their sections are left out if a table is missing.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
import yaml
from markupsafe import Markup, escape

from harness.config.experiment import Experiment
from harness.errors import UserError
from harness.evaluation.columns import column_name
from harness.evaluation.registry import METRICS
from harness.io.artifacts import write_text
from harness.io.records import StudentRecord
from harness.reporting.claims import multiplicity_note
from harness.reporting.collect import (
    flatten,
    is_unavailable,
    main_column,
    main_metric_in,
    student_record,
)
from harness.reporting.figures import health, quality, samples
from harness.reporting.formatting import (
    FLAGS,
    MISSING,
    flagged,
    is_known,
    number_text,
    spread_text,
)
from harness.reporting.page import charts
from harness.reporting.summary import Summary
from harness.reporting.tables import text_table

TEMPLATE = Path(__file__).with_name("template.html.j2")
# Tables of other stages, and the columns that their sections need.
TABLES = {
    "claims": "claim source reported better worse column difference low high verdict",
    "pairwise": "column a b difference low high verdict",
    "agreement": "quantity extractor library relative_difference agrees",
    "paper": "paper method metric reported reproduced",
}
NUMBER = re.compile(r"(tie )?[-−+]?\d")
THUMBNAIL = 96  # pixels: larger sample images are scaled down
PIXELATED = 32  # images up to this size are enlarged without smoothing


def write_page(
    experiment: Experiment, table: pd.DataFrame, summary: Summary, manifest: dict
) -> Path:
    """Write report.html from `collect`'s table, its summary and the manifest; returns its path."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"numeric": is_numeric, "cells": cells, "code": code_spans}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    page = Page(experiment, table, summary, manifest)
    sections = {name: getattr(page, name)() for name in SECTIONS}
    specifications = json.dumps(page.specifications, separators=(",", ":")).replace("</", "<\\/")
    text = template.render(
        page=page,
        titles=SECTIONS,
        missing=MISSING,
        specifications=Markup(specifications),
        javascript=Markup(charts.javascript()),
        **sections,
    )
    path = experiment.paths.root / "report.html"
    write_text(path, text)
    return path


# Method of `Page` and name in the template -> title in the contents.
SECTIONS = {
    "scores": "Summary",
    "curves": "Quality against budget",
    "sample_rows": "Samples",
    "neighbours": "Nearest training images",
    "training": "Training health",
    "claims": "Claims of the papers",
    "pairwise": "Pairwise differences",
    "agreement": "Agreement with libraries",
    "paper": "Published numbers",
    "protocol": "Protocol",
    "provenance": "Provenance",
}


class Page:
    """The contents of the page: one method per section, which returns what the template shows, or
    None for no section. Tables are data frames of texts, the first column heading each row."""

    def __init__(
        self, experiment: Experiment, table: pd.DataFrame, summary: Summary, manifest: dict
    ):
        self.experiment, self.summary, self.manifest = experiment, summary, manifest
        self.table = table[~is_unavailable(table.status)]
        self.final = self.table[self.table.final]
        self.main = {
            name: main_column(experiment, name) for name in experiment.evaluation.extractors
        }
        self.students = summary.students
        self.failures = self.students[self.students.status != "ok"]
        self.reference_count = int(
            self.students.student.isin(list(experiment.reference_rows)).sum()
        )
        self.samples = samples.read_samples(experiment, self.table)
        self.specifications: list[dict] = []

    def chart(self, specification: dict, title: str, note: str = "") -> dict:
        """A chart with its caption."""
        self.specifications.append(specification)
        index, text = len(self.specifications) - 1, specification["description"]
        return {"index": index, "title": title, "note": note, "text": text}

    # -- header -----------------------------------------------------------------------------------

    @property
    def introduction(self) -> str:
        e, seeds = self.experiment, len(self.experiment.training.seeds)
        budget = ", ".join(f"{limit.amount:,.0f} {limit.unit}" for limit in e.training.budget)
        own = any(list(s.budget) != e.training.budget for s in e.students.values())
        return (
            f"{_plural(len(e.students), 'one-step student')} of the teacher "
            f"{' and '.join(e.teachers)}, trained for {budget}"
            f"{' unless noted otherwise' * own} with {_plural(seeds, 'training seed')}, scored on "
            f"{e.evaluation.num_samples:,} samples in the features of "
            f"{' and '.join(e.evaluation.extractors)}."
        )

    @property
    def finding(self) -> Markup | None:
        """The leader in each feature space, and how reliable the lead is."""
        leaders: dict[str, list[Markup]] = {}
        for extractor, column in self.main.items():
            scores = self.summary.scores
            scores = scores[
                (scores.column == column) & scores.student.isin(self.experiment.students)
            ]
            if scores["mean"].isna().all():
                continue
            metric = main_metric_in(self.experiment, extractor)
            best = scores["mean"].idxmax() if metric.higher_is_better else scores["mean"].idxmin()
            row = scores.loc[best]
            title = f"{'Highest' if metric.higher_is_better else 'Lowest'} {metric.label}"
            text = Markup("<strong>{}</strong> in {} ({})")
            value = minus(spread_text(row["mean"], row["std"]))
            leaders.setdefault(title, []).append(text.format(row.student, extractor, value))
        if not leaders:
            return None
        reliability = (
            "The ranks show which leads exceed the noise."
            if self.is_ranked
            else "No ranks are given: they need at least three training seeds and intervals of the "
            "differences that exclude zero."
        )
        texts = [
            Markup("{}: {}.").format(title, Markup(" and ").join(rows))
            for title, rows in leaders.items()
        ]
        return Markup(" ").join([*texts, reliability])

    @property
    def is_ranked(self) -> bool:
        return self.summary.scores["rank"].map(lambda rank: bool(NUMBER.match(str(rank)))).any()

    @property
    def facts(self) -> dict[str, str]:
        m, device = self.manifest, self.manifest["device"]
        seeds = self.final.sample_seed.dropna().unique()
        return {
            "Reference": ", ".join(self.final.reference.dropna().unique()) or "missing",
            "Training seeds": ", ".join(map(str, sorted(self.experiment.training.seeds))),
            "Sampling seeds": ", ".join(map(str, sorted(seeds))) or "none",
            "Device": f"{device['processor'] if device['used'] == 'cpu' else device['used']}, "
            f"{device['usable_cpus']} CPUs",
            "Commit": f"{(m['commit'] or 'unknown')[:10]}{', modified' * bool(m['dirty'])}",
            "Written": m["written"][:16].replace("T", " ") + " UTC",
        }

    # -- summary ----------------------------------------------------------------------------------

    def scores(self) -> dict:
        table = self._students_table(self._summary_columns())
        hidden = [h for h in table if "best of" in h or h in ("seeds", "parameters", "frozen")]
        flags = " ".join(self.final.flag.dropna().unique())
        return {
            "table": table.drop(columns=hidden),
            "all": self._students_table(list(self.summary.columns.index)),
            "flags": [text for flag, text in FLAGS.items() if flag in flags],
            "finals": self._final_charts(),
        }

    def _summary_columns(self) -> list[str]:
        """The main columns; recall, accuracy and the floor's column of the first extractor that is
        available."""
        scored, count = set(self.table.extractor), self.experiment.evaluation.num_samples
        first = next((name for name in self.main if name in scored), next(iter(self.main)))
        names = [column_name(m, METRICS[m].count(count), first) for m in ("recall", "accuracy")]
        floor = self.final[(self.final.student == "floor") & (self.final.extractor == first)]
        main = main_metric_in(self.experiment, first).name
        names = [*self.main.values(), *names, *floor[floor.metric == main].column]
        return [name for name in dict.fromkeys(names) if name in self.summary.columns.index]

    def _students_table(self, columns: list[str]) -> pd.DataFrame:
        table = text_table(self.summary, columns, self.is_ranked, score_cell, self._heading)
        notes = [
            row.status if row.status != "ok" else "data-free" if row.data_free == "yes" else ""
            for row in self.students.itertuples()
        ]
        names = [
            Markup("{}<small>{}</small>").format(name, note) if note else name
            for name, note in zip(table.index, notes, strict=True)
        ]
        table.insert(0, "student", pd.Series(names, table.index, dtype=object))
        return table.drop(columns=["data-free", "status"], errors="ignore")

    def _heading(self, column, part: str = "") -> Markup:
        metric, count = METRICS[column.metric], column.num_samples
        size = f", n {count:,}" if count != self.experiment.evaluation.num_samples else ""
        label = part or metric.label + metric.arrow.replace(" ", "\u00a0")
        note = f"{metric.label}, {column.extractor}" if part else column.extractor
        return Markup("{}<small>{}{}</small>").format(label, note, size)

    def _final_charts(self) -> list[dict]:
        """One chart per extractor: the final score of each training seed."""
        drawn, names = [], list(self.experiment.students)
        for extractor, column in self.main.items():
            rows = per_training_seed(self.final[self.final.column == column])
            students = rows[rows.student.isin(names)]
            if students.empty:
                continue
            metric = main_metric_in(self.experiment, extractor)
            listed = [
                f"{name} {', '.join(number_text(v) for v in group.value)}"
                for name, group in rows.groupby("student", sort=False)
            ]
            log = quality.has_log_scale(metric.name)
            # The teacher's single step is far off and would squeeze the students together.
            near = self.final[~self.final.student.str.startswith("teacher-1step")]
            reference = quality.reference_lines(self.experiment, near, column, log)
            drawn.append(
                self.chart(
                    charts.final_scores(
                        students,
                        reference,
                        names,
                        f"{column} ({quality.direction(metric.name)})",
                        log,
                        f"Final {metric.label} ({column}): {'; '.join(listed)}",
                    ),
                    extractor,
                )
            )
        return drawn

    # -- curves -----------------------------------------------------------------------------------

    def curves(self) -> dict | None:
        metrics = quality.drawn_metrics(self.experiment, self.table)
        scored, names = set(self.table.student), list(self.experiment.students)
        if not metrics or not scored & set(names):
            return None
        groups = {
            title: [self._curve(axis, *pair) for pair in metrics]
            for axis, title in (("images", "At equal images"), ("flops", "At equal compute"))
        }
        return {"legend": charts.legend(names, scored), "groups": groups}

    def _curve(self, axis: str, metric: str, extractor: str) -> dict:
        column = quality.drawn_column(self.experiment, metric, extractor)
        curves = quality.curves(self.experiment, self.table, axis, column)
        log, names = quality.has_log_scale(metric), list(self.experiment.students)
        reference = quality.reference_lines(self.experiment, self.table, column, log)
        last = curves.groupby("student", sort=False)["mean"].last()
        ends = [f"{name} {value:.3g}" for name, value in [*last.items(), *reference.items()]]
        text = (
            f"{METRICS[metric].label} in {extractor} ({quality.direction(metric)}) against "
            f"{quality.AXES[axis]}; at the end: {', '.join(ends)}"
        )
        x_title = quality.AXES[axis]
        specification = charts.quality(curves, reference, names, x_title, log, text)
        note = f"{extractor}, {quality.direction(metric)}"
        return self.chart(specification, METRICS[metric].label, note)

    # -- samples ----------------------------------------------------------------------------------

    def sample_rows(self) -> dict | None:
        texts = samples.prompt_texts(self.experiment)
        images, conditions = samples.select_samples(self.samples, texts)
        if not images:
            return None
        first = next(iter(images.values()))
        kind = "prompt" if texts else "class"
        return {
            "rows": [
                {"name": name, "image": strip(row), "alt": f"{len(row)} images by {name}"}
                for name, row in images.items()
            ],
            "conditions": conditions,
            "kind": kind,
            "count": len(first),
            "pixelated": first.shape[-1] <= PIXELATED,
            "seed": self.experiment.training.seeds[0],
        }

    def neighbours(self) -> dict | None:
        rows, description = samples.nearest_neighbours(self.samples)
        if not rows:
            return None
        return {
            "rows": [
                {
                    "name": name,
                    "distances": [f"{distance:.2f}" for distance in row.distance],
                    "image": strip(row.images),
                    "training": strip(row.training),
                    "alt": f"The {len(row.images)} images of {name} nearest to a training image, "
                    f"at distances {row.distance[0]:.2f} to {row.distance[-1]:.2f}",
                }
                for name, row in rows.items()
            ],
            "description": description,
            "count": max(len(row.images) for row in rows.values()),
            "pixelated": next(iter(rows.values())).images.shape[-1] <= PIXELATED,
            "seed": self.experiment.training.seeds[0],
        }

    # -- training ---------------------------------------------------------------------------------

    def training(self) -> dict | None:
        logs = health.training_logs(self.experiment, self.table)
        if not any(logs.values()):
            return None
        phases, rows, drawn = health.phases_of(logs), [], []
        for student, seeds in logs.items():
            for seed, log in seeds.items():
                record = student_record(self.experiment, student, seed)
                ledger, speed = record.ledger, log.images_per_second.median()
                rows.append(
                    {
                        "student": student,
                        "seed": seed,
                        "images": number_text(log.images.iloc[-1] if len(log) else None, ",.0f"),
                        "skipped steps (non-finite)": _warning(record),
                        "images/s (median)": number_text(speed),
                        "training, s": number_text(ledger.seconds, ",.0f"),
                        "peak memory, GiB": number_text(ledger.peak_memory, ".2f", 2**30),
                    }
                )
            for prefix in ("loss/", "grad_norm/") if seeds else ():
                drawn.append(self._health_chart(student, seeds, phases, prefix))
        legend = charts.phase_legend(phases)
        return {"table": pd.DataFrame(rows), "charts": drawn, "legend": legend}

    def _health_chart(self, student: str, seeds: dict, phases: list[str], prefix: str) -> dict:
        log, title = health.tidy_log(seeds, prefix), health.PANELS[prefix]
        listed = [
            f"{phase} of seed {seed} from {line.value.iloc[0]:.3g} to {line.value.iloc[-1]:.3g}"
            for (phase, seed), line in log.groupby(["phase", "seed"], sort=False)
        ]
        text = f"{title} of {student} against images: {'; '.join(listed)}"
        return self.chart(charts.health(log, phases, prefix == "grad_norm/", text), student, title)

    # -- tables of other stages -------------------------------------------------------------------

    def _read(self, name: str) -> pd.DataFrame | None:
        """One of TABLES; None if it was not written."""
        path = self.experiment.paths.tables / f"{name}.csv"
        if not path.exists():
            return None
        try:
            table = pd.read_csv(path)
            missing = [column for column in TABLES[name].split() if column not in table]
            reason = f"it lacks the column {missing[0]!r}" if missing else ""
        except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
            reason = str(error)
        if reason:
            raise UserError(
                f"{path} cannot be read ({reason}); delete it and run the workflow again", "damaged"
            )
        return table if len(table) else None

    def claims(self) -> dict | None:
        table = self._read("claims")
        if table is None:
            return None
        cards: dict[str, dict] = {}
        for row in table.itertuples():
            difference, bounds = interval_text(row)
            text = f"{difference} ({bounds})" if bounds else difference or "no score"
            card = cards.setdefault(row.claim, {"row": row, "results": []})
            card["results"].append({"column": row.column, "text": text, "verdict": row.verdict})
        counts = [f"{count} {name}" for name, count in table.verdict.value_counts().items()]
        return {
            "cards": list(cards.values()),
            "counts": ", ".join(counts),
            "multiplicity": multiplicity_note(table),
        }

    def pairwise(self) -> dict | None:
        table = self._read("pairwise")
        if table is None:
            return None
        columns = [c for c in self.main.values() if (table.column == c).any()]
        columns = columns or list(table.column.unique()[:1])
        matrices = {column: self._matrix(table[table.column == column]) for column in columns}
        return {"matrices": matrices, "all": text_frame(table)}

    def _matrix(self, pairs: pd.DataFrame) -> pd.DataFrame:
        """Row minus column of every two students, with the verdict."""
        cells, verdicts = {}, {"a better": ("better", "worse"), "b better": ("worse", "better")}
        marks = {"better": "▲ ", "worse": "▼ ", "": ""}
        for row in pairs.itertuples():
            swapped = row._replace(
                a=row.b, b=row.a, difference=-row.difference, low=-row.high, high=-row.low
            )
            kinds = verdicts.get(row.verdict, ("", ""))
            for pair, kind in zip((row, swapped), kinds, strict=True):
                text = Markup('<span class="{}">{}{}<small>{}</small></span>')
                difference, bounds = interval_text(pair)
                cells[pair.a, pair.b] = text.format(kind, marks[kind], difference, bounds)
        present = {name for pair in cells for name in pair}
        names = [name for name in self.experiment.students if name in present]
        names += sorted(present - set(names))
        rows = [[a, *(cells.get((a, b), "") for b in names)] for a in names]
        return pd.DataFrame(rows, columns=["row − column", *names], dtype=object)

    def agreement(self) -> dict | None:
        table = self._read("agreement")
        if table is None:
            return None
        # Other values of `agrees` give the reason for a missing number.
        compared, failed = table[table.agrees.isin(["yes", "no"])], table[table.agrees == "no"]
        largest = compared.relative_difference.astype(float).abs().max()
        text = f"{len(compared) - len(failed)} of {len(compared)} quantities agree within tolerance"
        if is_known(largest):
            text += f"; the largest relative difference is {largest:.1e}"
        names = [f"{r.quantity} in {r.extractor} ({r.library})" for r in failed.itertuples()]
        marks = table.agrees.map({"yes": "✓ yes", "no": "✗ no"}).fillna(table.agrees)
        return {
            "text": text,
            "failed": ", ".join(names),
            "table": text_frame(table.assign(agrees=marks)),
        }

    def paper(self) -> pd.DataFrame | None:
        table = self._read("paper")
        return None if table is None else text_frame(table)

    # -- protocol and provenance ------------------------------------------------------------------

    def protocol(self) -> dict:
        """The notes, what all columns' protocols share, and a table of their differences."""
        students, general = {}, []
        for note in self.summary.notes:
            name, _, text = note.partition(": ")
            if name in self.experiment.students:
                students[name] = text
            else:
                general.append(note)
        used = self.final[self.final.column != ""].drop_duplicates("column")
        hash_of = dict(zip(used.column, used.protocol, strict=True))
        records = {
            column: flatten(self.manifest["protocols"][hash_of[column]])
            for column in self.summary.columns.index
            if hash_of.get(column) in self.manifest["protocols"]
        }
        frame = pd.DataFrame.from_dict(records, orient="index", dtype=object)
        texts = frame.map(_short).where(frame.notna(), MISSING)
        shared = [key for key in texts if texts[key].nunique() == 1]
        table = texts.drop(columns=[*shared, "metric", "extractor", "num_samples"], errors="ignore")
        settings = [key for key in table if key.startswith("settings.")]
        joined = [
            "; ".join(f"{_spaced(k[9:])} {v}" for k, v in row.items() if v != MISSING) or MISSING
            for row in table[settings].to_dict("records")
        ]
        table = table.drop(columns=settings).rename(columns=_spaced)
        table["settings"] = joined
        table["protocol"] = [_code(hash_of[column]) for column in table.index]
        return {
            "general": general,
            "students": students,
            "shared": {_spaced(key): frame[key].iloc[0] for key in shared},
            "table": table.rename_axis("column").reset_index(),
            "features": self._features_table(),
        }

    def _features_table(self) -> pd.DataFrame:
        scoring = self.experiment.evaluation.extractors
        rows = [
            {
                "network": name,
                "role": "scores" if name in scoring else "trains students",
                "held-out accuracy, %": number_text(record.get("held_out_accuracy"), scale=0.01),
                "weights (sha256)": _code(record.get("sha256") or record.get("unavailable")),
            }
            for name, record in self.manifest["features"].items()
        ]
        return pd.DataFrame(rows)

    def _runs_table(self) -> pd.DataFrame:
        rows = []
        for student, seed in self.experiment.runs:
            scored = self.final[(self.final.student == student) & (self.final.seed == seed)]
            failed = scored[scored.status != "ok"]
            finished = (student, seed) in samples.scored_runs(self.table)
            record = student_record(self.experiment, student, seed) if finished else None
            stop, ledger = record and record.stop, record and record.ledger
            rows.append(
                {
                    "student": student,
                    "seed": seed,
                    "status": "ok" if failed.empty else failed.status.iloc[0],
                    "stopped at": f"{stop.amount:,.0f} {stop.unit}" if stop else MISSING,
                    "images": number_text(ledger and ledger.images, ",.0f"),
                    "TFLOPs": number_text(ledger and ledger.flops, scale=1e12),
                    "seconds": number_text(ledger and ledger.seconds, ",.0f"),
                    "device": record.device if record else MISSING,
                    "weights (sha256)": _code(record and record.sha256),
                }
            )
        return pd.DataFrame(rows)

    def provenance(self) -> dict:
        m = self.manifest
        device = ", ".join(f"{_spaced(k)} {v}" for k, v in m["device"].items())
        packages = ", ".join(f"{name} {v}" for name, v in m["packages"].items() if v)
        return {
            "facts": {
                "Command": m["command"],
                "Commit": f"{m['commit'] or 'unknown'}{' (with local changes)' * bool(m['dirty'])}",
                "Python": m["python"],
                "Device": device,
                "Packages": packages,
            },
            "runs": self._runs_table(),
            "configuration": yaml.safe_dump(m["config"], sort_keys=False, allow_unicode=True),
            "outputs": m["outputs"],
        }


# -- texts ----------------------------------------------------------------------------------------


def score_cell(row) -> str:
    """A row of `Summary.scores`: mean ± std over training seeds, below it the sampling error."""
    if row.status != "ok":
        return row.status
    text = flagged(minus(spread_text(row.mean, row.std)), row.flag)
    error = row.sampling_std if is_known(row.sampling_std) else row.stderr
    if text == MISSING or not is_known(error):
        return text
    error = format(error, ".1g" if error < 1 else ".3g")
    return Markup("{}<small>± {}</small>").format(text, minus(error))


def minus(text: str) -> str:
    """A number's text with a typographic minus sign."""
    return text.replace("-", "−")


def code_spans(text: str) -> Markup:
    """A note with its `code` marked up and all else escaped."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def cells(table: pd.DataFrame) -> list[list]:
    return table.astype(object).to_numpy().tolist()


def is_numeric(table: pd.DataFrame) -> list[bool]:
    """For each column whether its first known text is a number."""
    texts = [[str(v) for v in table.iloc[:, i] if v != MISSING] for i in range(table.shape[1])]
    return [bool(column and NUMBER.match(column[0])) for column in texts]


def text_frame(table: pd.DataFrame) -> pd.DataFrame:
    """A CSV table as texts; empty columns are dropped."""

    def text(value) -> str:
        if not is_known(value):
            return MISSING
        return f"{value:.6g}" if isinstance(value, float) else str(value)

    table = table.dropna(axis="columns", how="all").rename(columns=_spaced)
    return table.astype(object).map(text)


def interval_text(row) -> tuple[str, str]:
    """A difference and its interval, rounded to the decimals that the interval's width supports."""
    if not is_known(row.difference):
        return "", ""
    bounded = is_known(row.low) and is_known(row.high) and row.high > row.low
    size = (row.high - row.low) / 2 if bounded else abs(row.difference) / 10
    decimals = max(0, 1 - math.floor(math.log10(size))) if size else 2
    form = f"+.{decimals}f" if decimals <= 6 else "+.1e"
    bounds = [minus(format(bound, form)) for bound in (row.low, row.high) if is_known(bound)]
    return minus(format(row.difference, form)), " to ".join(bounds)


def per_training_seed(rows: pd.DataFrame) -> pd.DataFrame:
    """One row per student and training seed: student, seed, value, stderr of the mean over the
    sampling seeds, whose draws are independent."""
    rows = rows[rows.status == "ok"].astype({"value": float, "stderr": float})
    grouped = rows.groupby(["student", "seed"], dropna=False, sort=False)
    errors = grouped.stderr.agg(lambda e: math.sqrt((e**2).sum(min_count=1)) / len(e))
    return grouped.value.mean().to_frame().assign(stderr=errors).reset_index()


def strip(images: np.ndarray) -> str:
    """Images `(N, C, H, W)` uint8 side by side as the data URL of a PNG with transparent gaps."""
    from PIL import Image

    count, _, height, width = images.shape
    gap = max(1, width // 12)
    canvas = np.zeros((height, count * (width + gap) - gap, 4), np.uint8)
    for i, image in enumerate(images):
        left = i * (width + gap)
        canvas[:, left : left + width, :3] = image.transpose(1, 2, 0)  # grey fills three channels
        canvas[:, left : left + width, 3] = 255
    picture = Image.fromarray(canvas)
    if height > THUMBNAIL:
        size = (round(picture.width * THUMBNAIL / height), THUMBNAIL)
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _spaced(key: str) -> str:
    return str(key).replace("_", " ").replace(".", " ")


def _short(value) -> str:
    """A hash by its first digits, all else in full."""
    text = str(value)
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text


def _code(value: str | None) -> Markup:
    return Markup("<code>{}</code>").format(str(value)[:12]) if value else Markup(MISSING)


def _warning(record: StudentRecord) -> Markup | str:
    count = sum(record.skipped_steps.values())
    return Markup('<span class="warning">{:,}</span>').format(count) if count else "0"
