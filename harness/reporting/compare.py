"""`harness compare` (experiments or machines) and `harness prompts` (two students per prompt).

`compare` reads metrics.csv and manifest.json only: a results folder may be of another machine.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from harness.config.experiment import Experiment
from harness.data import datasets
from harness.data.registry import has_texts
from harness.errors import UserError, did_you_mean
from harness.evaluation.registry import FRECHET, METRICS
from harness.io.artifacts import verify, write_text
from harness.io.records import ScoreRecord
from harness.reporting import collect
from harness.reporting.formatting import MISSING, markdown, spread_text
from harness.reporting.intervals import LEVEL
from harness.reporting.manifest import read_manifest
from harness.reporting.tables import HEADLINE_METRICS, seed_means

KEYS = ["sample_seed", "image", "prompt"]  # of the values per image
LISTED_PROMPTS = 5  # for each student
Names = Sequence[str]
COSTS = {  # unit -> title, format, scale
    "images": ("images that received a generator update", "{:,.0f}", 1),
    "flops": ("training compute, TFLOPs", "{:.3g}", 1e12),
    "seconds": ("training, seconds", "{:,.0f}", 1),
}


class Results(NamedTuple):
    """A results folder. final: metrics.csv of the last weights; manifest: empty if missing."""

    folder: Path
    final: pd.DataFrame
    manifest: dict


def read_results(folder: Path) -> Results:
    path = folder / "tables" / "metrics.csv"
    if not path.exists():
        reason = "has no tables/metrics.csv" if folder.is_dir() else "does not exist"
        message = f"{folder} {reason}; give the folder of an experiment, such as results/digits"
        raise UserError(message, "missing-file")
    table = collect.read_metrics(path)
    # The rows of each run's last snapshot; teachers and the floor have no training images.
    last = table.groupby(["student", "seed"], dropna=False).images.transform("max")
    final = table[table.images.isna() | (table.images == last)]
    final = final[~final.flag.fillna("").str.split().map(lambda flags: "selection" in flags)]
    protocol, status = final.protocol.fillna("unknown"), final.status.fillna("ok").astype(str)
    final = collect.with_columns(final.assign(protocol=protocol, status=status), path)
    manifest = folder / "manifest.json"
    return Results(folder, final, read_manifest(manifest) if manifest.exists() else {})


def labels(results: list[Results]) -> list[str]:
    """The experiments' names, or their folders if two have the same name."""
    names = [str(r.final.experiment.iloc[0]) for r in results]
    folders = [str(r.folder) for r in results]
    if len(set(folders)) < len(folders):
        raise UserError(f"{max(folders, key=folders.count)} is given twice", "duplicate")
    return names if len(set(names)) == len(names) else folders


def _scores(final: pd.DataFrame) -> pd.DataFrame:
    """One row per column, student and experiment."""
    keys = ["column", "student", "experiment"]
    final = final[final.column != ""]
    grouped = final.groupby(keys, sort=False)
    scores = grouped[["metric", "extractor", "num_samples", "protocol"]].first()
    scores["seeds"] = grouped.seed.nunique().replace(0, None)
    status = grouped.status.agg(lambda s: next((x for x in s if x != "ok"), "ok"))
    scores = scores.join(seed_means(final, keys))
    texts = pd.Series(map(spread_text, scores["mean"], scores["std"]), scores.index, dtype=object)
    return scores.assign(text=texts.mask(collect.is_unavailable(status), status)).reset_index()


def _facts(result: Results) -> dict[str, str]:
    m = collect.flatten(result.manifest)
    facts = {
        "folder": str(result.folder),
        "commit": str(m.get("commit", MISSING))[:10],
        "device": str(m.get("device.used", MISSING)),
        "processor": str(m.get("device.processor", MISSING)),
        "torch": str(m.get("packages.torch", MISSING)),
    }
    for name, column in (("training seeds", "seed"), ("sampling seeds", "sample_seed")):
        seeds = sorted(result.final[column].dropna().astype(int).unique())
        facts[name] = ", ".join(map(str, seeds)) or MISSING
    return facts


def _short(value: object) -> str:
    text = "missing" if value is None else str(value)
    return f"{text[:8]}…" if len(text) >= 32 and " " not in text else text


def protocol_difference(protocols: dict[str, str], records: dict[str, dict]) -> str:
    """The keys in which two protocols differ, in one line. protocols: two experiments -> their
    hashes; records: experiment -> hash -> protocol."""
    for name, protocol in protocols.items():
        if protocol not in records[name]:
            return f"protocol {protocol} of {name} is unknown: {name} has no complete manifest.json"
    a, b = protocols
    first, second = (collect.flatten(records[name][protocols[name]]) for name in (a, b))
    return "; ".join(
        f"{key} is {_short(first.get(key))} in {a} and {_short(second.get(key))} in {b}"
        for key in dict.fromkeys([*first, *second])
        if first.get(key) != second.get(key)
    )


