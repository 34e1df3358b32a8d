"""Students that are released weights: the authors' one-step networks, scored like a student's.

They show whether sampling, preconditioning and FID here are those of a paper, before anything is
trained. Everything that a user sees says that they were not trained here: their names end in
`-released`, their scores have the flag `released`, and tables name the file.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pydantic import ValidationError

from harness.config.jobs import Student, StudentRun
from harness.config.loading import translate
from harness.config.schema import DataSection, ReleasedStudent
from harness.data.registry import has_texts
from harness.denoiser import Denoiser
from harness.errors import Problem, UserError
from harness.io.artifacts import digest, sha256_file, verify
from harness.io.downloads import fetch, source_problems
from harness.io.records import StudentRecord
from harness.method import METHODS, Requirements
from harness.networks import WEIGHTS
from harness.teachers.edm_pickle import imported_file

SUFFIX = "-released"
SNAPSHOT = "released"


def resolve(name: str, section: ReleasedStudent) -> Student:
    """A student that needs only its file. Its settings are the method's defaults, those of
    the paper, with its own changes; shared ones of `training.settings` are for training."""
    return Student(
        name=name,
        method=section.method,
        settings=METHODS[section.method].Config(**section.settings),
        requirements=Requirements(),
        teacher=None,
        freeze=section.freeze,
        lora=None,
        budget=(),
        snapshots={},
        pairs=None,
        source=section.source,
        sha256=section.sha256,
    )


def check(
    name: str, section: ReleasedStudent, data: DataSection | None, files: bool
) -> Iterator[Problem]:
    """Errors in a student with a `source` (see `harness.students.checks`)."""
    where = f"students.{name}"
    if not name.endswith(SUFFIX):
        message = f"the name of released weights must end in {SUFFIX}: they are not trained here"
        yield Problem(where, "released-name", message)
    keys = {"sha256_key": f"{where}.sha256", "required": files, "folder": True}
    yield from source_problems(f"{where}.source", section.source, section.sha256, **keys)
    if files and (folder := Path(section.source).expanduser()).is_dir():
        try:
            imported_file(folder)
        except UserError as error:
            yield Problem(f"{where}.source", error.code, str(error))
    if data is not None and has_texts(data):
        message = "released weights of text-to-image models cannot be imported"
        yield Problem(where, "reads-no-text", message)
    try:
        METHODS[section.method].Config(**section.settings)
    except UserError as error:
        yield Problem(f"{where}.method", error.code, str(error))
    except ValidationError as error:
        yield from translate(error, METHODS[section.method].Config, f"{where}.settings")


def import_student(run: StudentRun) -> StudentRecord:
    """Import a student's released weights as its only snapshot, and write `student.json`."""
    from harness.data import datasets
    from harness.io.artifacts import atomic_folder, link, write_json
    from harness.io.locks import run_lock
    from harness.networks import save_denoiser
    from harness.students.run import describe
    from harness.teachers.stage import check_shapes, read_denoiser

    student = run.student
    sha256 = released_sha256(student)
    denoiser, _ = read_denoiser(student.source, None if is_folder(student) else sha256)
    check_shapes(f"student {student.name}", denoiser, datasets.load(run.data, images=False))
    check_settings(student, denoiser)
    source = {"source": student.source, "sha256": sha256}
    run_id = digest([run.fingerprint, source])
    extra = {"sigma_init": student.settings.sigma_init, "imported": source}
    with run_lock(run.folder):
        folder = run.folder / "runs" / run_id
        with atomic_folder(folder / "snapshots" / SNAPSHOT) as temporary:
            weights = save_denoiser(denoiser, temporary, extra)
            snapshot = {"name": SNAPSHOT, "sha256": weights, "grid": [], "step": 0, "before": {}}
            write_json(temporary / "snapshot.json", snapshot)
        link(run.folder / "snapshots", folder / "snapshots")
        link(run.folder / "model", folder / "snapshots" / SNAPSHOT)
        # What its authors trained it against still decides which scores are flagged.
        needs = METHODS[student.method].requirements(student.settings)
        facts = describe(replace(run, student=replace(student, requirements=needs)))
        record = StudentRecord(
            fingerprint=digest([run.fingerprint, run.budget]),
            **facts | {"deviations": []},  # of methods here
            released=source,
            run_id=run_id,
            sha256=weights,
            parameters=sum(p.numel() for p in denoiser.parameters()),
            inputs={"source": sha256},
            snapshots=[snapshot],
            contended=False,
        )
        record.write(run.folder / "student.json")
    return record


def is_folder(student: Student) -> bool:
    """Whether the source is a folder that `import-edm` made, not a pickle."""
    return Path(student.source).expanduser().is_dir()


def released_sha256(student: Student) -> str:
    """The sha256 of the pickle that a student's weights are from; of a folder, the recorded one. A
    `UserError` if it is not the student's `sha256`, or if the folder's weights were replaced."""
    if not is_folder(student):
        return sha256_file(fetch(student.source, student.sha256))
    folder = Path(student.source).expanduser()
    record = imported_file(folder)
    verify(folder / WEIGHTS, record["weights"])
    if student.sha256 not in (None, record["sha256"]):
        message = f"{folder} is from a pickle with sha256 {record['sha256']}, not {student.sha256}"
        raise UserError(f"students.{student.name}.sha256: {message}", "checksum")
    return record["sha256"]


def is_imported(run: StudentRun) -> bool:
    """Whether the weights of the current source have been imported with the current settings."""
    record = StudentRecord.read_optional(run.folder / "student.json")
    return (
        record is not None
        and record.fingerprint == digest([run.fingerprint, run.budget])
        and record.released is not None
        and record.released["sha256"] == released_sha256(run.student)
    )


def check_settings(student: Student, denoiser: Denoiser) -> None:
    """Compare the network with a setting that changes a student's images: `epsilon` of GDD's
    preconditioning, which other methods do not have."""
    value = getattr(denoiser, "epsilon", 0.0)
    if value != (expected := getattr(student.settings, "epsilon", 0.0)):
        message = f"the network has {value:g}, not {expected:g}; is {student.source} the file?"
        raise UserError(f"students.{student.name}.settings.epsilon: {message}", "network")
