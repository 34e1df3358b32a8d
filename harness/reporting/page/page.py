"""report.html: an experiment's results on one self-contained page.

Each section is a generator of HTML parts, which the macros of parts.html.j2 make from data frames,
charts and images. A section without parts is left out.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import pandas as pd
import yaml
from markupsafe import Markup, escape

from harness.config.experiment import Experiment
from harness.errors import UserError
from harness.evaluation.registry import METRICS, column_name
from harness.io.artifacts import write_text
from harness.reporting.claims import multiplicity_note
from harness.reporting.collect import (
    flatten,
    is_unavailable,
    main_column,
    main_metric_in,
    training_record,
)
from harness.reporting.figures import charts, health, quality, samples
from harness.reporting.formatting import (
    FLAGS,
    MISSING,
    as_text,
    flagged,
    interval_text,
    minus,
    number_text,
    spread_text,
)
from harness.reporting.page.parts import ENVIRONMENT, NUMBER, csv_text, hash_code, html, spaced
from harness.reporting.tables import Summary, text_table


@dataclass
class Content:
    """What the sections show: the rows of `collect`'s table with numbers, and what follows from
    them."""

    experiment: Experiment
    table: pd.DataFrame
    summary: Summary
    manifest: dict

    def __post_init__(self):
        e = self.experiment
        self.final = self.table[self.table.final]
        self.main = {name: main_column(e, name) for name in e.evaluation.extractors}
        self.samples = samples.read_samples(e, self.table)
        self.is_ranked = self.summary.scores["rank"].astype(str).str.match(NUMBER).any()


def write_page(
    experiment: Experiment, table: pd.DataFrame, summary: Summary, manifest: dict
) -> Path:
    """Write report.html from `collect`'s table, its summary and the manifest; returns its path."""
    import vl_convert

    content = Content(experiment, table[~is_unavailable(table.status)], summary, manifest)
    sections = [
        (make.__name__, title, Markup("\n").join(make(content))) for title, make in SECTIONS
    ]
    text = ENVIRONMENT.get_template("page.html.j2").render(
        name=experiment.name,
        introduction=introduction(experiment),
        finding=finding(content),
        students=summary.students,
        facts=html.facts(facts(content)),
        sections=[section for section in sections if section[2]],
        missing=MISSING,
        javascript=Markup(vl_convert.javascript_bundle().replace("</script", "<\\/script")),
    )
    path = experiment.paths.root / "report.html"
    write_text(path, text)
    return path


# -- header -------------------------------------------------------------------------------------


def introduction(experiment: Experiment) -> str:
    training, evaluation = experiment.training, experiment.evaluation
    students, seeds = len(experiment.students), len(training.seeds)
    budget = ", ".join(f"{limit.amount:,.0f} {limit.unit}" for limit in training.budget)
    own = any(list(s.budget) != training.budget for s in experiment.students.values())
    return (
        f"{students} one-step student{'s' * (students != 1)} of the teacher "
        f"{' and '.join(experiment.teachers)}, trained for {budget}"
        f"{' unless noted otherwise' * own} with {seeds} training seed{'s' * (seeds != 1)}, scored "
        f"on {evaluation.num_samples:,} samples in the features of "
        f"{' and '.join(evaluation.extractors)}."
    )


def finding(content: Content) -> Markup | None:
    """The leader in each feature space, and how reliable the lead is."""
    leaders: dict[str, list[Markup]] = {}
    scores = content.summary.scores.dropna(subset="mean")
    scores = scores[scores.student.isin(content.experiment.students)]
    for extractor, column in content.main.items():
        metric = main_metric_in(content.experiment, extractor)
        higher, rows = metric.higher_is_better, scores[scores.column == column]
        title = f"{'Highest' if higher else 'Lowest'} {metric.label}"
        for row in rows.sort_values("mean", ascending=not higher, kind="stable")[:1].itertuples():
            value = minus(spread_text(row.mean, row.std))
            text = Markup("<strong>{}</strong> in {} ({})").format(row.student, extractor, value)
            leaders.setdefault(title, []).append(text)
    if not leaders:
        return None
    reliability = (
        "The ranks show which leads exceed the noise."
        if content.is_ranked
        else "No ranks are given: they need at least three training seeds and intervals of the "
        "differences that exclude zero."
    )
    texts = [Markup("{}: {}.").format(k, Markup(" and ").join(v)) for k, v in leaders.items()]
    return Markup(" ").join([*texts, reliability])


