"""Selection of a run's best snapshot. Its noise is that of `evaluation.selection_seed`, which no
reported score uses: the minimum over many snapshots is lower than the score of its weights."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from harness.config.jobs import Scoring
from harness.errors import UserError
from harness.evaluation.registry import Metric, main_metric
from harness.features.base import provides
from harness.io.records import ScoreEntry


class Criterion(NamedTuple):
    """What snapshots are compared by: a metric in an extractor's features."""

    extractor: str
    metric: Metric
    num_samples: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.extractor, self.metric.name, self.num_samples


def criterion(scoring: Scoring) -> Criterion:
    """The main metric in the first extractor where it is defined."""
    evaluation = scoring.evaluation
    metrics = {
        name: main_metric(evaluation.main_metric, provides(settings))
        for name, (settings, _) in scoring.extractors.items()
    }
    names = [name for name, metric in metrics.items() if metric.name == evaluation.main_metric]
    name = (names or list(metrics))[0]
    return Criterion(name, metrics[name], metrics[name].count(evaluation.num_samples))


def check_available(chosen: Criterion, unavailable: Mapping[str, str | None]) -> None:
    """Raise a `UserError` if the criterion's extractor has no weights. unavailable: extractor ->
    reason."""
    if reason := unavailable.get(chosen.extractor):
        message = f"selects by {chosen.metric.name} in {chosen.extractor}, which is unavailable"
        remedy = "provide its weights, or remove the key"
        raise UserError(f"evaluation.selection_seed {message} ({reason}); {remedy}", "unavailable")


def scores_of(entries: Iterable[ScoreEntry], chosen: Criterion) -> dict[str, float]:
    """Snapshot -> its mean score over the sampling seeds of its entries, for those with a score."""
    values: dict[str, list[float]] = {}
    for entry in entries:
        for row in entry.rows:
            key = row.extractor, row.metric, row.num_samples
            if key == chosen.key and row.value is not None:
                values.setdefault(entry.snapshot, []).append(row.value)
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}


def best(scores: Mapping[str, float], chosen: Criterion) -> str:
    """The snapshot with the best score; of equal ones the first."""
    sign = -1 if chosen.metric.higher_is_better else 1
    return min(scores, key=lambda name: sign * scores[name])
