"""tables/claims.{csv,md}: published claims, each tried as a comparison of two students here."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from harness.config.experiment import Experiment
from harness.evaluation.columns import column_name
from harness.evaluation.registry import METRICS
from harness.io.artifacts import write_text
from harness.reporting.collect import main_metric_in
from harness.reporting.intervals import LEVEL, TRAINING_SEEDS, decide, measured, number

COLUMNS = (
    *("claim", "source", "reported", "better", "worse", "column"),
    *("difference", "low", "high", "verdict"),
)
VERDICTS = {"a better": "supported", "b better": "contradicted"}


def claims_table(experiment: Experiment, table: pd.DataFrame) -> pd.DataFrame:
    """One row per claim and extractor that has its metric: COLUMNS. `table`: `collect`'s.

    difference: `better` - `worse`, with the interval of `harness.reporting.intervals`. verdict:
    "supported" or "contradicted" where the interval excludes 0, else "undecided".
    """
    evaluation, final, rows = experiment.evaluation, table[table.final], []
    for claim in experiment.claims:
        for extractor in evaluation.extractors:
            metric = main_metric_in(experiment, extractor)
            if claim.metric is not None:
                metric = METRICS[claim.metric]
            if experiment.features[extractor].kind not in metric.extractors:
                continue
            count = metric.count(evaluation.num_samples)
            column = column_name(metric.name, count, extractor)
            numbers = measured(final, column)
            found = decide(numbers, claim.better, claim.worse, metric.higher_is_better)
            verdict = VERDICTS.get(found["verdict"], "undecided")
            rows.append(claim.model_dump() | found | {"column": column, "verdict": verdict})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def multiplicity(rows: pd.DataFrame) -> str:
    """How many of the verdicts chance alone would decide."""
    count = int(rows.low.notna().sum())
    return (
        f"Verdicts: {count}, at {LEVEL:.0%} each by itself. Were no two students different, chance "
        f"alone would decide about {count * (1 - LEVEL):.1f} of them."
    )


def write_claims(experiment: Experiment, table: pd.DataFrame, folder: Path) -> list[Path]:
    """`claims.{csv,md}` in a folder; returns their paths."""
    rows = claims_table(experiment, table)
    text = rows.copy()
    for column in ("difference", "low", "high"):
        text[column] = text[column].map(number)
    body = text.to_markdown(index=False, disable_numparse=True)
    caption = (
        f"Difference: better - worse; the {LEVEL:.0%} interval holds sampling and training error. "
        "Supported or contradicted: it excludes 0, on the claimed side or the other; undecided: it "
        f"does not, or there are fewer than {TRAINING_SEEDS} training seeds. A verdict is about "
        f"{experiment.name} at its own scale and budget, not about the paper's experiment.\n\n"
        f"{multiplicity(rows)}"
    )
    files = {
        folder / "claims.csv": rows.to_csv(index=False),
        folder
        / "claims.md": f"# Published claims, tried on {experiment.name}\n\n{body}\n\n{caption}\n",
    }
    for path, content in files.items():
        write_text(path, content)
    return list(files)
