"""Texts of the command line: what `harness --help` and `harness COMMAND --help` explain."""

from collections.abc import Mapping

INTRODUCTION = """\
Distil one-step diffusion students from a teacher and compare them under one protocol.

Start with the whole workflow; it runs the stages below in order, and skips finished ones:
    snakemake --cores 8 all                                      the embedded digits
    snakemake --cores 8 all --configfile configs/mine.yaml       an experiment of your own
An experiment is one YAML file (README.md, "Experiments"). `harness COMMAND --help` explains a
command, docs/troubleshooting.md the messages."""

GROUPS = {
    "Before and during a run": ("plan", "status", "methods"),
    "Results": ("summary", "report", "compare", "prompts", "score-folder", "export", "prune"),
    "Stages, as the workflow runs them": (
        *("data", "features", "teacher", "pairs", "train", "import-student", "score"),
        *("score-references", "agreement"),
    ),
    "Official checkpoints and published numbers": (
        *("import-edm", "verify-data", "verify-teacher", "verify-released", "paper-tables"),
    ),
}

# What a command does beyond its first line, and an example.
DETAILS = {
    "plan": """\
Counts parameters, operations and memory of one training run per student, without data or weights
(two seconds a student), and estimates its hours on this machine.
Example: harness plan --configfile configs/fashion.yaml""",
    "status": """\
Reads results/<experiment> only, so it also shows a colleague's runs.
States: waiting, running, interrupted, failed, trained, scored.""",
    "methods": """\
Without NAME: all methods, and the origin of each default (the paper, the authors' code, or ours).
With NAME: its paper, equations and deviations, and all settings.
Example: harness methods sid""",
    "summary": "Prints tables/comparison.md of a finished experiment, one column per student.",
    "report": "Reads the scores in results/<experiment>; nothing is trained or scored again.",
    "compare": """\
Reads tables/metrics.csv and manifest.json of each folder; numbers of two protocols are never in one
column. Example: harness compare results/digits results/fashion""",
    "prompts": """\
For experiments with prompts: paired intervals, and the prompts on which each of the two leads.
Example: harness prompts dmd sid --configfile configs/digits-t2i.yaml""",
    "score-folder": """\
Scores them with the experiment's networks against its training images; the experiment's stages
data and features must have run.
Example: harness score-folder samples.zip --configfile configs/fashion.yaml""",
    "export": """\
The folder is loaded by harness.OneStepPipeline or, for Stable Diffusion and PixArt, by diffusers.
Example: harness export sid 0 my-student --configfile configs/fashion.yaml""",
    "prune": "Keeps all scores. Use --dry-run first: it only counts the bytes.",
    "data": "Writes results/<experiment>/data: images, labels and their split.",
    "features": "Writes results/<experiment>/features/<name>.",
    "teacher": "Writes results/<experiment>/teachers/<name>.",
    "pairs": "Noise and the teacher's image of it, for methods that learn from such pairs.",
    "train": """\
Trains to the budget, and continues from the last saved state.
Example: harness train sid 0 --configfile configs/fashion.yaml""",
    "import-student": "For students with a `source`; nothing is trained.",
    "score": "Example: harness score sid 0 --configfile configs/fashion.yaml",
    "score-references": """\
The rows that students are compared with: the teacher with all its steps and with one, and real
images against real images (the floor).""",
    "agreement": "Writes tables/agreement.md.",
    "import-edm": """\
Reads the tensors of a pickle of EDM, SiD or GDD; no code in the file is run.
Example: harness import-edm edm-cifar10-32x32-cond-vp.pkl checkpoints/edm""",
    "verify-data": """\
Fails above a Fréchet distance of 0.001, which shows other images, another detector or resize.""",
    "verify-teacher": "Scores the teacher first where that is missing.",
    "verify-released": "For the experiments configs/paper/*-released.yaml; nothing is trained.",
    "paper-tables": "Writes results/paper from all experiments in results/ with a section `paper`.",
}

ARGUMENTS = {
    "features": "name under `features` in the experiment",
    "teacher": "name under `teachers` in the experiment",
    "pairs": "name of a pair set; `harness status` and `snakemake -n` list them",
    "student": "name under `students` in the experiment",
    "seed": "training seed, one of `training.seeds`",
    "a": "a student, or teacher",
    "verify-teacher teacher": "name under `teachers`; default: the first",
    "score-folder folder": "folder or zip of images, in a layout that `data.source` may have",
    "export folder": "folder to write the pipeline to",
    "import-edm file": "official pickle (.pkl)",
    "import-edm folder": "folder to write the denoiser to",
    "compare folders": "folders of finished experiments, such as results/digits",
}


def overview(summaries: Mapping[str, str]) -> str:
    """The description of `harness --help`. summaries: the first line of each command's help."""
    lines, width = [INTRODUCTION], max(map(len, summaries))
    for title, names in GROUPS.items():
        lines += ["", f"{title}:"]
        lines += [f"  {name:<{width}}  {summaries[name]}" for name in names]
    return "\n".join(lines)


def description(command: str, summary: str) -> str:
    """The description of `harness COMMAND --help`."""
    first = f"{summary[0].upper()}{summary[1:]}."
    return "\n".join(filter(None, (first, DETAILS.get(command))))


def argument(command: str, name: str) -> str | None:
    """What an argument of a command means, where that is not told by its definition."""
    return ARGUMENTS.get(f"{command} {name}", ARGUMENTS.get(name))