def shown_columns(scores: pd.DataFrame, main: dict[str, str], metrics: Names, every: bool) -> set:
    """The columns to print. scores: `_scores`; main: experiment -> its main metric.

    every: all of them. Otherwise each experiment's largest sample count of some metrics: the
    chosen ones; or its main metric and Fréchet distances, and HEADLINE_METRICS in the first
    extractor that has them; or all metrics, if it has none of these.
    """
    if every:
        return set(scores.column)
    groups = scores.groupby(["experiment", "metric", "extractor"])
    largest = scores[scores.num_samples == groups.num_samples.transform("max")]
    if metrics:
        return set(largest.column[largest.metric.isin(metrics)])
    shown = set()
    for experiment, rows in largest.groupby("experiment"):
        first = rows.extractor == rows.groupby("metric").extractor.transform("first")
        headline = rows.metric.isin([*FRECHET, main.get(experiment)])
        headline |= rows.metric.isin(HEADLINE_METRICS) & first
        shown |= set(rows.column[headline] if headline.any() else rows.column)
    return shown


def check_metrics(metrics: Names, scores: pd.DataFrame) -> None:
    """Raise a `UserError` (code "unknown-name") if no experiment has one of the metrics."""
    known = list(scores.metric.unique())
    for name in metrics:
        if name not in known:
            message = f"--metric {name}: no experiment has this metric{did_you_mean(name, known)}"
            raise UserError(message, "unknown-name")


def compare_results(
    results: list[Results], metrics: Names = (), every: bool = False
) -> tuple[str, pd.DataFrame]:
    """A markdown text of `shown_columns`, and all columns as a table: one row per column, protocol
    and student, three columns per experiment."""
    pairs = dict(zip(labels(results), results, strict=True))
    records = {name: r.manifest.get("protocols", {}) for name, r in pairs.items()}
    tables = [r.final.assign(experiment=name) for name, r in pairs.items()]
    final = pd.concat(tables, ignore_index=True)
    scores, sections, differences = _scores(final), [], {}
    check_metrics(metrics, scores)
    key = "config.evaluation.main_metric"
    chosen = {name: collect.flatten(r.manifest).get(key) for name, r in pairs.items()}
    shown = shown_columns(scores, chosen, metrics, every)

    def section(title: str, rows: pd.DataFrame, titles: dict[str, str]) -> None:
        """Add the `text` of each student and experiment. titles: longer headings of experiments."""
        table = rows.pivot(index="student", columns="experiment", values="text")
        table = table.reindex(index=final.student.unique(), columns=list(pairs))
        table = table.dropna(how="all").fillna(MISSING).rename(columns=titles)
        sections.append(f"## {title}\n\n{markdown(table.rename_axis('').reset_index())}")

    for column, rows in scores.groupby("column", sort=False):
        protocols = rows.drop_duplicates("experiment").set_index("experiment").protocol
        first = protocols.index[0]
        others = protocols[protocols != protocols[first]]
        for name in others.index:
            reason = protocol_difference(protocols[[first, name]].to_dict(), records)
            differences.setdefault(reason, []).append(column)
        titles = {name: f"{name} (protocol {hash_[:8]})" for name, hash_ in protocols.items()}
        if column in shown:
            metric = rows.metric.iloc[0]
            arrow = METRICS[metric].arrow if metric in METRICS else ""
            section(column + arrow, rows, titles if len(others) else {})
    runs = final.drop_duplicates(["experiment", "student", "seed"])
    costs = runs.groupby(["experiment", "student"], sort=False)[list(COSTS)].mean().reset_index()
    for unit, (title, form, scale) in COSTS.items():
        texts = (costs[unit] / scale).map(form.format, na_action="ignore")
        if texts.notna().any():
            section(title, costs.assign(text=texts), {})
    facts = pd.DataFrame({name: _facts(r) for name, r in pairs.items()})
    hidden = scores[~scores.column.isin(shown)]
    more = (
        f" Not shown: {hidden.column.nunique()} columns of {', '.join(hidden.metric.unique())} "
        "(`--metric NAME`, `--all`)."
    )
    failed = final[final.status.str.startswith("failed")]
    text = [
        f"# Comparison of {', '.join(pairs)}",
        markdown(facts.rename_axis("").reset_index()),
        *(
            f"**Different protocols, not comparable:** {', '.join(columns)}: {reason}."
            for reason, columns in differences.items()
        ),
        *dict.fromkeys(f"{r.experiment}: {r.student}: {r.status}" for r in failed.itertuples()),
        *sections,
        "Mean ± std over training seeds, last weights." + more * (len(hidden) > 0),
    ]
    wide = scores.set_index(["column", "protocol", "student", "experiment"])
    wide = wide.unstack("experiment", sort=False).swaplevel(axis="columns")
    parts = {"mean": "", "std": "_std", "seeds": "_seeds"}
    wide = wide.reindex(columns=pd.MultiIndex.from_product([pairs, parts]))
    wide.columns = [name + parts[part] for name, part in wide.columns]
    return "\n\n".join(text), wide.reset_index()


