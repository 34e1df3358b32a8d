"""The lead of the page: the best student, its margin, its cost, and how far to trust it."""

from collections.abc import Iterator
from typing import NamedTuple

import pandas as pd
from markupsafe import Markup

from harness.config.experiment import Experiment
from harness.evaluation.registry import Metric
from harness.io.records import DataRecord
from harness.reporting import collect, cost_to_reach, formatting
from harness.reporting.cost_to_reach import UNITS
from harness.reporting.formatting import listed, minus, spread_text
from harness.reporting.intervals import LEVEL, TRAINING_SEEDS
from harness.reporting.page.parts import Content, html

SPENT = (("images", "{:,.0f}", 1), ("flops", "{:.3g}", 1e12), ("seconds", "{:,.0f}", 1))


class Lead(NamedTuple):
    """The best student in an extractor's main column."""

    extractor: str
    column: str
    metric: Metric
    leader: str
    score: str
    second: str | None  # the next student
    difference: float  # by which the leader is better than the second, positive
    low: float  # its interval; NaN if unknown
    high: float
    verdict: str  # of the pair: "better", "tie", "not ranked"
    seeds: int  # training seeds of both


def leads(content: Content) -> list[Lead]:
    """One lead per extractor with scores."""
    experiment, summary, found = content.experiment, content.summary, []
    scores = summary.scores.dropna(subset="mean")
    scores = scores[scores.student.isin(list(experiment.students))]
    for extractor, column in content.main.items():
        metric = collect.main_metric_in(experiment, extractor)
        rows = scores[scores.column == column]
        rows = rows.sort_values("mean", ascending=not metric.higher_is_better, kind="stable")
        if rows.empty:
            continue
        first = rows.iloc[0]
        score = minus(spread_text(first["mean"], first["std"]))
        found.append(
            Lead(
                extractor,
                column,
                metric,
                first.student,
                score,
                *_margin(summary.pairs, rows, metric),
            )
        )
    return found


def _margin(pairs: pd.DataFrame, rows: pd.DataFrame, metric: Metric) -> tuple:
    """The fields of `Lead` from `second` on. rows: the scores of a column, best first."""
    nan = float("nan")
    if len(rows) < 2:
        return None, nan, nan, nan, "not ranked", 0
    first, second = rows.iloc[0], rows.iloc[1]
    names = [first.student, second.student]
    pairs = pairs[(pairs.column == first.column) & pairs.a.isin(names) & pairs.b.isin(names)]
    if pairs.empty or pd.isna(pairs.difference.iloc[0]):
        return second.student, abs(first["mean"] - second["mean"]), nan, nan, "not ranked", 0
    pair = pairs.iloc[0]
    # The difference is a - b; a lead is positive where it is better.
    sign = 1 if (pair.a == first.student) == bool(metric.higher_is_better) else -1
    low, high = sorted((sign * pair.low + 0.0, sign * pair.high + 0.0))  # 0.0, not -0.0
    verdict = "better" if pair.verdict.endswith("better") else pair.verdict
    return (
        second.student,
        sign * pair.difference + 0.0,
        low,
        high,
        verdict,
        int(pair.training_seeds),
    )


def _strong(text: str) -> Markup:
    return Markup("<strong>{}</strong>").format(text)


def _best(found: list[Lead], content: Content) -> Iterator[Markup]:
    agreed = len({lead.leader for lead in found}) == 1
    if agreed:
        yield _strong(found[0].leader)
    for lead in found:
        name = "" if agreed else Markup("{} – ").format(_strong(lead.leader))
        yield Markup("{}{} {} in {}").format(name, lead.metric.label, lead.score, lead.extractor)
    lead = found[0]
    values = cost_to_reach.teacher_scores(content.experiment, content.table, lead.column)
    for teacher, value in values.items():
        yield Markup("{}, with all its steps: {}").format(teacher, minus(spread_text(value)))


