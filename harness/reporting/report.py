"""The report stage: metrics.csv, the tables, the figures, report.html and manifest.json."""

import logging

from harness.config.experiment import Experiment
from harness.io.artifacts import sha256_file, write_json, write_text
from harness.reporting import tables
from harness.reporting.claims import write_claims
from harness.reporting.collect import COLUMNS, collect, is_unavailable
from harness.reporting.cost_to_reach import write_cost_to_reach
from harness.reporting.formatting import markdown
from harness.reporting.intervals import write_pairwise
from harness.reporting.manifest import manifest

logger = logging.getLogger(__name__)


def write_report(experiment: Experiment, partial: bool = False) -> None:
    """Write tables/, figures/, report.html and manifest.json.

    partial: write the report although runs failed; they become rows `failed (reason)`. An
    incomplete report has no manifest, so the workflow will write the report again.
    """
    root = experiment.paths.root
    (root / "manifest.json").unlink(missing_ok=True)
    table, protocols = collect(experiment, partial)
    summary = tables.summarise(experiment, table)
    for warning in summary.warnings:
        logger.warning(warning)
    failed = (table.status != "ok") & ~is_unavailable(table.status)
    title = f"One-step students on {experiment.name}"
    if failed.any():
        count = int((table.seed.notna() & failed).sum())
        title += f" (incomplete: {count} of {len(experiment.runs)} runs failed)"
    files = {
        "comparison.csv": tables.wide(summary).to_csv(index=False),
        "comparison.md": tables.to_markdown(summary, title),
        "comparison.tex": tables.to_latex(summary, title),
        "metrics.csv": table[list(COLUMNS)].to_csv(index=False),
        "headline.md": tables.headline(experiment, summary),
        "summary.csv": summary.scores[list(tables.COLUMNS)].to_csv(index=False),
    }
    folder = experiment.paths.tables
    for name, text in files.items():
        write_text(folder / name, text)
    # The agreement stage writes agreement.*, where there are real images.
    outputs = [*(folder / name for name in files), *sorted(folder.glob("agreement.*"))]
    outputs += write_pairwise(summary.pairs, folder, experiment.name)
    outputs += write_cost_to_reach(experiment, table, folder)
    if experiment.claims:
        outputs += write_claims(experiment, table, folder)
    if experiment.paper:
        from harness.reporting.published.tables import write_paper

        outputs += write_paper(experiment, table, folder)
    from harness.reporting.figures import draw
    from harness.reporting.page.page import write_page

    outputs += draw(experiment, table, experiment.paths.figures)
    record = manifest(experiment, protocols, outputs)
    page = write_page(experiment, table, summary, record)
    if not failed.any():
        record["outputs"][page.name] = sha256_file(page)
        write_json(root / "manifest.json", record)


def print_summary(experiment: Experiment) -> None:
    """Print the comparison, transposed, and where the results are; one line if the report is not
    complete."""
    root = experiment.paths.root
    if not (root / "manifest.json").exists():
        print(
            f"{root} has no complete report; `harness status` shows the runs, and `harness report"
        )
        print("--partial` reports those that are finished")
        return
    table, _ = collect(experiment, partial=True)
    summary = tables.summarise(experiment, table)
    columns = [name for name in summary.main if summary.columns.metric[name] != "recall"]
    text = tables.text_table(summary, columns).drop(columns="status", errors="ignore").T
    seeds, noise = experiment.training.seeds, experiment.evaluation.sampling_seeds
    print(f"\n{experiment.name}: mean ± std over training seeds {seeds}, sampling seeds {noise}\n")
    print(markdown(text.rename_axis("student").reset_index(), tablefmt="simple"))
    for row in summary.students[summary.students.status != "ok"].itertuples():
        print(f"\n{row.student}: {row.status}")
    print(f"\nTables:  {root / 'tables'}/comparison.md, .csv, .tex, summary.csv and metrics.csv")
    print(f"Figures: {root / 'figures'}/")
    print(f"Report:  {root / 'report.html'}", flush=True)
