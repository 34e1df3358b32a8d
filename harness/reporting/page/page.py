"""report.html: an experiment's results on one self-contained page.

Each section is a generator of HTML parts, which the macros of parts.html.j2 make from data frames,
charts and images. A section without parts is left out.
"""

import re
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import pandas as pd
import yaml
from markupsafe import Markup, escape

from harness.config.experiment import Experiment
from harness.evaluation.registry import METRICS
from harness.io.artifacts import damaged, write_text
from harness.reporting import collect, cost_to_reach, formatting
from harness.reporting.claims import multiplicity_note
from harness.reporting.figures import costs as cost_charts
from harness.reporting.figures import health, quality, samples
from harness.reporting.formatting import MISSING, minus, number_text, spread_text
from harness.reporting.page.lead import header
from harness.reporting.page.parts import ENVIRONMENT, Content, csv_table, html, spaced
from harness.reporting.tables import Summary, headline_columns, text_table


# With pyarrow installed, pandas would turn the markup in tables into plain texts.
@pd.option_context("mode.string_storage", "python")
def write_page(experiment: Experiment, table: pd.DataFrame, summary: Summary, record: dict) -> Path:
    """Write report.html from `collect`'s table, its summary and the manifest; returns its path."""
    import vl_convert

    content, sections = Content(experiment, table, summary, record), []
    for title, make in SECTIONS:
        tables = [read_table(experiment, make)] if make in TABLES else []
        parts = list(make(content, *tables)) if all(map(len, tables)) else []
        if parts:
            sections.append((make.__name__, title, Markup("\n").join(parts)))
    start = Markup("\n").join(header(content))
    script = Markup(vl_convert.javascript_bundle().replace("</script", "<\\/script"))
    template, path = ENVIRONMENT.get_template("page.html.j2"), experiment.paths.root / "report.html"
    text = template.render(name=experiment.name, header=start, sections=sections, script=script)
    write_text(path, text)
    return path


def read_table(experiment: Experiment, section: Callable) -> pd.DataFrame:
    """The table of a section of TABLES; empty if it does not exist."""
    path, columns = experiment.paths.tables / f"{section.__name__}.csv", TABLES[section].split()
    try:
        table = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=columns)
        table[columns]
    except (ValueError, KeyError) as error:  # pandas' own errors are ValueErrors
        raise damaged(path, str(error), owner=path) from None
    return table


def scores(content: Content) -> Iterator[Markup]:
    experiment, columns = content.experiment, content.summary.columns
    fixed = int(content.summary.students.student.isin(experiment.reference_rows).sum())
    # The main columns, other columns of the headline, metrics of plug-ins.
    own = columns.index[columns.main & columns.metric.map(METRICS.plugin).notna()]
    headline = headline_columns(experiment, content.summary)
    names = dict.fromkeys([*content.main.values(), *headline, *own])
    table = students_table(content, [name for name in names if name in columns.index])
    hidden = [h for h in table if "best of" in h or h in ("seeds", "parameters", "frozen")]
    caption = (
        "Mean ± standard deviation over training seeds; below it the sampling error of one "
        "evaluation. data-free: trained without real images. The teacher's rows and the floor "
        "(real held-out images, at their own number) give the scale. Click a heading to sort the "
        "students."
    )
    yield html.datatable(table.drop(columns=hidden), caption, fixed, "sortable key")
    present = " ".join(content.final.flag.dropna().unique())
    for flag, (mark, meaning) in formatting.FLAGS.items():
        if flag in present:
            yield html.text(f"{mark} {meaning}.")
    every = students_table(content, list(columns.index))
    every = html.datatable(every, "All columns of tables/summary.csv.", fixed)
    yield html.details("All metrics", every)

    drawn = [(x, "", quality.final_chart(experiment, content.final, x)) for x in content.main]
    if drawn := [drawing for drawing in drawn if drawing[2]]:
        yield html.heading("Final score of every training seed")
        yield html.text(
            "One mark per seed, with two standard errors of the sampling to each side. The spread "
            "of the marks in a row is the spread of training."
        )
        yield html.charts(drawn)


