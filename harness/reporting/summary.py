"""tables/summary.csv: one tidy row per student, metric, extractor and sample count.

Every other table of the report and the page are pivots of it. The score of a training seed is its
mean over the sampling seeds.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import pandas as pd

from harness.config.experiment import Experiment
from harness.config.schema import Limit
from harness.evaluation.checks import small_sample_warning
from harness.evaluation.registry import FRECHET, METRICS
from harness.features.base import FEATURES
from harness.io.records import TeacherRecord
from harness.reporting.collect import (
    feature_record,
    is_unavailable,
    main_column,
    main_metric_in,
    student_record,
)
from harness.reporting.formatting import FLAGS
from harness.reporting.intervals import TRAINING_SEEDS, pairwise, ranks

COLUMNS = (
    *("student", "metric", "extractor", "num_samples", "mean", "std", "sampling_std", "stderr"),
    *("best", "rank", "flag", "status"),
)
STUDENT_COLUMNS = (
    *("student", "method", "seeds", "nfe", "parameters", "frozen", "data_free"),
    *("images", "flops", "seconds", "flag", "status"),
)
UNITS = ("images", "flops", "seconds")


@dataclass(frozen=True)
class Summary:
    """The results of an experiment's last snapshots.

    scores: COLUMNS and `column`, the name of the column in wide tables. `mean` and `std` are over
    training seeds; `sampling_std` is the standard deviation over sampling seeds of one training
    seed (root of the mean variance), `stderr` the mean standard error of one evaluation; `best`,
    for main metrics, is the mean over training seeds of the best sampling seed; `rank` is of
    `intervals.ranks`. students: STUDENT_COLUMNS, one row per student and reference row, costs as
    means over training seeds. columns: the columns in order, indexed by name, with metric,
    extractor, num_samples and two booleans: `main` (at the largest sample count that the metric
    accepts, or a main metric) and `ranked` (the main metric of its extractor). pairs: `pairwise` in
    the main columns. notes: lines for below the table.
    """

    scores: pd.DataFrame
    students: pd.DataFrame
    columns: pd.DataFrame
    pairs: pd.DataFrame
    sampling_seeds: int
    notes: list[str] = field(default_factory=list)

    @property
    def main(self) -> list[str]:
        return list(self.columns.index[self.columns.main])


def summarise(experiment: Experiment, table: pd.DataFrame) -> Summary:
    """Summarise `collect`'s table."""
    final, students = table[table.final], list(experiment.students)
    columns = _columns(experiment, final)
    pairs = pairwise(experiment, table, list(columns.index[columns.main]))
    scored = set(final.student)
    names = [name for name in [*experiment.reference_rows, *students] if name in scored]
    scores = student_scores(final, columns, names)
    scores["rank"] = None
    for column in columns.index[columns.ranked]:
        rows = scores.column == column
        scores.loc[rows, "rank"] = scores.student[rows].map(ranks(pairs, column, students))
    rows = [_student(experiment, name, final[final.student == name]) for name in names]
    notes = [
        *_protocol_notes(experiment, table),
        *_student_notes(experiment),
        *_extractor_notes(experiment, table),
        *_flag_notes(table),
    ]
    costs = pd.DataFrame(rows, columns=list(STUDENT_COLUMNS))
    seeds = len(experiment.evaluation.sampling_seeds)
    return Summary(scores, costs, columns, pairs, seeds, notes)


def _columns(experiment: Experiment, final: pd.DataFrame) -> pd.DataFrame:
    """`Summary.columns`: those at the main sample count first."""
    most, extractors = experiment.evaluation.num_samples, experiment.evaluation.extractors
    columns = final[final.column != ""].drop_duplicates("column").set_index("column")
    columns = columns[["metric", "extractor", "num_samples"]]
    columns = columns.sort_values("num_samples", key=lambda n: n != most, kind="stable")
    main = [
        row.num_samples == METRICS[row.metric].count(most)
        or METRICS[row.metric] == main_metric_in(experiment, row.extractor)
        for row in columns.itertuples()
    ]
    ranked = columns.index.isin([main_column(experiment, name) for name in extractors])
    return columns.assign(main=pd.Series(main, columns.index, dtype=bool), ranked=ranked)