def facts(content: Content) -> dict[str, str]:
    m, device, final = content.manifest, content.manifest["device"], content.final
    seeds = sorted(final.sample_seed.dropna().unique())
    processor = device["processor"] if device["used"] == "cpu" else device["used"]
    return {
        "Reference": ", ".join(final.reference.dropna().unique()) or "missing",
        "Training seeds": ", ".join(map(str, sorted(content.experiment.training.seeds))),
        "Sampling seeds": ", ".join(map(str, seeds)) or "none",
        "Device": f"{processor}, {device['usable_cpus']} CPUs",
        "Commit": f"{(m['commit'] or 'unknown')[:10]}{', modified' * bool(m['dirty'])}",
        "Written": m["written"][:16].replace("T", " ") + " UTC",
    }


# -- sections -----------------------------------------------------------------------------------


def scores(content: Content) -> Iterator[Markup]:
    fixed = int(content.summary.students.student.isin(content.experiment.reference_rows).sum())
    every = students_table(content, list(content.summary.columns.index))
    table = students_table(content, summary_columns(content))
    hidden = [h for h in table if "best of" in h or h in ("seeds", "parameters", "frozen")]
    caption = (
        "Mean ± standard deviation over training seeds; below it the sampling error of one "
        "evaluation. data-free: trained without real images. The teacher's rows and the floor "
        "(real held-out images, at their own number) give the scale. Click a heading to sort the "
        "students."
    )
    yield html.datatable(table.drop(columns=hidden), caption, fixed)
    present = " ".join(content.final.flag.dropna().unique())
    for flag, (mark, meaning) in FLAGS.items():
        if flag in present:
            yield html.text(f"{mark} {meaning}.")
    caption = "All columns of tables/summary.csv."
    yield html.details("All metrics", html.datatable(every, caption, fixed))
    finals = [
        (extractor, "", chart)
        for extractor in content.main
        if (chart := quality.final_chart(content.experiment, content.final, extractor))
    ]
    if finals:
        yield html.heading("Final score of every training seed")
        yield html.text(
            "One mark per seed, with two standard errors of the sampling to each side. The spread "
            "of the marks in a row is the spread of training."
        )
        yield html.charts(finals)


def summary_columns(content: Content) -> list[str]:
    """The main columns; recall, accuracy and the floor's column of the first extractor that is
    available."""
    scored, count = set(content.table.extractor), content.experiment.evaluation.num_samples
    first = next((name for name in content.main if name in scored), next(iter(content.main)))
    names = [column_name(m, METRICS[m].count(count), first) for m in ("recall", "accuracy")]
    floor = content.final[(content.final.student == "floor") & (content.final.extractor == first)]
    floor = floor[floor.metric == main_metric_in(content.experiment, first).name]
    names = dict.fromkeys([*content.main.values(), *names, *floor.column])
    return [name for name in names if name in content.summary.columns.index]


def students_table(content: Content, columns: list[str]) -> pd.DataFrame:
    """`text_table` with sampling errors, and notes below the students' names."""

    def heading(column, part: str = "") -> Markup:
        metric, count = METRICS[column.metric], column.num_samples
        size = f", n {count:,}" if count != content.experiment.evaluation.num_samples else ""
        label = part or metric.label + metric.arrow.replace(" ", "\u00a0")
        note = f"{metric.label}, {column.extractor}" if part else column.extractor
        return html.noted(label, note + size)

    def score(row) -> str:
        if row.status != "ok":
            return row.status
        text = flagged(minus(spread_text(row.mean, row.std)), row.flag)
        error = row.sampling_std if pd.notna(row.sampling_std) else row.stderr
        if text == MISSING or not pd.notna(error):
            return text
        return html.noted(text, f"± {minus(format(error, '.1g' if error < 1 else '.3g'))}")

    table = text_table(content.summary, columns, content.is_ranked, score, heading)
    students = content.summary.students
    notes = students.data_free.map({"yes": "data-free"}).fillna("")
    notes = notes.where(students.status == "ok", students.status)
    names = list(map(html.noted, students.student, notes))
    table.insert(0, "student", pd.Series(names, table.index, dtype=object))
    return table.drop(columns=["data-free", "status"], errors="ignore")