def cost_cell(units: dict[str, str]) -> Markup | str:
    """TFLOPs to reach a level, with images and seconds below."""
    if "seed" in units["flops"] or units["flops"] == "not reached":
        return units["flops"]
    return html.noted(units["flops"], f"{units['images']} images, {units['seconds']} s")


def students_table(content: Content, columns: list[str]) -> pd.DataFrame:
    """`text_table` with sampling errors, and notes below the students' names."""

    def heading(column, part: str = "") -> Markup:
        metric, count = METRICS[column.metric], column.num_samples
        size = f", n {count:,}" if count != content.experiment.evaluation.num_samples else ""
        label = part or metric.label + metric.arrow.replace(" ", "\u00a0")
        return html.noted(label, f"{metric.label}, " * bool(part) + column.extractor + size)

    def score(row) -> str:
        if row.status != "ok":
            return row.status
        text = formatting.flagged(minus(spread_text(row.mean, row.std)), row.flag)
        error = row.sampling_std if pd.notna(row.sampling_std) else row.stderr
        if text == MISSING or pd.isna(error):
            return text
        return html.noted(text, f"± {minus(format(error, '.1g' if error < 1 else '.3g'))}")

    table = text_table(content.summary, columns, content.is_ranked, score, heading, cost_cell)
    students = content.summary.students
    notes = students.data_free.map({"yes": "data-free"}).fillna("")
    notes = notes.where(students.student != "floor", "real images, held out")
    notes = notes.where(students.status == "ok", students.status)
    names = list(map(html.noted, students.student, notes))
    table.insert(0, "student", pd.Series(names, table.index, dtype=object))
    return table.drop(columns=["data-free", "status"], errors="ignore")


def costs(content: Content) -> Iterator[Markup]:
    table = content.summary.costs
    if not (table.reached > 0).any():
        return
    experiment, seconds = content.experiment, cost_to_reach.seconds_heading(content.table)
    yield html.text(f"{cost_to_reach.reading(seconds)} Hollow marks: some seeds reach the level.")
    yield content.legend()
    unit_names = {
        "images": "Images",
        "flops": "TFLOPs",
        "seconds": seconds[0].upper() + seconds[1:],
    }
    for column, rows in table.groupby("column", sort=False):
        metric = METRICS[content.summary.columns.metric[column]]
        yield html.heading(f"{metric.label} in {content.summary.columns.extractor[column]}")
        teachers = cost_to_reach.teacher_scores(experiment, content.table, column)
        missed = {name: x for name, x in teachers.items() if x not in set(rows.level)}
        for name, value in missed.items():
            yield html.text(f"No student reaches the {name}'s {minus(spread_text(value))}.")
        drawn = rows[rows.reached > 0]
        yield html.charts(
            (
                unit_names[unit],
                f"to reach each {metric.label}",
                cost_charts.chart(experiment, rows, metric, unit, seconds),
            )
            for unit in drawn.unit.unique()
        )
        sign, cells = cost_to_reach.sign(metric), {}
        for level in dict.fromkeys(rows.level):
            texts = cost_to_reach.level_texts(rows, column, level, bounds=True)
            heading = f"{sign} {formatting.rounded_text(level)}"
            cells[heading] = {name: cost_cell(units) for name, units in texts.items()}
        caption = f"TFLOPs; below them images and {seconds}."
        yield html.datatable(
            pd.DataFrame(cells, dtype=object).rename_axis("student").reset_index(), caption, kind=""
        )


def curves(content: Content) -> Iterator[Markup]:
    parts = []
    for axis, title in (("images", "At equal images"), ("flops", "At equal compute")):
        drawn = []
        for metric, extractor in quality.drawn_metrics(content.experiment, content.table, axis):
            chart = quality.chart(content.experiment, content.table, axis, metric, extractor)
            note = f"{extractor}, {quality.direction(metric)}"
            drawn.append((METRICS[metric].label, note, chart))
        parts += [html.heading(title), html.charts(drawn)] if drawn else []
    if not parts:
        return
    yield html.text(
        "Lines are means over training seeds; bands reach from the lowest to the highest seed. "
        "Dotted lines: the teacher with all its steps and with one, and the floor where it has the "
        "same number of samples. Click a student to highlight it in all charts."
    )
    yield content.legend()
    yield from parts


