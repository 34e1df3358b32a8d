"""The command line. Each stage imports what it needs when it is called."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from harness.errors import UserError, did_you_mean
from harness.io.locks import machine_slot
from harness.workflow.failures import recorded
from harness.workflow.machine import is_first, launched, relaunch

FULL = "No space left on device"  # the system's words, whichever library passes them on
SMALLER = (
    "A smaller training.micro_batch (or gradient_checkpointing, or lora) takes less for training, "
    "a smaller evaluation.block less for sampling and pairs."
)
DEFAULT_CONFIG = Path("configs/digits.yaml")


def _experiment(args):
    from harness.validation import load_experiment

    return load_experiment(args.configfile)


def _check_known(what: str, name: str, known) -> None:
    if name not in known:
        raise UserError(f"unknown {what} {name!r}{did_you_mean(name, known)}")


def _threads(args) -> None:
    import torch

    torch.set_num_threads(args.threads)


def _data(args) -> None:
    from harness.data.datasets import prepare
    from harness.evaluation.metrics import fewest

    experiment = _experiment(args)
    with recorded(experiment.data_dir(), "data"):
        sizes = fewest(experiment.evaluation.neighbours)
        prepare(experiment.data, experiment.data_dir(), sizes)


def _features(args) -> None:
    from harness.features.train import make_features

    _threads(args)
    experiment = _experiment(args)
    _check_known("feature network", args.name, experiment.features)
    with recorded(experiment.features_dir(args.name), "training"), machine_slot():
        make_features(experiment, args.name)


def _teacher(args) -> None:
    from harness.teachers.train import make_teacher

    _threads(args)
    experiment = _experiment(args)
    _check_known("teacher", args.name, experiment.teachers)
    relaunch(experiment.processes(experiment.job_batch("teacher", args.name)), args.argv)
    with recorded(experiment.teacher_dir(args.name), "training"), machine_slot():
        make_teacher(experiment, args.name)


def _pairs(args) -> None:
    from harness.teachers.pairs import make_pairs
    from harness.training.distributed import processes

    _threads(args)
    experiment = _experiment(args)
    _check_known("pair set", args.name, experiment.pair_sets)
    relaunch(experiment.processes(), args.argv)
    with (
        recorded(experiment.pairs_dir(args.name), f"pairs {args.name}"),
        processes().leading(machine_slot(exclusive=experiment.seconds_budget)) as alone,
    ):
        make_pairs(experiment, args.name, alone)


def _train(args) -> None:
    from harness.students.run import train_student

    _threads(args)
    experiment = _experiment(args)
    _check_known("student", args.student, experiment.students)
    relaunch(experiment.processes(experiment.job_batch("train", args.student)), args.argv)
    with recorded(experiment.run_dir(args.student, args.seed), "training"):
        train_student(experiment, args.student, args.seed)


def _score(args) -> None:
    from harness.evaluation.score import score_run

    _threads(args)
    experiment = _experiment(args)
    _check_known("student", args.student, experiment.students)
    relaunch(experiment.processes(), args.argv)
    with recorded(experiment.run_dir(args.student, args.seed), "scoring"), machine_slot():
        score_run(experiment, args.student, args.seed)


def _score_references(args) -> None:
    from harness.evaluation.score import score_references

    _threads(args)
    experiment = _experiment(args)
    _check_known("teacher", args.name, experiment.teachers)
    relaunch(experiment.processes(), args.argv)
    with recorded(experiment.teacher_dir(args.name), "scoring"), machine_slot():
        score_references(experiment, args.name)


def _agreement(args) -> None:
    from harness.evaluation.agreement import write_agreement

    _threads(args)
    experiment = _experiment(args)
    with machine_slot():
        table = write_agreement(experiment)
    for row in table[table.agrees == "no"].itertuples():
        print(
            f"{row.quantity} in {row.extractor}: {row.ours:.8g} here, {row.theirs:.8g} by "
            f"{row.library}",
            file=sys.stderr,
        )


def _score_folder(args) -> None:
    from harness.evaluation.folder import print_folder

    _threads(args)
    experiment = _experiment(args)
    with machine_slot():
        print_folder(experiment, args.folder)


def _verify_teacher(args) -> None:
    from harness.reporting.collect import reference_scores
    from harness.reporting.verify import check_made, teacher_lines

    experiment = _experiment(args)
    args.name = args.name or next(iter(experiment.teachers))
    _check_known("teacher", args.name, experiment.teachers)
    if reference_scores(experiment, args.name) is None:
        check_made(experiment, args.name, args.configfile)
        _score_references(args)
    if is_first():
        print(*teacher_lines(experiment, args.name), sep="\n")


def _report(args) -> None:
    from harness.reporting.report import write_report

    write_report(_experiment(args), args.partial)


def _paper_tables(args) -> None:
    from harness.reporting.published.tables import write_paper_tables

    write_paper_tables()


def _compare(args) -> None:
    from harness.reporting.compare import print_side_by_side

    print_side_by_side(args.folders, args.out)


def _prompts(args) -> None:
    from harness.reporting.prompt_comparison import print_prompts

    experiment = _experiment(args)
    for name in (args.a, args.b):
        _check_known("student", name, ["teacher", *experiment.students])
    print_prompts(experiment, args.a, args.b, args.seed)


def _export(args) -> None:
    from harness.students.export import export_student

    experiment = _experiment(args)
    _check_known("student", args.student, experiment.students)
    export_student(experiment, args.student, args.seed, args.folder)
    print(f"{args.folder}: a diffusers pipeline; README.md is its model card")


def _summary(args) -> None:
    from harness.reporting.report import print_summary

    print_summary(_experiment(args))


def _status(args) -> None:
    from harness.workflow.status import print_status

    print_status(_experiment(args))


def _plan(args) -> None:
    from harness.validation import load_experiment
    from harness.workflow.plan import print_plan

    print_plan(load_experiment(args.configfile, files=False), args.tflops)


def _import_edm(args) -> None:
    from harness.teachers.edm_pickle import import_edm

    made = import_edm(args.file, args.folder)
    print(f"{args.folder}: {made['parameters']:,} parameters from {made['file']}")
    print("The licence of the checkpoint stays (NVIDIA's official ones: CC BY-NC-SA 4.0).")


def _methods(args) -> None:
    from harness.method import get_method, method_names

    for name in method_names():
        method = get_method(name)
        print(f"{name}: {method.paper}{'' if method.data_free else ' (needs real images)'}")
        for key, field in method.Config.model_fields.items():
            origin = field.json_schema_extra["origin"]
            print(f"    {key} = {field.default!r}  ({origin}: {field.description})")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m harness", description=__doc__)
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")

    def stage(name: str, function, help: str) -> argparse.ArgumentParser:
        sub = stages.add_parser(name, help=help, description=help)
        sub.add_argument("--configfile", type=Path, default=DEFAULT_CONFIG, help="experiment file")
        sub.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
        sub.set_defaults(function=function)
        return sub

    stage("data", _data, "read the data set and split it")
    stage("features", _features, "train or fetch a feature network").add_argument("name")
    stage("teacher", _teacher, "train or import a teacher").add_argument("name")
    stage("pairs", _pairs, "generate a set of teacher pairs").add_argument("name")
    train = stage("train", _train, "distil one student")
    train.add_argument("student")
    train.add_argument("seed", type=int)
    score = stage("score", _score, "score every snapshot of a run")
    score.add_argument("student")
    score.add_argument("seed", type=int)
    stage(
        "score-references", _score_references, "score a teacher, its one-step images and the floor"
    ).add_argument("name")
    stage("agreement", _agreement, "the same images scored here, by torch-fidelity and clean-fid")
    folder = stage("score-folder", _score_folder, "score a folder or zip of images from elsewhere")
    folder.add_argument("folder", type=Path)
    verify = stage("verify-teacher", _verify_teacher, "compare a teacher with its published FIDs")
    verify.add_argument("name", nargs="?", help="default: the experiment's teacher")
    prompted = stage("prompts", _prompts, "two students prompt by prompt: where each of them leads")
    prompted.add_argument("a")
    prompted.add_argument("b", help="another student, or teacher: the first of the experiment")
    prompted.add_argument("--seed", type=int, help="training seed; default: the first")
    exported = stage("export", _export, "write a student as a diffusers pipeline with a model card")
    exported.add_argument("student")
    exported.add_argument("seed", type=int)
    exported.add_argument("folder", type=Path)
    report = stage("report", _report, "tables, figures, report.html and manifest from the scores")
    report.add_argument("--partial", action="store_true", help="show missing runs as failed")
    stage("summary", _summary, "print the comparison table")
    stage("status", _status, "show how far every run is")
    compared = stages.add_parser("compare", help="put finished experiments side by side")
    compared.add_argument("folders", type=Path, nargs="+", help="results/a results/b …")
    compared.add_argument("--out", type=Path, help="write all columns to this CSV file")
    compared.set_defaults(function=_compare)
    tables = stages.add_parser("paper-tables", help="the papers' tables beside all runs here")
    tables.set_defaults(function=_paper_tables)
    planned = stage("plan", _plan, "what every student will cost, before anything starts")
    planned.add_argument("--tflops", type=float, default=100.0, help="sustained TFLOP/s")
    imported = stages.add_parser(
        "import-edm", help="convert an official EDM pickle, running nothing"
    )
    imported.add_argument("file", type=Path)
    imported.add_argument("folder", type=Path)
    imported.set_defaults(function=_import_edm)
    stage("methods", _methods, "list the methods and where each default comes from")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    args.argv = argv or sys.argv[1:]
    # A log begins with the command that repeats it.
    if not sys.stderr.isatty() and not launched():
        print("$ python -m harness", *args.argv, file=sys.stderr, flush=True)
    try:
        args.function(args)
    except UserError as error:
        who = "" if is_first() else f"process {os.environ['RANK']}: "
        print(f"{who}error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":
            print(f"error: {' '.join(str(error).split())[:200]}\n{SMALLER}", file=sys.stderr)
            return 2
        if FULL not in str(error):
            raise
        print(f"error: {FULL} ({error}); make some and run the same command again", file=sys.stderr)
        return 2
    return 0