def _margins(found: list[Lead]) -> Iterator[Markup]:
    verdicts = {
        "better": "The interval excludes 0.",
        "tie": "A tie: the interval contains 0.",
        "not ranked": "Not ranked: too few training seeds.",
    }
    if all(lead.seeds == 1 for lead in found if lead.second is not None):
        verdicts["not ranked"] = "Not ranked, and no interval: there is one training seed."
    agreed = len({lead.leader for lead in found}) == 1
    for lead, following in zip(found, [*found[1:], None], strict=True):
        if lead.second is None:
            yield Markup("The only student with scores.")
            continue
        row = pd.Series({"difference": lead.difference, "low": lead.low, "high": lead.high})
        margin, bounds = formatting.interval_text(row)
        where = f" in {lead.extractor}" if len(found) > 1 else ""
        interval = f", {LEVEL:.0%} interval {bounds.strip('()')}" if "to" in bounds else ""
        is_last = following is None or following.verdict != lead.verdict
        verdict = f" {verdicts.get(lead.verdict, '')}" if is_last else ""
        subject = "" if agreed else f"{lead.leader} "
        text = Markup("{}{} ahead of {}{}{}.{}")
        margin = _strong(margin.lstrip("+"))
        yield text.format(subject, margin, lead.second, where, interval, verdict)


def _costs(found: list[Lead], content: Content) -> Iterator[Markup]:
    lead, summary = found[0], content.summary
    seconds = cost_to_reach.seconds_heading(content.table)
    headings = {unit: heading for unit, (heading, _) in UNITS.items()} | {"seconds": seconds}
    student = summary.students.set_index("student").loc[lead.leader]
    spent = [
        f"{form.format(student[unit] / scale)} {unit if scale == 1 else 'TFLOPs'}"
        for unit, form, scale in SPENT
        if pd.notna(student[unit])
    ]
    if spent:
        yield Markup("{}: {}").format(_strong(lead.leader), ", ".join(spent))
    equal = cost_to_reach.equal_compute(content.experiment, content.table, lead.extractor)
    if len(equal.scores) > 1 and len(summary.costs):
        names = [f"{name} {minus(spread_text(v))}" for name, v in equal.scores.iloc[1:3].items()]
        late = f"; {', '.join(equal.missing)} had no snapshot yet" if equal.missing else ""
        yield Markup("At equal compute ({} TFLOPs) {} leads: {}, then {}{}").format(
            cost_to_reach.number(equal.flops, "flops"),
            _strong(equal.scores.index[0]),
            minus(spread_text(equal.scores.iloc[0])),
            " and ".join(names),
            late,
        )
    if summary.costs.empty and lead.leader not in content.experiment.released:
        yield Markup("Scored at the end of training only: no comparison at equal compute.")
    level = cost_to_reach.shown_level(summary.costs, lead.column)
    rows = summary.costs[(summary.costs.column == lead.column) & (summary.costs.level == level)]
    complete = rows[(rows.unit == "flops") & rows.cost.notna()].sort_values("cost", kind="stable")
    if len(complete) > 1:
        name = complete.student.iloc[0]
        rows = rows[rows.student == name]
        texts = [
            f"{cost_to_reach.cost_text(r, False)} {headings[r.unit]}" for r in rows.itertuples()
        ]
        yield Markup("Cheapest to reach {}: {} ({})").format(
            f"{lead.metric.label} {formatting.rounded_text(level)}", _strong(name), ", ".join(texts)
        )