def sample_rows(content: Content) -> Iterator[Markup]:
    grid = samples.select_samples(content.experiment, content.samples)
    if not grid.images:
        return
    yield html.text(
        f"The noise{f' and the {grid.kind}' if grid.conditions else ''} are the same down each "
        "column, so the differences are those of the methods. Training seed "
        f"{content.experiment.training.seeds[0]}; the samples are not selected."
    )
    rows = [(grid.kind, grid.headings, {})] if grid.conditions else []
    rows += [(n, [], {f"{len(row)} images by {n}": row}) for n, row in grid.images.items()]
    yield html.strips(rows, max(map(len, grid.images.values())))
    if grid.is_numbered:
        yield html.numbered(grid.conditions)


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
        alt = f"The {len(row.images)} images of {name} nearest to a training image, at distances "
        alt += f"{distances[0]} to {distances[-1]}"
        images = {alt: row.images, "The nearest training images": row.training}
        rows.append((html.noted(name, note), distances, images))
    yield html.strips(rows, count)


def training(content: Content) -> Iterator[Markup]:
    logs, rows = health.training_logs(content.experiment, content.table), []
    if not logs:
        return
    for student, seed, log in [(s, *run) for s in logs for run in logs[s].groupby("seed")]:
        record = collect.training_record(content.experiment, student, seed)
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
            "device": record.device_name or record.device,
            "weights (sha256)": html.hash(record.sha256),
        }
        rows.append(row)
    caption = "One row per run. Non-finite steps are skipped and counted."
    yield html.datatable(pd.DataFrame(rows), caption)
    phases = health.phases_of(logs)
    drawn = [
        (student, health.PANELS[prefix], health.chart(student, log, phases, prefix))
        for student, log in logs.items()
        for prefix in ("loss/", "grad_norm/")
        if health.has_curve(log)
    ]
    if not drawn:
        return
    yield html.heading("Losses and gradient norms")
    yield html.text(
        "One line per training seed. Losses of different methods have different units: compare "
        "their shapes, not their heights."
    )
    marks = [(spaced(p), c, "━") for p, c in zip(phases, cycle(health.COLOURS))]
    yield html.legend(marks, buttons=False)
    yield html.charts(drawn, "small")


def claims(content: Content, table: pd.DataFrame) -> Iterator[Markup]:
    counts = ", ".join(f"{count} {name}" for name, count in table.verdict.value_counts().items())
    yield html.text(
        "What each paper reports, and the difference between the same two students here, with its "
        f"interval ({counts}). {multiplicity_note(table)}"
    )
    marks, rows = {"supported": "✓", "contradicted": "✗"}, []
    for row in table.itertuples():
        mark, note = marks.get(row.verdict, "?"), f"{row.better} − {row.worse}, {row.column}"
        verdict = html.marked(f"{mark} {row.verdict}", row.verdict)
        difference = html.noted(" ".join(formatting.interval_text(row)), note)
        rows.append((row.claim, verdict, difference, f"{row.reported} ({row.source})"))
    columns = ["claim", "verdict", "difference here", "reported"]
    yield html.datatable(pd.DataFrame(rows, columns=columns), kind="sortable wrap")


def pairwise(content: Content, table: pd.DataFrame) -> Iterator[Markup]:
    text = "Row minus column. With one training seed there is no interval, and nothing is ranked."
    if table.training_seeds.max() > 1:
        text = (
            "Row minus column, with the interval of the difference, which includes the sampling "
            "and the training error. ▲ the row is better, ▼ it is worse; all other pairs are ties "
            "or have too few training seeds."
        )
    yield html.text(text)
    compared = table.column.unique()
    for column in [c for c in content.main.values() if c in compared] or compared[:1]:
        yield html.heading(column)
        yield html.datatable(difference_matrix(table[table.column == column]), kind="matrix")
    yield html.details("All pairs and columns", csv_table(table))


