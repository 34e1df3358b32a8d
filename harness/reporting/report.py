"""The report stage: metrics.csv, comparison tables, figures, report.html, manifest."""

from __future__ import annotations

import sys

from harness.config.experiment import Experiment
from harness.evaluation.registry import METRICS
from harness.io.artifacts import sha256_file, write_json, write_text
from harness.reporting.claims import write_claims
from harness.reporting.collect import COLUMNS, collect, is_unavailable, main_column, main_metric_in
from harness.reporting.intervals import write_pairwise
from harness.reporting.manifest import manifest
from harness.reporting.tables import Comparison, compare, formatted, to_latex, to_markdown


def write_report(experiment: Experiment, partial: bool = False) -> None:
    """Write everything under tables/ and figures/, report.html and manifest.json.

    `partial`: after a failure. Runs without scores become rows `failed (reason)`, and the manifest,
    which vouches for a complete comparison, goes; so the workflow will write the report again.
    """
    root = experiment.root
    (root / "manifest.json").unlink(missing_ok=True)
    table, protocols = collect(experiment, partial)
    tables = root / "tables"
    comparison = compare(experiment, table)
    failing = (table.status != "ok") & ~is_unavailable(table.status)
    complete = not failing.any()
    title = f"One-step students on {experiment.name}"
    if not complete:
        failed = int((table.seed.notna() & failing).sum())
        title += f" (incomplete: {failed} of {len(experiment.runs)} runs failed)"
    write_text(tables / "metrics.csv", table[list(COLUMNS)].to_csv(index=False))
    write_text(tables / "comparison.csv", comparison.values.to_csv(index=False))
    # To be read, and with rows that fit: report.html and comparison.csv have all columns.
    metric_of = comparison.identity.metric
    to_read = [c for c in comparison.main if not METRICS[metric_of[c]].final_only]
    write_text(tables / "comparison.md", to_markdown(comparison, title, to_read))
    write_text(tables / "comparison.tex", to_latex(comparison, title, to_read))
    write_text(tables / "headline.md", headline(experiment, comparison))
    outputs = [tables / f"comparison.{kind}" for kind in ("csv", "md", "tex")]
    outputs += [tables / "metrics.csv", tables / "headline.md"]
    # Written by a stage of its own, where there are real images; the page shows it.
    agreement = [tables / f"agreement.{kind}" for kind in ("csv", "md")]
    outputs += [path for path in agreement if path.exists()]
    outputs += write_pairwise(comparison.pairs, tables, experiment.name)
    if experiment.claims:
        outputs += write_claims(experiment, table, tables)
    if experiment.paper:
        from harness.reporting.published.tables import write_paper

        outputs += write_paper(experiment, table, tables)
    from harness.reporting.figures import draw
    from harness.reporting.page.page import write_html

    outputs += draw(experiment, table, root / "figures")
    made = manifest(experiment, protocols, outputs)
    page = write_html(experiment, table, comparison, made)
    if complete:
        made["outputs"][page.name] = sha256_file(page)
        write_json(root / "manifest.json", made)


# In the headline of experiments with texts, whichever extractor they are of.
TEXT_SCORES = ("clip-score", "clip-score-100-plain", "aesthetic", "aesthetic-v2")


def headline(experiment: Experiment, comparison: Comparison) -> str:
    """The few columns that README shows: quality in the first extractor that was to be had, how
    well images show their texts, and what it cost."""
    extractors, there = experiment.evaluation.extractors, comparison.values.notna().any()
    seen = [name for name in extractors if there.get(main_column(experiment, name))]
    extractor = (seen or extractors)[0]
    accuracy = "attribute-accuracy" if experiment.data.captioned else "accuracy"
    names = (main_metric_in(experiment, extractor).name, "recall", accuracy)
    identity = comparison.identity.loc[comparison.main]
    chosen = (identity.extractor == extractor) & identity.metric.isin(names)
    if experiment.data.texts:
        chosen |= identity.metric.isin(TEXT_SCORES)
    text = formatted(comparison, list(identity[chosen].index), ranked=False)
    text = text.drop(columns=["parameters", "frozen"])
    return text.to_markdown(index=False, disable_numparse=True) + "\n"


def print_summary(experiment: Experiment) -> None:
    """The comparison table for a terminal, and where the rest is, once it is complete."""
    if not (experiment.root / "manifest.json").exists():
        return
    table, _ = collect(experiment, partial=True)
    comparison = compare(experiment, table)
    columns = [c for c in comparison.main if comparison.identity.metric[c] != "recall"]
    text = formatted(comparison, columns).drop(columns="status", errors="ignore")
    text = text.set_index("student").T
    seeds, noise = experiment.training.seeds, experiment.evaluation.sampling_seeds
    print(f"\n{experiment.name}: mean ± std over training seeds {seeds}, sampling seeds {noise}\n")
    print(text.to_markdown(tablefmt="simple", disable_numparse=True))
    for _, row in comparison.values[comparison.values.status != "ok"].iterrows():
        print(f"\n{row.student}: {row.status}")
    print(f"\nTables:  {experiment.root / 'tables'}/comparison.md, .csv, .tex and metrics.csv")
    print(f"Figures: {experiment.root / 'figures'}/")
    print(f"Report:  {experiment.root / 'report.html'}")
    sys.stdout.flush()