def _trust(found: list[Lead], content: Content) -> Iterator[Markup]:
    experiment, summary = content.experiment, content.summary
    compared = [lead.seeds for lead in found if lead.second is not None and lead.seeds]
    training = min([len(experiment.training.seeds), *compared])
    samplings = len(experiment.evaluation.sampling_seeds)
    trained = [s for s in experiment.students.values() if not s.source]
    seeds = f"{samplings} sampling seed{'s' * (samplings != 1)}"
    if trained:
        first = _strong(f"{training} training seed{'s' * (training != 1)}")
        few = f", too few for ranks ({TRAINING_SEEDS} are needed)" * (
            min(compared, default=TRAINING_SEEDS) < TRAINING_SEEDS
        )
        yield Markup("{}{}; {}").format(first, few, seeds)
    else:
        yield _strong(seeds)
    lead = found[0]
    if len({each.leader for each in found}) > 1:
        yield Markup("The feature networks disagree about the best student.")
    column = summary.scores[
        (summary.scores.metric == lead.metric.name) & (summary.scores.extractor == lead.extractor)
    ]
    floors = column[(column.student == "floor") & column["mean"].notna()]
    for floor in floors.itertuples():
        rows = column[(column.num_samples == floor.num_samples) & column["mean"].notna()]
        rows = rows.set_index("student")["mean"]
        same = ""
        if lead.leader in rows:
            same = f"; {lead.leader} with as many: {minus(spread_text(rows[lead.leader]))}"
        text = Markup("Floor: {} with {:,} real held-out images{}")
        yield text.format(minus(spread_text(floor.mean)), floor.num_samples, same)
    for each in found:
        row = summary.scores[
            (summary.scores.column == each.column) & (summary.scores.student == each.leader)
        ].iloc[0]
        for flag in str(row.flag or "").split():
            mark, meaning = formatting.FLAGS[flag]
            yield html.marked(f"{mark} {each.leader} in {each.extractor}: {meaning}", "warning")
    notes = [
        note for note in summary.notes if note.startswith(tuple(f"{x.column}:" for x in found))
    ]
    for note in notes:
        yield html.marked(note, "warning")
    if count := len(summary.warnings):
        text = (
            f"{count} warning{'s' * (count != 1)} above: read {'them' if count > 1 else 'it'} first"
        )
        yield html.marked(text, "warning")


def introduction(content: Content) -> str:
    """What was compared, in a sentence."""
    experiment, training = content.experiment, content.experiment.training
    trained = [s for s in experiment.students.values() if not s.source]
    students, seeds = len(trained), len(training.seeds)
    budget = ", ".join(f"{limit.amount:,.0f} {limit.unit}" for limit in training.budget)
    own = any(list(s.budget) != training.budget for s in trained)
    parts = []
    if trained:
        parts.append(
            f"{students} one-step student{'s' * (students != 1)} of the teacher "
            f"{listed(experiment.teachers)}, trained for {budget}"
            f"{' unless noted otherwise' * own} with {seeds} training seed{'s' * (seeds != 1)}"
        )
    if names := experiment.released:
        parts.append(f"Released weights, imported and not trained here: {', '.join(names)}")
    evaluation = experiment.evaluation
    return (
        f"{'. '.join(parts)}, scored on {evaluation.num_samples:,} samples in the features of "
        f"{listed(evaluation.extractors)}."
    )


def data_text(experiment: Experiment) -> str | None:
    """The prepared images: how many, their shape, and how they got it. None without a record."""
    record = DataRecord.read_optional(experiment.paths.data / "data.json")
    if record is None:
        return None
    shape = " × ".join(map(str, record.image_shape))
    counts = f"{record.train_images:,} for training, {record.held_out_images:,} held out"
    return f"{record.name}: {counts}, {shape}{f', {record.resize}' if record.resize else ''}"


def header(content: Content) -> Iterator[Markup]:
    """What was compared, problems, the four answers, and facts."""
    final, m = content.final, content.manifest
    yield html.text(introduction(content), "")
    yield html.banner(content.summary.students)
    yield html.warnings(content.summary.warnings)
    if found := leads(content):
        answers = {
            "Which student is best?": _best(found, content),
            "By how much?": _margins(found),
            "At what cost?": _costs(found, content),
            "How far to trust it?": _trust(found, content),
        }
        yield html.cards({question: list(lines) for question, lines in answers.items()})
    device, noise = m["device"], sorted(final.sample_seed.dropna().unique())
    processor = device["processor"] if device["used"] == "cpu" else device["used"]
    yield html.facts(
        {
            **({"Images": images} if (images := data_text(content.experiment)) else {}),
            "Reference": ", ".join(final.reference.dropna().unique()) or "missing",
            "Training seeds": ", ".join(map(str, sorted(content.experiment.training.seeds))),
            "Sampling seeds": ", ".join(map(str, noise)) or "none",
            "Device": f"{processor}, {device['usable_cpus']} CPUs",
            "Commit": f"{(m['commit'] or 'unknown')[:10]}{', modified' * bool(m['dirty'])}",
            "Written": m["written"][:16].replace("T", " ") + " UTC",
        }
    )