def print_comparison(
    folders: list[Path], out: Path | None, metrics: Names = (), every: bool = False
) -> None:
    """Print the comparison of results folders (see `shown_columns`). out: a CSV file for all
    columns."""
    if len(folders) < 2:
        raise UserError(
            "compare needs at least two folders, such as results/a results/b", "arguments"
        )
    if out is not None and out.is_dir():
        raise UserError(f"--out {out}: is a folder; give the name of a CSV file", "arguments")
    text, table = compare_results([read_results(f) for f in folders], metrics, every)
    if out is not None:
        write_text(out, table.to_csv(index=False))
        text += f"\n\nAll columns: {out}"
    print(text)


# -- prompts ------------------------------------------------------------------------------------


def read_per_image(experiment: Experiment, name: str, seed: int) -> pd.DataFrame:
    """The values of each image of a student, or of the first teacher: KEYS and one column
    `extractor/quantity` each."""
    if not has_texts(experiment.data):
        raise UserError(f"{experiment.name} has no prompts", "no-prompts")
    run = (next(iter(experiment.teachers)),) if name == "teacher" else (name, seed)
    path = collect.scores_path(experiment, *run)
    file = ScoreRecord.read(path).per_image
    if file is None:
        raise UserError(f"{path} has no values per image; score {name} again", "missing-scores")
    verify(path.with_name(file.file), file.sha256, owner=path)
    return pd.read_csv(path.with_name(file.file))


def paired(a: pd.DataFrame, b: pd.DataFrame) -> pd.DataFrame:
    """Mean difference a - b of every quantity with its interval over images (the sampling error of
    one training seed). Columns: quantity, a, b, difference, low, high, images."""
    from scipy.special import stdtrit

    both, rows = a.merge(b, on=KEYS, suffixes=(" a", " b")), []
    for quantity in [c.removesuffix(" a") for c in both if c.endswith(" a")]:
        first, second = (both[f"{quantity} {side}"].astype(float) for side in "ab")
        difference, count = first - second, len(both)
        half = stdtrit(count - 1, (1 + LEVEL) / 2) * difference.std() / math.sqrt(count)
        mean = difference.mean()
        rows.append((quantity, first.mean(), second.mean(), mean, mean - half, mean + half, count))
    return pd.DataFrame(rows, columns=["quantity", "a", "b", "difference", "low", "high", "images"])


def by_prompt(a: pd.DataFrame, b: pd.DataFrame, quantity: str) -> pd.Series:
    """Mean difference a - b of one quantity for each prompt, largest first."""
    both = a.merge(b, on=KEYS, suffixes=(" a", " b"))
    difference = both[f"{quantity} a"].astype(float) - both[f"{quantity} b"].astype(float)
    return difference.groupby(both.prompt).mean().sort_values(ascending=False, kind="stable")


def print_prompts(experiment: Experiment, a: str, b: str, seed: int | None) -> None:
    """Print the paired differences of two students and the prompts with the largest ones."""
    from tabulate import tabulate

    seed = experiment.training.seeds[0] if seed is None else seed
    tables = [read_per_image(experiment, name, seed) for name in (a, b)]
    rows = paired(*tables)
    if rows.empty:
        raise UserError(f"{a} and {b} have no quantity of the same images in common", "no-overlap")
    headers = ("quantity", a, b, "difference", "low", "high", "images")
    print(tabulate(rows.itertuples(index=False), headers, tablefmt="github", floatfmt=".4g"))
    print(
        f"\nDifference: {a} - {b}, with its {LEVEL:.0%} interval over pairs of images with the "
        f"same noise and prompt; training seed {seed} (the training error is not included)."
    )
    texts = datasets.load(experiment.paths.data, images=False).evaluation_prompts.texts
    quantity = rows.quantity.iloc[0]
    order = by_prompt(*tables, quantity)
    best = {a: order.head(LISTED_PROMPTS), b: order.tail(LISTED_PROMPTS)[::-1]}
    for name, prompts in best.items():
        print(f"\n{quantity}, prompts with the largest lead of {name}:")
        for prompt, difference in prompts.items():
            print(f"  {difference:+.3g}  {texts[prompt]}")
