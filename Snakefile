# Distil, sample, score and compare: `snakemake --cores 8 all`.
# --configfile replaces the default experiment, configs/digits.yaml. Results, and all relative paths
# in an experiment, are in the working directory (--directory), wherever this file is.
from snakemake.utils import min_version

min_version("9.27")

if not workflow.configfiles:

    configfile: f"{workflow.basedir}/configs/digits.yaml"


include: "harness/workflow/rules/common.smk"
include: "harness/workflow/rules/prepare.smk"
include: "harness/workflow/rules/distil.smk"
include: "harness/workflow/rules/evaluate.smk"
include: "harness/workflow/rules/report.smk"


# If pretrained weights are not available, stop here and not after hours of teacher training.
onstart:
    with one_line_errors():
        fetch_pretrained(E.students.values())
    INTERRUPTION.started = True


localrules:
    all,


rule all:
    default_target: True
    input:
        REPORT,
