# Distil, sample, score and compare: `snakemake --cores 8 all`.
# The experiment is configs/digits.yaml, or whatever --configfile names (which replaces it wholly).
from snakemake.utils import min_version

min_version("9.27")

if not workflow.configfiles:

    configfile: "configs/digits.yaml"


include: "harness/workflow/rules/common.smk"
include: "harness/workflow/rules/prepare.smk"
include: "harness/workflow/rules/distil.smk"
include: "harness/workflow/rules/evaluate.smk"
include: "harness/workflow/rules/report.smk"


# Weights that cannot be had stop the workflow here, not after hours of training a teacher.
onstart:
    fetch_pretrained()


localrules:
    all,


rule all:
    default_target: True
    input:
        REPORT,