def curves(content: Content) -> Iterator[Markup]:
    names, scored = list(content.experiment.students), set(content.table.student)
    metrics = quality.drawn_metrics(content.experiment, content.table)
    if not metrics or not scored & set(names):
        return
    yield html.text(
        "Lines are means over training seeds; bands reach from the lowest to the highest seed. "
        "Dotted lines: the teacher with all its steps and with one. Click a student to highlight "
        "it in all charts."
    )
    marks = zip(names, cycle(charts.COLOURS), cycle(charts.GLYPHS))
    yield html.legend([mark for mark in marks if mark[0] in scored], buttons=True)
    for axis, title in (("images", "At equal images"), ("flops", "At equal compute")):
        yield html.heading(title)
        drawn = []
        for metric, extractor in metrics:
            chart = quality.chart(content.experiment, content.table, axis, metric, extractor)
            note = f"{extractor}, {quality.direction(metric)}"
            drawn.append((METRICS[metric].label, note, chart))
        yield html.charts(drawn)


def sample_rows(content: Content) -> Iterator[Markup]:
    texts = samples.prompt_texts(content.experiment)
    images, conditions = samples.select_samples(content.samples, texts)
    if not images:
        return
    kind, seed = "prompt" if texts else "class", content.experiment.training.seeds[0]
    yield html.text(
        f"The noise{f' and the {kind}' if conditions else ''} are the same down each column, so "
        f"the differences are those of the methods. Training seed {seed}; the samples are not "
        "selected."
    )
    rows = [(kind, kind, conditions, {})] if conditions else []
    rows += [(n, "", [], {f"{len(row)} images by {n}": row}) for n, row in images.items()]
    yield html.strips(rows, max(map(len, images.values())))


def neighbours(content: Content) -> Iterator[Markup]:
    found, description = samples.nearest_neighbours(content.samples)
    if not found:
        return
    count = max(len(row.images) for row in found.values())
    yield html.text(
        f"For each method, the {count} samples (training seed "
        f"{content.experiment.training.seeds[0]}, first sampling seed) that resemble a training "
        f"image most, and below each its {description}. The row floor shows real held-out images: "
        "the distances that occur without copying."
    )
    note, rows = Markup("above: samples<br>below: training images"), []
    for name, row in found.items():
        distances = [f"{distance:.2f}" for distance in row.distance]
        alt = (
            f"The {len(row.images)} images of {name} nearest to a training image, at distances "
            f"{distances[0]} to {distances[-1]}"
        )
        images = {alt: row.images, "The nearest training images": row.training}
        rows.append((html.noted(name, note), "", distances, images))
    yield html.strips(rows, count)


def training(content: Content) -> Iterator[Markup]:
    logs = health.training_logs(content.experiment, content.table)
    if not logs:
        return
    rows = []
    for student, seed, log in [(s, *run) for s in logs for run in logs[s].groupby("seed")]:
        record = training_record(content.experiment, student, seed)
        ledger, skipped = record.ledger, sum(record.skipped_steps.values())
        row = {
            "student": student,
            "seed": seed,
            "stopped at": f"{record.stop.amount:,.0f} {record.stop.unit}",
            "images": f"{ledger.images:,}",
            "TFLOPs": number_text(ledger.flops, scale=1e12),
            "skipped steps": html.marked(f"{skipped:,}", "warning") if skipped else "0",
            "images/s": number_text(log.images_per_second.median()),
            "seconds": f"{ledger.seconds:,.0f}",
            "peak GiB": number_text(ledger.peak_memory, ".2f", 2**30),
            "device": record.device,
            "weights (sha256)": hash_code(record.sha256),
        }
        rows.append(row)
    caption = "One row per run. Non-finite steps are skipped and counted."
    yield html.datatable(pd.DataFrame(rows), caption)
    yield html.heading("Losses and gradient norms")
    yield html.text(
        "One line per training seed. Losses of different methods have different units: compare "
        "their shapes, not their heights."
    )
    phases = health.phases_of(logs)
    marks = [(spaced(p), c, "━") for p, c in zip(phases, cycle(health.COLOURS))]
    yield html.legend(marks, buttons=False)
    drawn = [
        (student, health.PANELS[prefix], health.chart(student, log, phases, prefix))
        for student, log in logs.items()
        for prefix in ("loss/", "grad_norm/")
    ]
    yield html.charts(drawn, "small")


