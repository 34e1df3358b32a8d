"""The summary of an experiment (tables/summary.csv) and its pivots: comparison.{csv,md,tex},
headline.md and the terminal's table.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path

import pandas as pd

from harness.config.experiment import Experiment
from harness.data.registry import has_captions, has_texts
from harness.evaluation.checks import small_sample_warning
from harness.evaluation.registry import FRECHET, METRICS
from harness.evaluation.selection import criterion
from harness.features.base import FEATURES
from harness.reporting import collect, cost_to_reach, trust
from harness.reporting.collect import (
    column_of,
    is_unavailable,
    main_column,
    main_metric_in,
    training_record,
)
from harness.reporting.formatting import (
    FLAGS,
    MISSING,
    flagged,
    latex,
    listed,
    markdown,
    rounded_text,
    spread_text,
)
from harness.reporting.intervals import TRAINING_SEEDS, pairwise, ranks

COLUMNS = (
    *("student", "metric", "extractor", "num_samples", "mean", "std", "sampling_std", "stderr"),
    *("best", "rank", "flag", "status"),
)
STUDENT_COLUMNS = (
    *("student", "method", "seeds", "nfe", "parameters", "frozen", "data_free"),
    *("images", "flops", "seconds", "device", "flag", "status"),
)
OF_EXTRACTORS = ("trained-on-extractor", "shares-pretraining")  # flags
SELECTED = ("student", "column", "mean", "std", "among")  # columns of `Summary.selected`
# Metrics of the headline of text-to-image experiments, in any extractor.
TEXT_METRICS = ("clip-score", "clip-score-100-plain", "aesthetic", "aesthetic-v2")
HEADLINE_METRICS = ("recall", "accuracy", "attribute-accuracy", *TEXT_METRICS)
FACTS = {  # heading -> column of `Summary.students`, format
    "NFE": ("nfe", "{:,.0f}"),
    "seeds": ("seeds", "{:,.0f}"),
    "parameters": ("parameters", "{:,.0f}"),
    "frozen": ("frozen", "{:.0%}"),
    "data-free": ("data_free", "{}"),
    "images": ("images", "{:,.0f}"),
    "TFLOPs": ("flops", "{:.3g}"),
    "seconds": ("seconds", "{:,.0f}"),
}


@dataclass(frozen=True)
class Summary:
    """The results of an experiment's last snapshots.

    scores: COLUMNS and `column`, the name of the column in wide tables. `mean` and `std` are over
    training seeds, whose score is the mean over sampling seeds; `sampling_std` is over the sampling
    seeds of one training seed (root of the mean variance), `stderr` the mean standard error of one
    evaluation, `best`, for main metrics, the mean of the best sampling seeds. students:
    STUDENT_COLUMNS, costs as means over training seeds. columns: metric, extractor and num_samples
    by name of the column, in order, with `main` (at the largest sample count that the metric
    accepts, or a main metric) and `ranked` (the main metric of its extractor). pairs: `pairwise` in
    the main columns. notes: lines for below the table. selected: student, column, `mean`, `std` and
    `among` of the best snapshots in the ranked columns (see `harness.evaluation.selection`).
    warnings: lines that limit how far the scores can be trusted. costs: `cost_to_reach.cost_table`.
    """

    scores: pd.DataFrame
    students: pd.DataFrame
    columns: pd.DataFrame
    pairs: pd.DataFrame
    sampling_seeds: int
    notes: list[str] = field(default_factory=list)
    selected: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(SELECTED)))
    warnings: list[str] = field(default_factory=list)
    costs: pd.DataFrame = field(
        default_factory=lambda: pd.DataFrame(columns=list(cost_to_reach.COLUMNS))
    )

    @property
    def main(self) -> list[str]:
        return list(self.columns.index[self.columns.main])


def summarise(experiment: Experiment, table: pd.DataFrame) -> Summary:
    """Summarise `collect`'s table."""
    final, students = table[table.final], list(experiment.students)
    columns = _columns(experiment, final)
    pairs = pairwise(experiment, table, list(columns.index[columns.main]))
    rows_of = dict(iter(final.groupby("student")))
    names = [name for name in [*experiment.reference_rows, *students] if name in rows_of]
    scores = student_scores(final, columns, names)
    scores["rank"] = None
    for column in columns.index[columns.ranked]:
        rows = scores.column == column
        scores.loc[rows, "rank"] = scores.student[rows].map(ranks(pairs, column, students))
    facts = [_student(experiment, name, rows_of[name]) for name in names]
    costs = pd.DataFrame(facts, columns=list(STUDENT_COLUMNS))
    seeds = len(experiment.evaluation.sampling_seeds)
    selected, warnings = selected_scores(table, columns), trust.warnings(experiment, table)
    marked = [f"Warning: {line}{'' if line.endswith('?') else '.'}" for line in warnings]
    notes = [*marked, *_notes(experiment, table)]
    reach = cost_to_reach.cost_table(experiment, table)
    return Summary(scores, costs, columns, pairs, seeds, notes, selected, warnings, reach)


