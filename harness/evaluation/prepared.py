"""Whether the prepared data and the feature networks are those of an experiment. The workflow makes
outdated ones again; commands outside the workflow check here what they read."""

import shlex
from collections.abc import Iterable, Iterator
from pathlib import Path

from harness.config.jobs import Scoring
from harness.errors import UserError
from harness.io.artifacts import canonical, digest
from harness.io.records import DataRecord, FeatureRecord


def outdated(
    scoring: Scoring, extractors: Iterable[str], fingerprint: str, files: Iterable[Path]
) -> Iterator[tuple[Path, list[str]]]:
    """Records that are missing or were made with other settings or files than the experiment's,
    each with the arguments of the `harness` command that makes it.

    fingerprint: `Experiment.prepared_data`. files: of the data set; as in the workflow, one that is
    newer than the prepared data makes it outdated.
    """
    path = scoring.data / "data.json"
    data = DataRecord.read_optional(path)
    if data is not None:
        made = path.stat().st_mtime
        newer = any(file.exists() and file.stat().st_mtime > made for file in files)
        data = None if newer or data.fingerprint != fingerprint else data
    if data is None:
        yield path, ["data"]
    for name in extractors:
        settings, folder = scoring.extractors[name]
        record, current = FeatureRecord.read_optional(folder / "features.json"), False
        if record is not None and record.run_id is None:  # published weights
            current = canonical(record.settings) == canonical(settings.model_dump())
        elif record is not None and data is not None:  # trained on the data
            current = record.run_id == digest([scoring.fingerprint["features"][name], data.sha256])
        if not current:
            yield folder / "features.json", ["features", name]


def check_prepared(
    scoring: Scoring,
    extractors: Iterable[str],
    fingerprint: str,
    files: Iterable[Path],
    configfile: Path,
) -> None:
    """Raise a `UserError` (code "outdated") that names the commands for what is `outdated`."""
    if found := list(outdated(scoring, extractors, fingerprint, files)):
        options = ["--configfile", str(configfile)]
        commands = [shlex.join(["python", "-m", "harness", *stage, *options]) for _, stage in found]
        message = f"{found[0][0]} was made with other settings or files than those of {configfile}"
        raise UserError(f"{message}; make it again: {' && '.join(commands)}", "outdated")
