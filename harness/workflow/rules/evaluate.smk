# Scores: one job per run for all its snapshots, one per teacher (with the floor).
from harness.evaluation import protocol

EXTRACTORS = expand(
    f"{E.paths.root}/features/{{features}}/features.json", features=E.evaluation.extractors
)
# The local file of published reference statistics, if any.
STATISTICS = E.statistics_files()


rule score:
    input:
        run=rules.train.output,
        extractors=EXTRACTORS,
        statistics=STATISTICS,
    output:
        f"{E.paths.root}/scores/{{student}}/seed{{seed}}.json",
    log:
        f"{E.paths.root}/logs/scores/{{student}}/seed{{seed}}.log",
    priority: 1
    threads: THREADS
    resources:
        gpu=GPU,
    params:
        spec=spec(protocol.fingerprint(E.scoring())),
    shell:
        "{HARNESS} score {wildcards.student} {wildcards.seed} --configfile {CONFIG} > {log} 2>&1"


rule score_references:
    input:
        teacher=rules.teacher.output,
        extractors=EXTRACTORS,
        statistics=STATISTICS,
    output:
        f"{E.paths.root}/scores/teachers/{{teacher}}.json",
    log:
        f"{E.paths.root}/logs/scores/teachers/{{teacher}}.log",
    threads: THREADS
    resources:
        gpu=GPU,
    params:
        spec=lambda w: spec(protocol.reference_fingerprint(E.reference_scoring(w.teacher))),
    shell:
        "{HARNESS} score-references {wildcards.teacher} --configfile {CONFIG} > {log} 2>&1"


# Scores of other libraries for the same images; needs real images.
AGREEMENT = (
    expand(f"{E.paths.root}/tables/agreement.{{kind}}", kind=("csv", "md"))
    if E.data.has_images
    else []
)


rule agreement:
    input:
        scores=f"{E.paths.root}/scores/teachers/{next(iter(E.teachers))}.json",
        extractors=EXTRACTORS,
    output:
        AGREEMENT,
    log:
        f"{E.paths.root}/logs/agreement.log",
    threads: THREADS
    resources:
        gpu=GPU,
    params:
        spec=spec(protocol.agreement_fingerprint(E.scoring())),
    shell:
        "{HARNESS} agreement --configfile {CONFIG} > {log} 2>&1"