def read_table(content: Content, name: str, columns: str) -> pd.DataFrame:
    """tables/<name>.csv of another stage, which must have some columns; empty if it does not
    exist."""
    path = content.experiment.paths.tables / f"{name}.csv"
    if not path.exists():
        return pd.DataFrame()
    try:
        table = pd.read_csv(path)
        table[columns.split()]
    except (ValueError, KeyError) as error:  # pandas' own errors are ValueErrors
        raise UserError(
            f"{path} cannot be read ({error}); delete it and run the workflow again", "damaged"
        ) from None
    return table


def claims(content: Content) -> Iterator[Markup]:
    table = read_table(
        content, "claims", "claim source reported better worse column difference low high verdict"
    )
    if table.empty:
        return
    counts = ", ".join(f"{count} {name}" for name, count in table.verdict.value_counts().items())
    yield html.text(
        "What each paper reports, and the difference between the same two students here, with its "
        f"interval ({counts}). {multiplicity_note(table)}"
    )
    marks, rows = {"supported": "✓", "contradicted": "✗"}, []
    for row in table.itertuples():
        verdict = html.marked(f"{marks.get(row.verdict, '?')} {row.verdict}", row.verdict)
        note = f"{row.better} − {row.worse}, {row.column}"
        difference = html.noted(" ".join(interval_text(row)), note)
        rows.append((row.claim, verdict, difference, f"{row.reported} ({row.source})"))
    columns = ["claim", "verdict", "difference here", "reported"]
    yield html.datatable(pd.DataFrame(rows, columns=columns), kind="sortable wrap")


def pairwise(content: Content) -> Iterator[Markup]:
    table = read_table(content, "pairwise", "column a b difference low high verdict")
    if table.empty:
        return
    yield html.text(
        "Row minus column, with the interval of the difference, which includes the sampling and "
        "the training error. ▲ the row is better, ▼ it is worse; all other pairs are ties or have "
        "too few training seeds."
    )
    columns = [column for column in content.main.values() if (table.column == column).any()]
    for column in columns or table.column.unique()[:1]:
        yield html.heading(column)
        yield html.datatable(difference_matrix(table[table.column == column]), kind="matrix")
    yield html.details("All pairs and columns", html.datatable(csv_text(table)))


def difference_matrix(pairs: pd.DataFrame) -> pd.DataFrame:
    """Row minus column of every two students, with the verdict."""
    verdict = pairs.verdict.replace({"a better": "b better", "b better": "a better"})
    swapped = pairs.rename(columns={"a": "b", "b": "a"}).assign(verdict=verdict)
    swapped = swapped.assign(difference=-pairs.difference, low=-pairs.high, high=-pairs.low)
    marks = {"a better": ("▲ ", "better"), "b better": ("▼ ", "worse")}
    both, cells = pd.concat([pairs, swapped]), []
    for row in both.itertuples():
        (mark, kind), (difference, bounds) = marks.get(row.verdict, ("", "")), interval_text(row)
        cells.append(html.marked(html.noted(mark + difference, bounds), kind))
    names = list(dict.fromkeys([*pairs.a, *pairs.b]))
    matrix = both.assign(cell=cells).pivot(index="a", columns="b", values="cell")
    matrix = matrix.reindex(index=names, columns=names).fillna("")
    return matrix.rename_axis("row − column").reset_index()


