"""The stages of an experiment in the order of the workflow, for tools that run without Snakemake:
the command of each, the stages that it depends on, and whether its results are up to date.

Snakemake compares modification times, and the parameters of the jobs that it ran. Here the content
of the records counts instead: their fingerprints, and the hashes of the inputs that they name.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from harness.config.experiment import Experiment
from harness.errors import UserError
from harness.evaluation.fingerprints import run_scores, teacher_scores
from harness.evaluation.prepared import outdated
from harness.features.base import FEATURES
from harness.io.artifacts import digest, read_json, sha256_file
from harness.io.records import (
    DataRecord,
    FeatureRecord,
    PairRecord,
    Record,
    ScoreRecord,
    StudentRecord,
    TeacherRecord,
)
from harness.io.shards import INDEX
from harness.networks import pipeline_sha256
from harness.students.released import is_imported

AGREEMENT = ("agreement.csv", "agreement.md")


def _always() -> bool:
    return True


@dataclass(frozen=True)
class Stage:
    """A command of `python -m harness`. record: the file that it writes last. needs: names of the
    stages whose results it reads. is_current: whether its results are those of the experiment's
    settings and of the present inputs. has_files: whether the large files exist that only the
    stages after it read, which a results folder may lack (images, teacher pairs)."""

    command: str
    arguments: tuple[str, ...]
    record: Path
    is_current: Callable[[], bool]
    needs: tuple[str, ...] = ()
    has_files: Callable[[], bool] = field(default=_always)

    @property
    def name(self) -> str:
        return " ".join([self.command, *self.arguments])


def read(record_class: type[Record], path: Path) -> Record | None:
    """A record, or None if it is missing, damaged or of another format: its stage repeats."""
    try:
        return record_class.read_optional(path)
    except UserError:
        return None


class _Checks:
    """Whether the results of each stage are up to date."""

    def __init__(self, experiment: Experiment):
        self.experiment, self.paths = experiment, experiment.paths
        self.scoring = experiment.scoring()

    def _outdated(self, *extractors: str) -> set[str]:
        """Names of stages among "data" and those of feature networks whose results are not up to
        date."""
        e = self.experiment
        try:
            found = outdated(self.scoring, extractors, e.prepared_data, e.data_files())
            return {" ".join(arguments) for _, arguments in found}
        except UserError:  # a record of another format
            return {"data", *(f"features {name}" for name in extractors)}

    def data(self) -> bool:
        return "data" not in self._outdated()

    def images(self) -> bool:
        record = read(DataRecord, self.paths.data / "data.json")
        return record is not None and (
            not record.train_images or (self.paths.data / "images" / INDEX).exists()
        )

    def features(self, name: str) -> bool:
        if name in self.experiment.evaluation.extractors:
            return f"features {name}" not in self._outdated(name)
        job, data = self.experiment.feature_job(name), self._data_sha256()
        record = read(FeatureRecord, job.folder / "features.json")
        return record is not None and record.run_id in (None, digest([job.fingerprint, data]))

    def _data_sha256(self) -> str | None:
        record = read(DataRecord, self.paths.data / "data.json")
        return record and record.sha256

    def teacher(self, name: str) -> bool:
        job = self.experiment.teacher_job(name)
        record = read(TeacherRecord, job.folder / "teacher.json")
        if record is None or record.fingerprint != digest(job.fingerprint):
            return False
        text = record.text and record.text.sha256
        run_id = digest([job.fingerprint, self._data_sha256(), text])
        return record.imported is not None or record.run_id == run_id

    def pairs(self, name: str) -> bool:
        job = self.experiment.pair_job(name)
        record = read(PairRecord, job.folder / "pairs.json")
        teacher = read(TeacherRecord, job.teacher / "teacher.json")
        if record is None or teacher is None:
            return False
        text = teacher.text and teacher.text.sha256
        inputs = [teacher.sha256, pipeline_sha256(job.teacher), text]
        expected = digest(job.fingerprint), digest([job.fingerprint, *inputs])
        return (record.fingerprint, record.run_id) == expected

    def pair_files(self, name: str) -> bool:
        record = read(PairRecord, self.paths.pairs(name) / "pairs.json")
        folder = self.paths.pairs(name)
        return record is not None and (folder / record.run_id / INDEX).exists()

    def run(self, student: str, seed: int) -> bool:
        job = self.experiment.student_run(student, seed)
        record = read(StudentRecord, job.folder / "student.json")
        if record is None or record.fingerprint != digest([job.fingerprint, job.budget]):
            return False
        data = read(DataRecord, self.paths.data / "data.json")
        teacher = read(TeacherRecord, job.teacher / "teacher.json")
        inputs: dict[str, object] = {
            "data": data and data.images_sha256,
            "teacher": teacher and teacher.sha256,
            "method": {path.name: sha256_file(path) for path in job.method_source},
        }
        for kind, folder, record_class in (
            ("pairs", job.pairs, PairRecord),
            ("features", job.features, FeatureRecord),
        ):
            found = folder and read(record_class, folder / f"{kind}.json")
            inputs[kind] = found and found.sha256
        return inputs.items() <= record.inputs.items()

    def imported(self, student: str, seed: int) -> bool:
        """Raises a `UserError` if the source is not the one that the experiment names."""
        return is_imported(self.experiment.student_run(student, seed))

    def scores(self, student: str, seed: int) -> bool:
        run = self.experiment.student_run(student, seed)
        path = self.paths.scores(student, seed)
        return self._are_current(lambda: run_scores(self.scoring, run, path))

    def reference_scores(self, teacher: str) -> bool:
        job, path = self.experiment.teacher_job(teacher), self.paths.reference_scores(teacher)
        return self._are_current(lambda: teacher_scores(self.scoring, job, path))

    def _are_current(self, load: Callable[[], ScoreRecord | None]) -> bool:
        """Whether scores are up to date and of the present feature networks."""
        try:
            scores = load()
        except UserError:
            return False
        if scores is None:
            return False
        for protocol in scores.protocols.values():
            path = self.paths.features(protocol["extractor"]) / "features.json"
            network = read(FeatureRecord, path)
            if network is None:
                return False
            hashes = protocol["extractor_sha256"]
            if network.run_id is not None and hashes.get("weights") != network.sha256:
                return False
        return True

    def agreement(self, scores: Path) -> bool:
        files = [self.paths.tables / name for name in AGREEMENT]
        return not_older(files, [scores])

    def report(self, inputs: list[Path]) -> bool:
        """The manifest is written last, and only if nothing failed."""
        path = self.paths.root / "manifest.json"
        try:
            manifest = read_json(path)
            outputs = [path, *(self.paths.root / name for name in manifest["outputs"])]
            same = manifest["config"] == self.experiment.raw
        except (UserError, KeyError, TypeError):
            return False
        return same and all(map(Path.exists, outputs)) and not_older([path], inputs)


def not_older(outputs: Iterable[Path], inputs: Iterable[Path]) -> bool:
    """Whether all outputs exist and none is older than an input, as Snakemake compares them."""
    outputs = list(outputs)
    if not all(map(Path.exists, outputs)):
        return False
    oldest = min(path.stat().st_mtime for path in outputs)
    return all(path.stat().st_mtime <= oldest for path in inputs if path.exists())


def all_stages(experiment: Experiment) -> dict[str, Stage]:
    """All stages by name, in an order in which they can run: every score follows its run."""
    paths, found, check = experiment.paths, {}, _Checks(experiment)
    evaluation = [f"features {name}" for name in experiment.evaluation.extractors]

    def add(name: str, record: Path, is_current: Callable, needs: Iterable[str] = (), **files):
        command, *arguments = name.split()
        order = tuple(dict.fromkeys(filter(None, needs)))
        found[name] = Stage(command, tuple(arguments), record, is_current, order, **files)

    add("data", paths.data / "data.json", check.data, has_files=check.images)
    for name, settings in experiment.features.items():
        record = paths.features(name) / "features.json"
        needs = ["data"] if FEATURES[settings.type].trained else []
        add(f"features {name}", record, lambda name=name: check.features(name), needs)
    for name in experiment.teachers:
        encoder = experiment.text_encoder_of(name)
        record = paths.teacher(name) / "teacher.json"
        needs = ["data", encoder and f"features {encoder}"]
        add(f"teacher {name}", record, lambda name=name: check.teacher(name), needs)
    for name, pairs in experiment.pair_sets.items():
        files = {"has_files": lambda name=name: check.pair_files(name)}
        record, needs = paths.pairs(name) / "pairs.json", ["data", f"teacher {pairs.teacher}"]
        add(f"pairs {name}", record, lambda name=name: check.pairs(name), needs, **files)
    for student, seed in experiment.runs:
        run, record = f"{student} {seed}", paths.run(student, seed) / "student.json"
        facts, command = experiment.students[student], "train"
        needs, is_current = ["data"], lambda run=(student, seed): check.run(*run)
        if student in experiment.released:
            command, is_current = "import-student", lambda run=(student, seed): check.imported(*run)
        else:
            features, pairs = facts.requirements.features, facts.pairs
            needs += [f"teacher {facts.teacher}", features and f"features {features}"]
            needs += [pairs and f"pairs {pairs.name}"]
        add(f"{command} {run}", record, is_current, needs)
        is_current = lambda run=(student, seed): check.scores(*run)  # noqa: E731
        needs = [f"{command} {run}", "data", *evaluation]
        add(f"score {run}", paths.scores(student, seed), is_current, needs)
    for name in experiment.teachers:
        is_current = lambda name=name: check.reference_scores(name)  # noqa: E731
        needs = [f"teacher {name}", "data", *evaluation]
        add(f"score-references {name}", paths.reference_scores(name), is_current, needs)
    if experiment.data.has_images and experiment.teachers:
        name = next(iter(experiment.teachers))
        scores = paths.reference_scores(name)
        needs = [f"score-references {name}", "data", *evaluation]
        add("agreement", paths.tables / AGREEMENT[-1], lambda: check.agreement(scores), needs)
    needs = [name for name, stage in found.items() if stage.command not in ("data", "pairs")]
    inputs = [found[name].record for name in needs]
    add("report", paths.root / "manifest.json", lambda: check.report(inputs), needs)
    return found


def unfinished(stages: dict[str, Stage]) -> list[str]:
    """Names of the stages that must run, in order: those without current results, all that depend
    on them, and those whose files are missing and are read by a stage that must run."""
    todo: set[str] = set()
    for name, stage in stages.items():
        if not todo.isdisjoint(stage.needs) or not stage.is_current():
            todo.add(name)
    for name, stage in reversed(stages.items()):
        readers = (other for other in todo if name in stages[other].needs)
        if name not in todo and any(True for _ in readers) and not stage.has_files():
            todo.add(name)
    return [name for name in stages if name in todo]
