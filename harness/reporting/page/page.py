"""report.html: an experiment's results on one self-contained page.

Scores come from the summary; claims, pairwise differences, agreement and published numbers come
from their tables in tables/, and their sections are left out if a table is missing.
"""

from __future__ import annotations

import json
from pathlib import Path

import jinja2
import pandas as pd
import yaml
from markupsafe import Markup

from harness.config.experiment import Experiment
from harness.errors import UserError
from harness.evaluation.columns import column_name
from harness.evaluation.registry import METRICS
from harness.io.artifacts import write_text
from harness.reporting.claims import multiplicity_note
from harness.reporting.collect import (
    flatten,
    is_unavailable,
    main_column,
    main_metric_in,
    student_record,
)
from harness.reporting.figures import health, quality, samples
from harness.reporting.formatting import FLAGS, MISSING, is_known, number_text, spread_text
from harness.reporting.page import charts
from harness.reporting.page.cells import (
    NUMBER,
    cells,
    code_spans,
    difference_cell,
    hash_code,
    interval_texts,
    is_numeric,
    minus,
    plural,
    score_cell,
    shortened,
    spaced,
    strip,
    text_frame,
    verdict_badge,
    warning,
)
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
            f"{plural(len(e.students), 'one-step student')} of the teacher "
            f"{' and '.join(e.teachers)}, trained for {budget}"
            f"{' unless noted otherwise' * own} with {plural(seeds, 'training seed')}, scored on "
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
            rows = quality.per_training_seed(self.final, column)
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
        phases = health.phases_of(logs)
        runs = [(student, seed, log) for student in logs for seed, log in logs[student].items()]
        return {
            "table": pd.DataFrame([self._run(*run) for run in runs]),
            "legend": charts.phase_legend(phases),
            "charts": [
                self._health_chart(student, seeds, phases, prefix)
                for student, seeds in logs.items()
                for prefix in (("loss/", "grad_norm/") if seeds else ())
            ],
        }

    def _run(self, student: str, seed: int, log: pd.DataFrame) -> dict[str, str]:
        record = student_record(self.experiment, student, seed)
        ledger, skipped = record.ledger, sum(record.skipped_steps.values())
        return {
            "student": student,
            "seed": seed,
            "stopped at": f"{record.stop.amount:,.0f} {record.stop.unit}",
            "images": f"{ledger.images:,}",
            "TFLOPs": number_text(ledger.flops, scale=1e12),
            "skipped steps": warning(f"{skipped:,}") if skipped else "0",
            "images/s": number_text(log.images_per_second.median()),
            "seconds": f"{ledger.seconds:,.0f}",
            "peak GiB": number_text(ledger.peak_memory, ".2f", 2**30),
            "device": record.device,
            "weights (sha256)": hash_code(record.sha256),
        }

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
        counts = [f"{count} {name}" for name, count in table.verdict.value_counts().items()]
        rows = [
            {
                "claim": row.claim,
                "verdict": verdict_badge(row.verdict),
                "difference here": Markup("{} {}<small>{} − {}, {}</small>").format(
                    *interval_texts(row), row.better, row.worse, row.column
                ),
                "reported": f"{row.reported} ({row.source})",
            }
            for row in table.itertuples()
        ]
        note = multiplicity_note(table)
        return {"table": pd.DataFrame(rows), "counts": ", ".join(counts), "multiplicity": note}

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
        names = list(dict.fromkeys([*pairs.a, *pairs.b]))
        table = pd.DataFrame("", index=names, columns=names, dtype=object)
        for row in pairs.itertuples():
            swapped = row._replace(difference=-row.difference, low=-row.high, high=-row.low)
            is_better = {"a better": True, "b better": False}.get(row.verdict)
            table.loc[row.a, row.b] = difference_cell(row, is_better)
            table.loc[row.b, row.a] = difference_cell(swapped, is_better, swap=True)
        return table.rename_axis("row − column").reset_index()

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
        texts = frame.map(str).where(frame.notna(), MISSING)
        shared = [key for key in texts if texts[key].nunique() == 1]
        table = texts.drop(columns=[*shared, "metric", "extractor", "num_samples"], errors="ignore")
        settings = [key for key in table if key.startswith("settings.")]
        names = [spaced(key.removeprefix("settings.")) for key in settings]
        joined = [
            "; ".join(f"{n} {v}" for n, v in zip(names, row, strict=True) if v != MISSING)
            for row in table[settings].to_numpy()
        ]
        table = table.drop(columns=settings).map(shortened).rename(columns=spaced)
        table["settings"] = joined
        table["protocol"] = [hash_code(hash_of[column]) for column in table.index]
        return {
            "general": general,
            "students": students,
            "shared": {spaced(key): frame[key].iloc[0] for key in shared},
            "table": table.rename_axis("column").reset_index(),
            "features": self._features(),
        }

    def _features(self) -> pd.DataFrame:
        rows = [
            {
                "network": name,
                "role": "scores" if name in self.main else "trains students",
                "held-out accuracy, %": number_text(record.get("held_out_accuracy"), scale=0.01),
                "weights (sha256)": hash_code(record.get("sha256")),
            }
            for name, record in self.manifest["features"].items()
        ]
        return pd.DataFrame(rows)

    def provenance(self) -> dict:
        m = self.manifest
        device = ", ".join(f"{spaced(k)} {v}" for k, v in m["device"].items())
        packages = ", ".join(f"{name} {v}" for name, v in m["packages"].items() if v)
        return {
            "facts": {
                "Command": m["command"],
                "Commit": f"{m['commit'] or 'unknown'}{' (with local changes)' * bool(m['dirty'])}",
                "Python": m["python"],
                "Device": device,
                "Packages": packages,
            },
            "configuration": yaml.safe_dump(m["config"], sort_keys=False, allow_unicode=True),
            "outputs": m["outputs"],
        }