def agreement(content: Content) -> Iterator[Markup]:
    table = read_table(
        content, "agreement", "quantity extractor library relative_difference agrees"
    )
    if table.empty:
        return
    # Other values of `agrees` give the reason for a missing number.
    compared, failed = table[table.agrees.isin(["yes", "no"])], table[table.agrees == "no"]
    text = f"{len(compared) - len(failed)} of {len(compared)} quantities agree within tolerance"
    largest = compared.relative_difference.astype(float).abs().max()
    if pd.notna(largest):
        text += f"; the largest relative difference is {largest:.1e}"
    yield html.text(f"{text}.", "")
    if len(failed):
        names = [f"{r.quantity} in {r.extractor} ({r.library})" for r in failed.itertuples()]
        yield html.text(f"✗ Different: {', '.join(names)}.", "warning")
    marks = table.agrees.map({"yes": "✓ yes", "no": "✗ no"}).fillna(table.agrees)
    caption = "The same images, scored here and by each library."
    yield html.datatable(csv_text(table.assign(agrees=marks)), caption)


def paper(content: Content) -> Iterator[Markup]:
    table = read_table(content, "paper", "paper method metric reported reproduced")
    if not table.empty:
        caption = "Reported: as in each source. Difference: reproduced minus reported."
        yield html.datatable(csv_text(table), caption)


def protocol(content: Content) -> Iterator[Markup]:
    """The notes, what all columns' protocols share, and a table of their differences."""
    students = {}
    for text in content.summary.notes:
        note = Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))
        name, _, rest = note.partition(": ")
        if name in content.experiment.students:
            students[name] = rest
        else:
            yield html.text(note, "")
    protocols = content.manifest["protocols"]
    used = content.final[content.final.protocol.isin(protocols)].drop_duplicates("column")
    hashes = used.set_index("column").protocol.reindex(content.summary.columns.index).dropna()
    records = {column: flatten(protocols[value]) for column, value in hashes.items()}
    table = as_text(pd.DataFrame.from_dict(records, orient="index", dtype=object))
    shared = [key for key in table if table[key].nunique() == 1]
    yield html.facts({spaced(key): table[key].iloc[0] for key in shared})
    table = table.drop(columns=[*shared, "metric", "extractor", "num_samples"], errors="ignore")
    settings = table.filter(like="settings.")
    table = table.drop(columns=settings).rename(columns=spaced)
    table = table.replace(r"^([0-9a-f]{12})[0-9a-f]{52}$", r"\1", regex=True)
    table["settings"] = [
        "; ".join(f"{spaced(k[9:])} {v}" for k, v in row.items() if v != MISSING) or MISSING
        for row in settings.to_dict("records")
    ]
    table["protocol"] = hashes.map(hash_code)
    caption = "Each column has one protocol; its hash is in every row of metrics.csv."
    yield html.datatable(table.rename_axis("column").reset_index(), caption)
    features = [
        {
            "network": name,
            "role": "scores" if name in content.main else "trains students",
            "held-out accuracy, %": number_text(record.get("held_out_accuracy"), scale=0.01),
            "weights (sha256)": hash_code(record.get("sha256")),
        }
        for name, record in content.manifest["features"].items()
    ]
    caption = "Feature networks that score, and those that students were trained against."
    yield html.datatable(pd.DataFrame(features), caption)
    if students:
        yield html.heading("Students, their deviations and settings")
        yield html.facts(students, "wide")


def provenance(content: Content) -> Iterator[Markup]:
    m = content.manifest
    items = {
        "Command": m["command"],
        "Commit": f"{m['commit'] or 'unknown'}{' (with local changes)' * bool(m['dirty'])}",
        "Python": m["python"],
        "Device": ", ".join(f"{spaced(key)} {value}" for key, value in m["device"].items()),
        "Packages": ", ".join(f"{name} {value}" for name, value in m["packages"].items()),
    }
    yield html.facts(items)
    config = yaml.safe_dump(m["config"], sort_keys=False, allow_unicode=True)
    text = Markup('<pre tabindex="0">{}</pre>').format(config)
    yield html.details("The resolved configuration", text)
    yield html.details("Files of the results, with their sha256", html.facts(m["outputs"]))


SECTIONS = (  # a generator `Content` -> HTML parts, whose name is the section's id
    ("Summary", scores),
    ("Quality against budget", curves),
    ("Samples", sample_rows),
    ("Nearest training images", neighbours),
    ("Training health", training),
    ("Claims of the papers", claims),
    ("Pairwise differences", pairwise),
    ("Agreement with libraries", agreement),
    ("Published numbers", paper),
    ("Protocol", protocol),
    ("Provenance", provenance),
)