def difference_matrix(pairs: pd.DataFrame) -> pd.DataFrame:
    """Row minus column of every two students, with the verdict."""
    names = list(dict.fromkeys([*pairs.a, *pairs.b]))
    matrix = pd.DataFrame("", names, names, dtype=object)
    marks = {"a better": ("▲ ", "better"), "b better": ("▼ ", "worse")}
    swapped = pairs.assign(a=pairs.b, b=pairs.a, low=-pairs.high, high=-pairs.low)
    verdict = pairs.verdict.replace({"a better": "b better", "b better": "a better"})
    swapped = swapped.assign(difference=-pairs.difference, verdict=verdict)
    for row in pd.concat([pairs, swapped]).itertuples():
        mark, kind = marks.get(row.verdict, ("", ""))
        difference, bounds = formatting.interval_text(row)
        matrix.at[row.a, row.b] = html.marked(html.noted(mark + difference, bounds), kind)
    return matrix.rename_axis("row − column").reset_index()


def agreement(content: Content, table: pd.DataFrame) -> Iterator[Markup]:
    # Other values of `agrees` give the reason for a missing number.
    compared, failed = table[table.agrees.isin(["yes", "no"])], table[table.agrees == "no"]
    largest = compared.relative_difference.astype(float).abs().max()
    most = f"; the largest relative difference is {largest:.1e}" if pd.notna(largest) else ""
    agreed, count = len(compared) - len(failed), len(compared)
    yield html.text(f"{agreed} of {count} quantities agree within tolerance{most}.", "")
    if len(failed):
        names = [f"{r.quantity} in {r.extractor} ({r.library})" for r in failed.itertuples()]
        yield html.text(f"✗ Different: {', '.join(names)}.", "warning")
    table = table.assign(agrees=table.agrees.replace({"yes": "✓ yes", "no": "✗ no"}))
    yield csv_table(table, "The same images, scored here and by each library.")


def paper(content: Content, table: pd.DataFrame) -> Iterator[Markup]:
    yield csv_table(table, "Reported: as in each source. Difference: reproduced minus reported.")


def protocol(content: Content) -> Iterator[Markup]:
    """The notes, what all columns' protocols share, and a table of their differences."""
    students, protocols = {}, content.manifest["protocols"]
    for text in content.summary.notes:
        note = Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))
        name, _, rest = note.partition(": ")
        if name in content.experiment.students:
            students[name] = rest
        else:
            yield html.text(note, "")

    hashes = content.final.drop_duplicates("column").set_index("column").protocol
    hashes = hashes[hashes.isin(protocols)].reindex(content.summary.columns.index).dropna()
    records = {column: collect.flatten(protocols[value]) for column, value in hashes.items()}
    table = formatting.as_text(pd.DataFrame.from_dict(records, orient="index", dtype=object))
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
    # As objects: a column of text would lose the markup.
    table["protocol"] = pd.Series(list(map(html.hash, hashes)), hashes.index, dtype=object)
    caption = "Each column has one protocol; its hash is in every row of metrics.csv."
    yield html.datatable(table.rename_axis("column").reset_index(), caption)

    scoring = content.experiment.evaluation.extractors
    features = [
        {
            "network": name,
            "role": "scores" if name in scoring else "trains students",
            "held-out accuracy, %": number_text(record.get("held_out_accuracy"), scale=0.01),
            "weights (sha256)": html.hash(record.get("sha256")),
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


SECTIONS = (  # title, generator of HTML parts, whose name is the section's id
    ("Summary", scores),
    ("What a score costs", costs),
    ("Quality against budget", curves),
    ("Claims of the papers", claims),
    ("Pairwise differences", pairwise),
    ("Published numbers", paper),
    ("Samples", sample_rows),
    ("Nearest training images", neighbours),
    ("Training health", training),
    ("Agreement with libraries", agreement),
    ("Protocol", protocol),
    ("Provenance", provenance),
)
TABLES = {  # sections that show tables/<name>.csv -> the columns that they need
    claims: "claim source reported better worse column difference low high verdict",
    pairwise: "column a b difference low high verdict",
    agreement: "quantity extractor library relative_difference agrees",
    paper: "paper method metric reported reproduced",
}
