"""Selection of a run's best snapshot. Its noise is that of `evaluation.selection_seed`, which no
reported score uses: the minimum over many snapshots is lower than the score of its weights."""

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from harness.config.jobs import Scoring
from harness.config.schema import EvaluationSection
from harness.evaluation.registry import Metric, main_metric
from harness.features.base import provides
from harness.io.records import ScoreEntry, ScoreRow


class Criterion(NamedTuple):
    """What snapshots are compared by: a metric in an extractor's features."""

    extractor: str
    metric: Metric
    num_samples: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.extractor, self.metric.name, self.num_samples

    def rows(self, rows: Iterable[ScoreRow], seed: int | None = None) -> list[ScoreRow]:
        """The rows with a number of this criterion; seed: only with this sampling seed."""
        rows = [r for r in rows if (r.extractor, r.metric, r.num_samples) == self.key]
        return [r for r in rows if r.value is not None and seed in (None, r.sample_seed)]


def criterion(scoring: Scoring) -> Criterion:
    """The main metric in the first extractor where it is defined."""
    provided = {name: provides(settings) for name, (settings, _) in scoring.extractors.items()}
    return criterion_in(scoring.evaluation, provided)


def criterion_in(
    evaluation: EvaluationSection, provided: Mapping[str, Collection[str]]
) -> Criterion:
    """The same, from what each extractor provides."""
    main, selection = evaluation.main_metric, evaluation.metrics
    found = {name: main_metric(main, outputs, selection) for name, outputs in provided.items()}
    metrics = {name: metric for name, metric in found.items() if metric is not None}
    names = [name for name, metric in metrics.items() if metric.name == evaluation.main_metric]
    name = (names or list(metrics))[0]
    return Criterion(name, metrics[name], metrics[name].count(evaluation.num_samples))


def scores_of(entries: Iterable[ScoreEntry], chosen: Criterion) -> dict[str, float]:
    """Snapshot -> its mean score over the sampling seeds of its entries, for those with a score."""
    values: dict[str, list[float]] = {}
    for entry in entries:
        for row in chosen.rows(entry.rows):
            values.setdefault(entry.snapshot, []).append(row.value)
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}


def best(scores: Mapping[str, float], chosen: Criterion) -> str:
    """The snapshot with the best score; of equal ones the first."""
    sign = -1 if chosen.metric.higher_is_better else 1
    return min(scores, key=lambda name: sign * scores[name])
