# Scores: one job per run for all its snapshots, one per teacher (with the floor).
from harness.evaluation import protocol

EXTRACTORS = expand(rules.features.output, features=E.evaluation.extractors)
# The local file of published reference statistics, if any.
STATISTICS = E.statistics_files()


rule score:
    input:
        run=rules.train.output,
        extractors=EXTRACTORS,
        statistics=STATISTICS,
    output:
        f"{ROOT}/scores/{{student}}/seed{{seed}}.json",
    log:
        f"{ROOT}/logs/scores/{{student}}/seed{{seed}}.log",
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
        f"{ROOT}/scores/teachers/{{teacher}}.json",
    log:
        f"{ROOT}/logs/scores/teachers/{{teacher}}.log",
    threads: THREADS
    resources:
        gpu=GPU,
    params:
        spec=lambda w: spec(
            protocol.reference_fingerprint(E.scoring(), E.teachers[w.teacher].sampler)
        ),
    shell:
        "{HARNESS} score-references {wildcards.teacher} --configfile {CONFIG} > {log} 2>&1"


# Scores of other libraries for the same images; needs real images.
AGREEMENT = [f"{ROOT}/tables/agreement.{kind}" for kind in ("csv", "md") if E.data.has_images]


rule agreement:
    input:
        scores=E.paths.reference_scores(next(iter(E.teachers))),
        extractors=EXTRACTORS,
    output:
        AGREEMENT,
    log:
        f"{ROOT}/logs/agreement.log",
    threads: THREADS
    resources:
        gpu=GPU,
    params:
        spec=spec(protocol.agreement_fingerprint(E.scoring())),
    shell:
        "{HARNESS} agreement --configfile {CONFIG} > {log} 2>&1"
