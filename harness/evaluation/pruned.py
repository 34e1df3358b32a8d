"""Snapshots without weights. `harness prune` leaves their scores in their folders, and later scores
of the run contain those that would be computed again from the weights."""

from collections.abc import Mapping
from pathlib import Path

from harness.config.jobs import Scoring
from harness.errors import UserError
from harness.evaluation.fingerprints import fingerprint, number_fingerprint
from harness.evaluation.registry import METRICS
from harness.evaluation.scorer import Scorer
from harness.evaluation.selection import criterion
from harness.io.artifacts import digest
from harness.io.records import ScoreRecord, ScoreRow, SnapshotScores, StudentRecord
from harness.networks import WEIGHTS

FILE = "scores.json"
Rows = Mapping[str, list[ScoreRow]]  # by snapshot


def keep_scores(scoring: Scoring, scores: ScoreRecord, snapshot: str, folder: Path) -> None:
    """Write what a score file has of a snapshot, except as the last or the selected one, to the
    snapshot's folder."""
    entries = [entry for entry in scores.entries if entry.snapshot == snapshot]
    entries = [e for e in entries if e.selection or not (e.final or e.selected)]
    if rows := [row for entry in entries for row in entry.rows]:
        protocols = {row.protocol: scores.protocols[row.protocol] for row in rows}
        SnapshotScores(
            sha256=entries[0].sha256,
            fingerprint=scores.fingerprint,
            numbers={key: number_fingerprint(scoring, value) for key, value in protocols.items()},
            rows=rows,
        ).write(folder / FILE)


class PrunedSnapshots:
    """The snapshots of a run that have no weights (`missing`), and the scores that are stored with
    snapshots. A snapshot with neither is a `UserError` (code "pruned"), as is a last one without
    weights."""

    def __init__(self, run: StudentRecord, folder: Path):
        self.run, self.folder = run, folder
        folders = {s.name: folder / "snapshots" / s.name for s in run.snapshots}
        self.missing = [n for n, path in folders.items() if not (path / WEIGHTS).exists()]
        self._stored = {}
        for snapshot in run.snapshots:
            scores = _read(folders[snapshot.name] / FILE)
            if scores is not None and scores.sha256 == snapshot.sha256:
                self._stored[snapshot.name] = scores
        if run.snapshots[-1].name in self.missing or not self._stored.keys() >= {*self.missing}:
            raise self._error("and new scores need them", "restore their files")

    def _error(self, reason: str, remedy: str) -> UserError:
        names = self.missing[0] + ", …" * (len(self.missing) > 1)
        message = f"{len(self.missing)} of its {len(self.run.snapshots)} snapshots have no weights "
        message += f"({names}), {reason}; {remedy}, or delete {self.folder} to train again"
        return UserError(f"{self.run.student}/seed{self.run.seed}: {message}", "pruned")

    @property
    def rows(self) -> Rows:
        """The stored rows."""
        return {name: scores.rows for name, scores in self._stored.items()}

    def valid_rows(self, scorer: Scorer) -> Rows:
        """The stored rows that the scorer would compute from the weights, with its protocols."""
        return {name: _valid(scores, scorer) for name, scores in self._stored.items()}

    def scored_otherwise(self, scoring: Scoring) -> list[str]:
        """Snapshots without weights whose stored scores are of other settings."""
        current = digest(fingerprint(scoring))
        return [name for name in self.missing if self._stored[name].fingerprint != current]

    def check_selection(self, scoring: Scoring, rows: Rows) -> None:
        """Raise a `UserError` if `rows` lack the row of a snapshot without weights that a selection
        compares."""
        chosen, seed = criterion(scoring), scoring.evaluation.selection_seed
        if not all(chosen.rows(rows[name], seed) for name in self.missing):
            raise self._error(
                f"and a selection by {chosen.metric.name} in {chosen.extractor} needs them, as its "
                "settings are not those before `harness prune`",
                "restore these settings, remove evaluation.selection_seed",
            )


def _read(path: Path) -> SnapshotScores | None:
    """Stored scores; None if there are none of this version's format."""
    try:
        return SnapshotScores.read_optional(path)
    except UserError as error:
        if error.code == "format":
            return None
        raise


def _valid(stored: SnapshotScores, scorer: Scorer) -> list[ScoreRow]:
    extractors, rows = {extractor.name for extractor in scorer.extractors}, []
    for row in stored.rows:
        selection = scorer.scoring.evaluation.metrics
        if row.extractor not in extractors or row.metric not in (selection or METRICS):
            continue
        metric = METRICS[row.metric]
        if row.num_samples in map(metric.count, scorer.counts):
            protocol = scorer.protocol(metric, row.num_samples, row.extractor)
            if number_fingerprint(scorer.scoring, protocol) == stored.numbers[row.protocol]:
                key = scorer.add_protocol(protocol)
                rows.append(row.model_copy(update={"protocol": key}))
    return rows