def seed_means(rows: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """`mean` and `std` of the scores over training seeds, for each group of rows."""
    by_seed = rows.groupby([*keys, "seed"], dropna=False, sort=False).value.mean()
    over_seeds = by_seed.groupby(keys, sort=False)
    return over_seeds.agg(mean=pd.Series.mean, std=pd.Series.std)


def student_scores(final: pd.DataFrame, columns: pd.DataFrame, names: list[str]) -> pd.DataFrame:
    """COLUMNS (without `rank`) and `column` from final rows, in the order of `names` and `columns`
    (as `Summary.columns`)."""
    keys = ["student", "column"]
    rows = final[final.column != ""].astype({"value": float, "stderr": float})
    grouped, by_seed = rows.groupby(keys), rows.groupby([*keys, "seed"], dropna=False).value
    extremes = by_seed.agg(["min", "max", "var"]).groupby(keys).agg(pd.Series.mean)
    scores = seed_means(rows, keys).assign(
        sampling_std=extremes["var"] ** 0.5,
        stderr=grouped.stderr.agg(pd.Series.mean),
        flag=grouped.flag.agg(_flags, "trained-on-extractor", "shares-pretraining"),
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


def _student(experiment: Experiment, name: str, rows: pd.DataFrame) -> dict:
    """STUDENT_COLUMNS of one student or reference row."""
    seeds = sorted(rows.seed.dropna().unique())
    student = {"student": name, "method": rows.method.iloc[0] or "", "seeds": len(seeds) or None}
    student["nfe"] = next(iter(rows.nfe.dropna()), None)
    records = [student_record(experiment, name, int(seed)) for seed in seeds]
    if records := [record for record in records if record]:
        student["parameters"] = records[0].parameters
        student["frozen"] = records[0].frozen_fraction
        student["data_free"] = "yes" if records[0].data_free else "no"
        for unit in UNITS:
            student[unit] = sum(getattr(r.ledger, unit) for r in records) / len(records)
    teacher = experiment.reference_rows.get(name)
    if teacher and (path := experiment.paths.teacher(teacher) / "teacher.json").exists():
        record = TeacherRecord.read(path)
        student |= {"parameters": record.parameters, "frozen": 0.0, "data_free": "no"}
        student |= {unit: getattr(record.ledger, unit, None) for unit in UNITS}
    student["flag"] = _flags(rows.flag, "contended")
    failed = rows[(rows.status != "ok") & ~is_unavailable(rows.status)]
    share = f"{len(failed)} of {len(seeds)} " if len(seeds) > 1 else ""
    student["status"] = "ok" if failed.empty else share + failed.status.iloc[0]
    return student


def wide(summary: Summary) -> pd.DataFrame:
    """comparison.csv: STUDENT_COLUMNS and, for each column, the mean and `<column>_std`."""
    table = summary.students.set_index("student")
    values = summary.scores.pivot(index="student", columns="column", values=["mean", "std"])
    for column in summary.columns.index:
        table[column] = values["mean", column]
        table[f"{column}_std"] = values["std", column]
    return table.dropna(axis="columns", how="all").assign(status=table.status).reset_index()


# -- notes --------------------------------------------------------------------------------------


def _protocol_notes(experiment: Experiment, table: pd.DataFrame) -> Iterator[str]:
    training, sampling = experiment.training, experiment.evaluation.sampling_seeds
    budget = _budget_text(training.budget)
    own = {name: _budget_text(student.budget) for name, student in experiment.students.items()}
    budgets = "".join(f"; {name}: {text}" for name, text in own.items() if text != budget)
    references = ", ".join(table.reference.dropna().unique()) or "missing"
    floor = (
        " `_n…` is the sample count. At the size of the held-out part, scores are means over "
        "disjoint subsets; `floor` is the score of the real held-out images."
    )
    yield (
        f"Mean ± std over {len(training.seeds)} training seeds; the score of a training seed is "
        f"its mean over sampling seeds {', '.join(map(str, sampling))} (their std is "
        "`sampling_std` in summary.csv). EMA weights at the end of the budget "
        f"({budget}{budgets}); reference {references}."
        f"{floor if (table.student == 'floor').any() else ''}"
    )
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


def _budget_text(limits: list[Limit]) -> str:
    return ", ".join(f"{limit.amount:g} {limit.unit}" for limit in limits)


def _student_notes(experiment: Experiment) -> Iterator[str]:
    seed, trained_against = experiment.training.seeds[0], {}
    for name, student in experiment.students.items():
        record = student_record(experiment, name, seed)
        if record is None:
            continue
        for network in record.trained_against:
            trained_against.setdefault(network, []).append(name)
        changed = ", ".join(f"{k} {v}" for k, v in record.changed_settings.items())
        frozen = f"; {record.frozen_fraction:.0%} frozen" if record.frozen_fraction else ""
        skipped = sum(record.skipped_steps.values())
        yield (
            f"{name}: method {student.method} ({record.paper}){frozen}. "
            f"{'; '.join(record.deviations)}. "
            f"Settings that differ from the method's defaults: {changed or 'none'}."
            + (f" {skipped} non-finite steps skipped (seed {seed})." if skipped else "")
        )
    # Networks trained here share the images and labels. Flags mark those of pretrained networks.
    trained = [n for n, item in experiment.features.items() if FEATURES[item.type].trained]
    for network, students in trained_against.items():
        scoring = [n for n in experiment.evaluation.extractors if n in trained and n != network]
        if network in trained and scoring:
            yield (
                f"{network}, which {', '.join(students)} were trained against, was trained on the "
                f"same labelled images as the networks that score ({', '.join(scoring)})."
            )


def _extractor_notes(experiment: Experiment, table: pd.DataFrame) -> Iterator[str]:
    for name in experiment.evaluation.extractors:
        record = feature_record(experiment, name)
        if record and record.unavailable:
            folder = experiment.paths.features(name)
            yield f"{name} is unavailable: {record.reason}; then delete {folder}."
    distances = table[table.final & table.metric.isin(FRECHET)].drop_duplicates("column")
    floor = table[table.student == "floor"].num_samples
    floor_count = int(floor.max()) if len(floor) else None
    for row in distances[distances.num_samples <= distances.features].itertuples():
        note = small_sample_warning(row.extractor, row.features, row.num_samples, floor_count)
        yield f"{row.column}: {note}."


def _flag_notes(table: pd.DataFrame) -> Iterator[str]:
    for flag, (mark, meaning) in FLAGS.items():
        flagged = table[table.flag.fillna("").str.contains(flag)]
        who = [
            ", ".join(rows.student.unique()) + (f" in {extractor}" if flag != "contended" else "")
            for extractor, rows in flagged.groupby("extractor", sort=False)
        ]
        if who:
            yield f"{mark} {flag} ({'; '.join(dict.fromkeys(who))}): {meaning}."
