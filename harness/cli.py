"""Distil one-step diffusion students and compare them: stages of the workflow, and tools."""

import argparse
import contextlib
import importlib
import logging
import math
import os
import shlex
import sys
from pathlib import Path

from harness.errors import (
    INTERRUPTED,
    UserError,
    did_you_mean,
    file_system_error,
    file_system_message,
)
from harness.io import environment, logs
from harness.io.downloads import expand
from harness.io.environment import is_first, launched
from harness.io.locks import machine_slot
from harness.workflow import help as texts
from harness.workflow.machine import record_failure, relaunch

logger = logging.getLogger(__name__)


def path(text: str) -> Path:
    """A path of the command line. A shell does not replace the `~` of `--option=~/x`."""
    try:
        return expand(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str) -> float:
    """A finite number above 0 of the command line."""
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number above 0")
    return value


def seed(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


CONFIGFILE = "experiment file; default: configs/digits.yaml, the embedded digits"
ARGUMENTS = {
    "seed": {"type": seed},
    "name": {"help": "method; default: all"},
    "--plugin": {"type": path, "action": "append", "help": "file that defines a method"},
    "file": {"type": path},
    "folder": {"type": path},
    "folders": {"type": path, "nargs": "+"},
    "b": {"help": "another student, or teacher: the first of the experiment"},
    "--seed": {"type": seed, "help": "training seed; default: the first"},
    "--partial": {"action": "store_true", "help": "show missing runs as failed"},
    "--dry-run": {"action": "store_true", "help": "remove nothing"},
    "--tflops": {"type": positive, "help": "sustained TFLOP/s; default: measured on this machine"},
    "--push-to-hub": {
        "metavar": "OWNER/NAME",
        "help": "also upload to this Hugging Face repository",
    },
    "--private": {"action": "store_true", "help": "make a new repository private"},
    "--revision": {"metavar": "BRANCH", "help": "upload to this branch; default: main"},
    "--commit-message": {"metavar": "TEXT", "help": "of the upload"},
    "--out": {"type": path, "help": "write all columns to this CSV file"},
    "--metric": {
        **{"action": "append", "default": [], "metavar": "NAME"},
        "help": "only this metric, at the largest sample count; may be repeated",
    },
    "--all": {"action": "store_true", "help": "every metric and sample count"},
    "--configfile": {"type": path, "default": "configs/digits.yaml", "help": CONFIGFILE},
}
KINDS = {"features": "feature network", "pairs": "pair set", "a": "student", "b": "student"}
COMMANDS = {}
STAGES = set()  # commands that continue where they were interrupted
OUT_OF_MEMORY = (
    "\nFor training, reduce training.micro_batch, or set gradient_checkpointing or lora; for "
    "sampling and pairs, reduce evaluation.block."
)


def call(name: str, *args, **options):
    """Import and call `harness.<name>`, so that a command loads only the libraries it needs."""
    module, _, function = name.rpartition(".")
    return getattr(importlib.import_module(f"harness.{module}"), function)(*args, **options)


def tool(help: str, arguments: str = "", configfile: bool = True, files: bool = True):
    """Register `harness <function name>`, which takes the experiment and the parsed arguments, or
    only these without `configfile`. files: local files of the experiment must exist."""

    def decorate(function):
        def run(args: argparse.Namespace) -> None:
            if not configfile:
                return function(args)
            if args.configfile.suffix == ".json":  # the workflow's snapshot, checked before
                experiment = call("validation.load_snapshot", args.configfile)
            else:
                experiment = call("validation.load_experiment", args.configfile, files=files)
            rows = ["teacher", *experiment.students]
            known = {"student": experiment.students, "teacher": experiment.teachers}
            known |= {"features": experiment.features, "pairs": experiment.pair_sets}
            for argument, names in (known | {"a": rows, "b": rows}).items():
                name, kind = getattr(args, argument, None), KINDS.get(argument, argument)
                if name is not None and name not in names:
                    hint = did_you_mean(name, names)
                    raise UserError(f"unknown {kind} {name!r}{hint}", "unknown-name")
            _check_released(experiment, args)
            function(experiment, args)

        run.help, run.arguments = help, arguments.split() + ["--configfile"] * configfile
        COMMANDS[function.__name__.replace("_", "-")] = run
        return run

    return decorate


def _check_released(experiment, args: argparse.Namespace) -> None:
    """Released weights are only imported and scored; other students are trained."""
    name, command = getattr(args, "student", None), args.command
    if name in experiment.released and command in ("train", "export"):
        message = "released weights are not trained here; use import-student and score"
        raise UserError(f"students.{name}: {message}", "released")
    if command == "import-student" and name not in experiment.released:
        raise UserError(f"students.{name}: has no source to import; use train", "not-released")


def stage(help: str, arguments: str = "", label: str = "", slot: bool = True, many: bool = False):
    """Register a command that trains or scores: on one CPU thread per process, with its name in the
    log and its failure recorded in the folder of what it makes. label: what failed; default: that
    name. slot: wait for runs that need the machine to themselves. many: use several processes."""

    def decorate(function):
        def run(experiment, args: argparse.Namespace) -> None:
            import torch

            torch.set_num_threads(1)  # results depend on it: sums are split by thread
            experiment.check_device()
            if many:
                relaunch(experiment.processes(_parts(experiment, args)), args.argv)
            name, folder = _product(experiment, args)
            none = contextlib.nullcontext()
            record = record_failure(folder, label or name) if folder else none
            logs.set_run_name(name)
            with record, machine_slot() if slot else none:
                function(experiment, args)

        run.__name__ = function.__name__
        STAGES.add(function.__name__.replace("_", "-"))
        return tool(help, arguments)(run)

    return decorate


def _product(experiment, args: argparse.Namespace) -> tuple[str, Path | None]:
    """Name and folder of what a stage makes; ("", None) for one that makes no folder."""
    paths = experiment.paths
    if hasattr(args, "student"):
        return f"{args.student}/seed{args.seed}", paths.run(args.student, args.seed)
    for kind in ("features", "teacher", "pairs"):
        if name := getattr(args, kind, None):
            return f"{kind} {name}", getattr(paths, kind)(name)
    return ("data", paths.data) if args.command == "data" else ("", None)


def _parts(experiment, args: argparse.Namespace) -> int | None:
    """The parts of a batch that the processes of a stage divide; None if they divide no batch."""
    if args.command == "train":
        student = experiment.students[args.student]
        return student.settings.batch // student.requirements.ghost_batch
    if args.command == "teacher":  # one process imports a teacher
        return getattr(experiment.teachers[args.teacher], "batch", 1)
    return None


@stage("read the data set and split it")
def data(experiment, args):
    sizes = call("evaluation.checks.minimum_samples", experiment.evaluation.neighbours)
    paths, fingerprint = experiment.paths, experiment.prepared_data
    call("data.datasets.prepare", experiment.data, paths.data, sizes, fingerprint)


@stage("train or fetch a feature network", "features")
def features(experiment, args):
    call("features.base.make_features", experiment.feature_job(args.features))


@stage("train or import a teacher", "teacher", many=True)
def teacher(experiment, args):
    call("teachers.stage.make_teacher", experiment.teacher_job(args.teacher))


@stage("generate a set of teacher pairs", "pairs", slot=False, many=True)
def pairs(experiment, args):
    call("teachers.pairs.make_pairs", experiment.pair_job(args.pairs))


@stage("distil one student", "student seed", label="training", slot=False, many=True)
def train(experiment, args):
    call("students.run.train_student", experiment.student_run(args.student, args.seed))


@stage("import the released weights of a student", "student seed", label="import")
def import_student(experiment, args):
    call("students.released.import_student", experiment.student_run(args.student, args.seed))


@stage("score every snapshot of a run", "student seed", label="scoring", many=True)
def score(experiment, args):
    run = experiment.student_run(args.student, args.seed)
    output = experiment.paths.scores(args.student, args.seed)
    call("evaluation.stage.score_run", experiment.scoring(), run, output)


@stage("score a teacher and the floor", "teacher", label="scoring", many=True)
def score_references(experiment, args):
    job = experiment.teacher_job(args.teacher)
    output = experiment.paths.reference_scores(args.teacher)
    call("evaluation.stage.score_references", experiment.scoring(), job, output)


@stage("score the same images here, by torch-fidelity and by clean-fid")
def agreement(experiment, args):
    teacher, paths = next(iter(experiment.teachers)), experiment.paths
    files = paths.reference_scores(teacher), paths.tables
    table = call("evaluation.agreement.write_agreement", experiment.scoring(), teacher, *files)
    for row in table[table.agrees == "no"].itertuples():
        values = f"{row.ours:.8g} here, {row.theirs:.8g} by {row.library}"
        logger.warning("%s in %s: %s", row.quantity, row.extractor, values)


@stage("score a folder, zip, parquet or .npz file of images from elsewhere", "folder")
def score_folder(experiment, args):
    call("evaluation.stage.print_folder", experiment.scoring(), args.folder)


@tool("compare a teacher with its published FIDs", "teacher?")
def verify_teacher(experiment, args):
    args.teacher = args.teacher or next(iter(experiment.teachers))
    if call("reporting.collect.current_scores", experiment, args.teacher) is None:
        call("reporting.published.tables.check_inputs", experiment, args.teacher, args.configfile)
        score_references(args)
    if is_first():
        print(*call("reporting.published.tables.teacher_lines", experiment, args.teacher), sep="\n")


@stage("compare the training images with the published statistics of the FID")
def verify_data(experiment, args):
    scoring = experiment.scoring()
    inputs = experiment.prepared_data, experiment.data_files(), args.configfile
    call("evaluation.verify_data.check_inputs", scoring, *inputs)
    print(call("evaluation.verify_data.verify_data", scoring))


@tool("score the authors' released students and compare them with their published FIDs")
def verify_released(experiment, args):
    gate = "reporting.published.released"
    call(f"{gate}.check", experiment, args.configfile)
    for command, values in call(f"{gate}.stages", experiment, args.configfile):
        COMMANDS[command](argparse.Namespace(**vars(args) | values))
    if is_first():
        call(f"{gate}.verify", experiment)


@tool("write tables, figures, report.html and manifest", "--partial")
def report(experiment, args):
    call("reporting.report.write_report", experiment, args.partial)


@tool("print the comparison table")
def summary(experiment, args):
    call("reporting.report.print_summary", experiment)


@tool("show the progress of every run")
def status(experiment, args):
    call("workflow.status.print_status", experiment)


@tool("estimate the cost of every student", "--tflops", files=False)
def plan(experiment, args):
    call("workflow.plan.print_plan", experiment, args.tflops)


@tool("remove the weights of scored snapshots but the best and the last", "--dry-run", files=False)
def prune(experiment, args):
    runs = [
        (experiment.student_run(*run), experiment.paths.scores(*run)) for run in experiment.runs
    ]
    call("evaluation.prune.prune", experiment.scoring(), runs, args.dry_run)


@tool("compare two students prompt by prompt", "a b --seed")
def prompts(experiment, args):
    call("reporting.compare.print_prompts", experiment, args.a, args.b, args.seed)


@tool(
    "write a student as a diffusers pipeline with a model card",
    "student seed folder --push-to-hub --private --revision --commit-message",
)
def export(experiment, args):
    run = experiment.student_run(args.student, args.seed)
    teacher = experiment.teacher_job(run.student.teacher)
    scores, target = experiment.paths.scores(args.student, args.seed), None
    if args.push_to_hub is not None:
        options = args.private or None, args.revision, args.commit_message
        target = call("io.uploads.Destination", args.push_to_hub, *options)
    elif args.private or args.revision or args.commit_message:
        raise UserError("--private, --revision, --commit-message need --push-to-hub", "arguments")
    address = call("students.export.export_student", run, teacher, scores, args.folder, target)
    print(f"{args.folder}: a diffusers pipeline; README.md is its model card")
    if address:
        print(f"uploaded to {address}")


@tool("compare finished experiments", "folders --metric --all --out", configfile=False)
def compare(args):
    call("reporting.compare.print_comparison", args.folders, args.out, args.metric, args.all)


@tool("print the papers' tables with the results of all experiments", configfile=False)
def paper_tables(args):
    from harness.validation import parse_experiment

    call("reporting.published.tables.write_paper_tables", parse_experiment)


@tool("convert an official EDM pickle without running it", "file folder", configfile=False)
def import_edm(args):
    record = call("teachers.edm_pickle.import_edm", args.file, args.folder)
    print(f"{args.folder}: {record['parameters']:,} parameters from {record['file']}")
    print("The licence of the checkpoint still applies (NVIDIA's: CC BY-NC-SA 4.0).")


@tool("show the methods, or one of them in full", "name? --plugin", configfile=False)
def methods(args):
    for file in args.plugin or ():
        call("registry.load_plugin", file)
    call("workflow.methods.print_methods", args.name)


def _parser() -> argparse.ArgumentParser:
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    text = texts.overview({name: run.help for name, run in COMMANDS.items()})
    parser = argparse.ArgumentParser(prog="harness", description=text, **style)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run in COMMANDS.items():
        sub = commands.add_parser(name, description=texts.description(name, run.help), **style)
        for argument in run.arguments:
            plain = argument.rstrip("?")
            options = {"nargs": "?"} if argument != plain else {}
            options |= {"help": texts.argument(name, plain)} | ARGUMENTS.get(plain, {})
            sub.add_argument(plain, **options)
    return parser


def _interrupted(command: str) -> int:
    """Print one line after Ctrl-C; returns the exit status."""
    if is_first():
        continues = "; the same command continues" if command in STAGES else ""
        print(f"{command}: interrupted{continues}", file=sys.stderr)
    if launched():  # torchrun passes the signal on once more, and a collective may still wait
        sys.stderr.flush()
        os._exit(INTERRUPTED)
    return INTERRUPTED


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status: 2 for an error that the user can fix."""
    logs.configure(logging.INFO if is_first() else logging.ERROR)
    environment.prepare()
    args = _parser().parse_args(argv)
    args.argv = argv or sys.argv[1:]
    if not sys.stderr.isatty() and not launched():  # a log file begins with its command
        logger.info("python -m harness %s", shlex.join(args.argv))
    process = "" if is_first() else f"process {os.environ['RANK']}: "
    try:
        COMMANDS[args.command](args)
    except KeyboardInterrupt:
        return _interrupted(args.command)
    except BrokenPipeError:  # as in `harness summary | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        message = " ".join(str(error).split())[:200]
        if isinstance(error, UserError):
            message = str(error)
        elif type(error).__name__ == "OutOfMemoryError":
            message += OUT_OF_MEMORY
        elif (found := file_system_error(error)) is not None:
            message = file_system_message(found)
        else:
            raise
        print(f"{process}error: {message}", file=sys.stderr)
        return 2
    return 0
