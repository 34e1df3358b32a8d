"""tables/claims.{csv,md}: published claims, each tested as a comparison of two students."""

from pathlib import Path

import pandas as pd

from harness.config.experiment import Experiment
from harness.evaluation.registry import METRICS
from harness.features.base import provides
from harness.reporting.collect import column_of, main_metric_in
from harness.reporting.formatting import rounded, write_table
from harness.reporting.intervals import LEVEL, TRAINING_SEEDS, decide, seed_scores

ESTIMATE = ("difference", "low", "high")
COLUMNS = ("claim", "source", "reported", "better", "worse", "column", *ESTIMATE, "verdict")
VERDICTS = {"a better": "supported", "b better": "contradicted"}


def claims_table(experiment: Experiment, table: pd.DataFrame) -> pd.DataFrame:
    """One row per claim and extractor that has the claim's metric, from `collect`'s table.

    Columns: COLUMNS. difference: `better` - `worse`, with its interval (`harness.reporting.
    intervals`). verdict: "supported" or "contradicted" if the interval excludes 0, else
    "undecided".
    """
    final, rows = table[table.final], []
    for claim in experiment.claims:
        for extractor in experiment.evaluation.extractors:
            main = main_metric_in(experiment, extractor)
            metric = METRICS[claim.metric] if claim.metric else main
            if metric is None or not metric.applies_to(provides(experiment.features[extractor])):
                continue
            column = column_of(experiment, metric, extractor)
            scores = seed_scores(final, column)
            result = decide(scores, claim.better, claim.worse, metric.higher_is_better)
            verdict = VERDICTS.get(result["verdict"], "undecided")
            rows.append(claim.model_dump() | result | {"column": column, "verdict": verdict})
    return pd.DataFrame(rows, columns=list(COLUMNS))


def multiplicity_note(rows: pd.DataFrame) -> str:
    """How many of the verdicts chance would decide if all students were equal."""
    count = int(rows.low.notna().sum())
    return (
        f"{count} intervals at {LEVEL:.0%} each, not corrected for multiple comparisons. If all "
        f"students were equal, chance would decide about {count * (1 - LEVEL):.1f} of them."
    )


def write_claims(experiment: Experiment, table: pd.DataFrame, folder: Path) -> list[Path]:
    """Write claims.{csv,md} to a folder; returns their paths."""
    rows = claims_table(experiment, table)
    caption = (
        f"Difference: better - worse, with a {LEVEL:.0%} interval that includes the sampling and "
        "the training error. supported or contradicted: the interval excludes 0, on the claimed or "
        f"the other side. undecided: it contains 0, or there are fewer than {TRAINING_SEEDS} "
        f"training seeds. A verdict holds for {experiment.name} at its scale and budget, not for "
        f"the paper's experiment.\n\n{multiplicity_note(rows)}"
    )
    title, texts = f"Published claims, tested on {experiment.name}", rounded(rows, *ESTIMATE)
    return write_table(rows, folder, "claims", title, caption, texts)