def _columns(experiment: Experiment, final: pd.DataFrame) -> pd.DataFrame:
    """`Summary.columns`: those at the main sample count first."""
    most = experiment.evaluation.num_samples
    columns = final[final.column != ""].drop_duplicates("column").set_index("column")
    columns = columns[["metric", "extractor", "num_samples"]]
    columns = columns.sort_values("num_samples", key=lambda n: n != most, kind="stable")
    rows = list(columns.itertuples())
    main = [METRICS[row.metric] == main_metric_in(experiment, row.extractor) for row in rows]
    largest = [row.num_samples == METRICS[row.metric].count(most) for row in rows]
    facts = pd.DataFrame({"main": main, "largest": largest}, columns.index, dtype=bool)
    return columns.assign(main=facts.main | facts.largest, ranked=facts.main & facts.largest)


def seed_means(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """`mean` and `std` of the scores over training seeds, for each group of rows."""
    by_seed = rows.groupby([*keys, "seed"], dropna=False, sort=False).value.mean()
    return by_seed.groupby(keys, sort=False).agg(mean=pd.Series.mean, std=pd.Series.std)


def selected_scores(table: pd.DataFrame, columns: pd.DataFrame) -> pd.DataFrame:
    """`Summary.selected`. `among`: how many snapshots were compared, such as "20" or "18–20"."""
    rows, keys = table[table.selected.notna()], ["student", "column"]
    rows = rows[rows.column.isin(columns.index[columns.ranked])].astype({"value": float})
    if rows.empty:
        return pd.DataFrame(columns=list(SELECTED))
    counts = rows.groupby(keys).selected.unique()
    among = counts.map(lambda found: "–".join(str(n) for n in sorted({min(found), max(found)})))
    return seed_means(rows, keys).assign(among=among).reset_index()


def student_scores(final: pd.DataFrame, columns: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """`Summary.scores` without ranks from final rows, in the order of `names` and `columns`."""
    keys = ["student", "column"]
    rows = final[final.column != ""].astype({"value": float, "stderr": float})
    grouped, by_seed = rows.groupby(keys), rows.groupby([*keys, "seed"], dropna=False).value
    extremes = by_seed.agg(["min", "max", "var"]).groupby(keys).agg(pd.Series.mean)
    scores = seed_means(rows, keys).assign(
        sampling_std=extremes["var"] ** 0.5,
        stderr=grouped.stderr.agg(pd.Series.mean),
        flag=grouped.flag.agg(_flags, "trained-on-extractor", "shares-pretraining", "released"),
        status=grouped.status.agg(lambda s: next(iter(s[is_unavailable(s)]), "ok")),
    )
    scores = scores.join(columns, on="column")
    higher = scores.metric.map(lambda name: METRICS[name].higher_is_better is True)
    best = extremes["max"].where(higher, extremes["min"])
    scores["best"] = best.where(scores.ranked & (grouped.sample_seed.nunique() > 1))
    order = pd.MultiIndex.from_product([names, columns.index], names=keys)
    scores = scores.reindex(order[order.isin(scores.index)]).reset_index()
    return scores.reindex(columns=["column", *COLUMNS])


def _flags(flags: pd.Series, *names: str) -> str:
    """The given flags that any of the rows has, separated by spaces."""
    present = set(" ".join(flags.dropna()).split())
    return " ".join(name for name in names if name in present)


def _devices(rows: pd.DataFrame) -> str | None:
    """The devices of some rows; None if they are unknown."""
    return " and ".join(rows.device.dropna().unique()) or None


def _student(experiment: Experiment, name: str, rows: pd.DataFrame) -> dict:
    """STUDENT_COLUMNS of one student or reference row."""
    seeds = sorted(rows.seed.dropna().unique())
    student = {"student": name, "method": rows.method.iloc[0] or "", "seeds": len(seeds) or None}
    student["nfe"] = next(iter(rows.nfe.dropna()), None)
    teacher = experiment.reference_rows.get(name)
    jobs = [(teacher,)] if teacher else [(name, int(seed)) for seed in seeds]
    if records := list(filter(None, (training_record(experiment, *job) for job in jobs))):
        student["parameters"] = records[0].parameters
        student["frozen"] = getattr(records[0], "frozen_fraction", 0.0)
        student["data_free"] = "yes" if getattr(records[0], "data_free", False) else "no"
        if records[0].ledger:
            for unit in ("images", "flops", "seconds"):
                student[unit] = sum(getattr(r.ledger, unit) for r in records) / len(records)
    student["device"] = _devices(rows)
    student["flag"] = _flags(rows.flag, "contended")
    failed = rows[(rows.status != "ok") & ~is_unavailable(rows.status)]
    share = f"{len(failed)} of {len(seeds)} " if len(seeds) > 1 else ""
    student["status"] = "ok" if failed.empty else share + failed.status.iloc[0]
    return student


# -- notes --------------------------------------------------------------------------------------


def _notes(experiment: Experiment, table: pd.DataFrame) -> Iterator[str]:
    yield from _protocol_notes(experiment, table)
    yield from _device_notes(table)
    yield from _selection_notes(experiment, table)
    yield from _teacher_notes(experiment)
    yield from _student_notes(experiment)
    yield from _extractor_notes(experiment, table)
    for flag, (mark, meaning) in FLAGS.items():
        flagged = table[table.flag.fillna("").str.contains(flag)]
        who = [
            ", ".join(rows.student.unique()) + (f" in {extractor}" if flag in OF_EXTRACTORS else "")
            for extractor, rows in flagged.groupby("extractor", sort=False)
        ]
        if who:
            yield f"{mark} {flag} ({'; '.join(dict.fromkeys(who))}): {meaning}."


def _protocol_notes(experiment: Experiment, table: pd.DataFrame) -> Iterator[str]:
    training, sampling = experiment.training, experiment.evaluation.sampling_seeds
    trained = {name: s for name, s in experiment.students.items() if not s.source}
    budget, *own = (
        ", ".join(f"{limit.amount:g} {limit.unit}" for limit in section.budget)
        for section in (training, *trained.values())
    )
    own = zip(trained, own, strict=True)
    budgets = "".join(f"; {name}: {text}" for name, text in own if text != budget)
    references = ", ".join(table.reference.dropna().unique()) or "missing"
    floor = (
        " `_n…` is the sample count. At the size of the held-out part, scores are means over "
        "disjoint subsets; `floor` is the score of the real held-out images."
    )
    seeds = f"{', '.join(map(str, sampling))} (their std is `sampling_std` in summary.csv)"
    what = f"Scores are means over sampling seeds {seeds}"
    if trained:
        what = (
            f"Mean ± std over {len(training.seeds)} training seeds; the score of a training seed "
            f"is its mean over sampling seeds {seeds}. EMA weights at the end of the budget "
            f"({budget}{budgets})"
        )
    floor = floor if (table.student == "floor").any() else ""
    yield f"{what}; reference {references}.{floor}"
    yield (
        "`rank`: from the intervals in pairwise.csv, not corrected for multiple comparisons; "
        "`tie 1–3` if some intervals contain 0, `not ranked` with fewer than "
        f"{TRAINING_SEEDS} training seeds."
    )
    if len(sampling) > 1:
        yield (
            f"`best of {len(sampling)}`: the best sampling seed, as papers often publish it. It "
            "improves with the number of seeds; compare it only with such numbers."
        )


def _device_notes(table: pd.DataFrame) -> Iterator[str]:
    rows = table[table.device.notna()]
    if rows.device.nunique() == 1:
        yield f"All networks were trained and scored on {rows.device.iloc[0]}."
    elif len(rows):
        names: dict[str | None, list[str]] = {}
        for name, group in rows.groupby("student", sort=False):
            names.setdefault(_devices(group), []).append(name)
        texts = [f"{', '.join(found)}: {device}" for device, found in names.items()]
        yield (
            f"Devices of the runs: {'; '.join(texts)}. Compare `seconds` on one device only; "
            "between devices, scores of the same weights differ by rounding."
        )


def _selection_notes(experiment: Experiment, table: pd.DataFrame) -> Iterator[str]:
    rows = table[table.selected.notna() & (table.column != "")]
    if rows.empty:
        return
    chosen = criterion(experiment.scoring())
    direction = "highest" if chosen.metric.higher_is_better else "lowest"
    column = column_of(experiment, chosen.metric, chosen.extractor)
    found = [
        f"{row.student} seed {row.seed}: {row.snapshot}"
        for row in rows.drop_duplicates(["student", "seed"]).itertuples()
    ]
    yield (
        f"`selected`: the snapshot with the {direction} {column}, in parentheses of how many, by "
        f"the noise of selection seed {experiment.evaluation.selection_seed}, scored with the "
        f"sampling seeds ({'; '.join(found)}). Other columns are of the last snapshot."
    )


def _teacher_notes(experiment: Experiment) -> Iterator[str]:
    for name in experiment.teachers:
        record = collect.training_record(experiment, name)
        if record and record.imported:
            file, sha256 = Path(record.imported["source"]).name, record.imported["sha256"]
            yield f"teacher {name}: imported from {file} (sha256 {sha256})."


def _student_notes(experiment: Experiment) -> Iterator[str]:
    seed, trained_against = experiment.training.seeds[0], {}
    for name, student in experiment.students.items():
        if (record := training_record(experiment, name, seed)) is None:
            continue
        if record.released:
            file, sha256 = Path(record.released["source"]).name, record.released["sha256"]
            yield (
                f"{name}: released weights of {student.method} ({record.paper}) from {file} "
                f"(sha256 {sha256}), imported and not trained here."
            )
            continue
        for network in record.trained_against:
            trained_against.setdefault(network, []).append(name)
        changed = ", ".join(f"{k} {v}" for k, v in record.changed_settings.items())
        frozen = f"; {record.frozen_fraction:.0%} frozen" if record.frozen_fraction else ""
        skipped = sum(record.skipped_steps.values())
        yield (
            f"{name}: method {student.method} ({record.paper}){frozen}. "
            f"{'; '.join(record.deviations) or 'No deviations'}. "
            f"Settings that differ from the method's defaults: {changed or 'none'}."
            + (f" {skipped} non-finite steps (seed {seed})." if skipped else "")
        )
    # Networks trained here share the images and labels. Flags mark those of pretrained networks.
    trained = [n for n, item in experiment.features.items() if FEATURES[item.type].trained]
    for network, students in trained_against.items():
        scoring = [n for n in experiment.evaluation.extractors if n in trained and n != network]
        if network in trained and scoring:
            yield (
                f"{listed(students)} {'were' if len(students) > 1 else 'was'} trained against "
                f"{network}, which was trained on the "
                f"same labelled images as the networks that score ({', '.join(scoring)})."
            )


def _extractor_notes(experiment: Experiment, table: pd.DataFrame) -> Iterator[str]:
    for name in experiment.evaluation.extractors:
        record = collect.feature_record(experiment, name)
        if record and record.unavailable:
            folder = experiment.paths.features(name)
            yield f"{name} is unavailable: {record.reason}; then delete {folder}."
    distances = table[table.final & table.metric.isin(FRECHET)].drop_duplicates("column")
    floor = table[table.student == "floor"].num_samples.max()
    floor = None if pd.isna(floor) else int(floor)
    for row in distances[distances.num_samples <= distances.features].itertuples():
        note = small_sample_warning(row.extractor, row.features, row.num_samples, floor)
        yield f"{row.column}: {note}."


# -- pivots --------------------------------------------------------------------------------------


def wide(summary: Summary) -> pd.DataFrame:
    """comparison.csv: STUDENT_COLUMNS and, for each column, the mean and `<column>_std`."""
    table = summary.students.set_index("student")
    values = summary.scores.pivot(index="student", columns="column", values=["mean", "std"])
    for column in summary.columns.index:
        table[column] = values["mean", column]
        table[f"{column}_std"] = values["std", column]
    for column, rows in summary.selected.groupby("column", sort=False):
        rows, name = rows.set_index("student"), f"{column}_selected"
        table[name], table[f"{name}_std"] = rows["mean"], rows["std"]
        table[f"{name}_among"] = rows.among
    return table.dropna(axis="columns", how="all").assign(status=table.status).reset_index()


def score_text(row) -> str:
    """A row of `Summary.scores` as `mean ± std` with its flags, or its status."""
    return row.status if row.status != "ok" else flagged(spread_text(row.mean, row.std), row.flag)


def column_label(column, part: str = "") -> str:
    """`fd_n2000_digits-cnn ↓` for a row of `Summary.columns`, or `fd_n2000_digits-cnn rank`."""
    return f"{column.name} {part}" if part else f"{column.name}{METRICS[column.metric].arrow}"


def text_table(
    summary: Summary,
    columns: list[str],
    ranked: bool = True,
    score: Callable = score_text,
    label: Callable = column_label,
    cost: Callable | None = itemgetter("flops"),
) -> pd.DataFrame:
    """A text table indexed by student: `columns`, the costs of training and, if a student failed,
    the status. ranked: with ranks and the best sampling seed. score, label: as `score_text` and
    `column_label`. cost: makes a cell of the texts of each unit, in a column after the first ranked
    one that has a level (`cost_to_reach.shown_level`); None: no such column."""
    students = summary.students.set_index("student")
    students["flops"] = students.flops.astype(float) / 1e12
    table = pd.DataFrame(index=students.index)
    for name in columns:
        column = summary.columns.loc[name]
        rows = summary.scores[summary.scores.column == name].set_index("student", drop=False)
        table[label(column)] = pd.Series(map(score, rows.itertuples()), rows.index, dtype=object)
        if ranked and column.ranked:
            table[label(column, "rank")] = rows["rank"]
            if summary.sampling_seeds > 1:
                best = label(column, f"best of {summary.sampling_seeds}")
                table[best] = rows.best.map(spread_text)
            selected = summary.selected[summary.selected.column == name].set_index("student")
            if len(selected):
                texts = map(spread_text, selected["mean"], selected["std"])
                texts = [f"{text} (of {n})" for text, n in zip(texts, selected.among, strict=True)]
                table[label(column, "selected")] = pd.Series(texts, selected.index, dtype=object)
        level = cost_to_reach.shown_level(summary.costs, name) if cost and column.ranked else None
        if level is not None:
            texts = cost_to_reach.level_texts(summary.costs, name, level)
            cells = {student: cost(units) for student, units in texts.items()}
            table[label(column, f"TFLOPs to {rounded_text(level)}")] = pd.Series(
                cells, dtype=object
            )
            cost = None
    for heading, (fact, form) in FACTS.items():
        table[heading] = students[fact].map(form.format, na_action="ignore")
    table = table.astype(object).where(table.notna(), MISSING)
    table["seconds"] = list(map(flagged, table.seconds, students.flag))
    if students.device.nunique() > 1:
        table["device"] = students.device.fillna(MISSING)
    if (students.status != "ok").any():
        table["status"] = students.status
    return table


def comparison_columns(summary: Summary) -> list[str]:
    """The main columns, without the metrics of a run's last snapshot only: few enough to read."""
    return [c for c in summary.main if not METRICS[summary.columns.metric[c]].final_only]


def to_markdown(summary: Summary, title: str) -> str:
    body = markdown(text_table(summary, comparison_columns(summary)).reset_index())
    notes = "\n".join(f"* {note}" for note in summary.notes)
    return f"# {title}\n\n{body}\n\n{notes}\n"


def to_latex(summary: Summary, title: str) -> str:
    table = text_table(summary, comparison_columns(summary)).reset_index()
    marks = tuple(mark for mark, _ in FLAGS.values())
    comment = "\n% ".join([title, *(note for note in summary.notes if note.startswith(marks))])
    return latex(table, comment, "l" + "r" * (table.shape[1] - 1))


def headline_columns(experiment: Experiment, summary: Summary) -> list[str]:
    """The few columns of the headline: quality in the first available extractor, the floor at its
    own sample count, and agreement of images and texts."""
    extractors = collect.ranking_extractors(experiment)
    scored = set(summary.scores.column[summary.scores["mean"].notna()])
    available = [name for name in extractors if main_column(experiment, name) in scored]
    extractor = (available or extractors)[0]
    accuracy = "attribute-accuracy" if has_captions(experiment.data) else "accuracy"
    names = (main_metric_in(experiment, extractor).name, "recall", accuracy)
    columns = summary.columns.loc[summary.main]
    chosen = (columns.extractor == extractor) & columns.metric.isin(names)
    if has_texts(experiment.data):
        chosen |= columns.metric.isin(TEXT_METRICS)
    return list(columns.index[chosen])


def headline(experiment: Experiment, summary: Summary) -> str:
    """A markdown table of the headline's columns and the costs."""
    columns = headline_columns(experiment, summary)
    table = text_table(summary, columns, ranked=False, cost=None)
    return markdown(table.drop(columns=["parameters", "frozen"]).reset_index()) + "\n"
