# Scores: one job per run for all its snapshots, one per teacher (with the floor).
from harness.config.experiment import local_files
from harness.evaluation.fingerprints import (
    agreement_fingerprint,
    fingerprint,
    reference_fingerprint,
)

SCORING = E.scoring()
EXTRACTORS = expand(rules.features.output, features=E.evaluation.extractors)


use rule data as score_references with:
    input:
        teacher=rules.teacher.output,
        extractors=EXTRACTORS,
        statistics=local_files(E.evaluation.statistics),
    output:
        f"{ROOT}/scores/teachers/{{teacher}}.json",
    log:
        f"{ROOT}/logs/scores/teachers/{{teacher}}.log",
    resources:
        gpu=GPU,
        gpu_percent=WHOLE_GPU,
    params:
        command="score-references {teacher}",
        spec=lambda w: spec(reference_fingerprint(SCORING, E.teachers[w.teacher].sampler)),


use rule score_references as score with:
    input:
        run=rules.train.output,
        extractors=EXTRACTORS,
        statistics=local_files(E.evaluation.statistics),
    output:
        f"{ROOT}/scores/{{student}}/seed{{seed}}.json",
    log:
        f"{ROOT}/logs/scores/{{student}}/seed{{seed}}.log",
    priority: 1
    params:
        command="score {student} {seed}",
        spec=spec(fingerprint(SCORING)),


# Scores of other libraries for the same images; needs real images, and a teacher's samples.
AGREEMENT = [f"{ROOT}/tables/agreement.{kind}" for kind in ("csv", "md")]
AGREEMENT = AGREEMENT if E.data.has_images and E.teachers else []


use rule score_references as agreement with:
    input:
        scores=[E.paths.reference_scores(name) for name in list(E.teachers)[:1]],
        extractors=EXTRACTORS,
    output:
        AGREEMENT,
    log:
        f"{ROOT}/logs/agreement.log",
    params:
        command="agreement",
        spec=spec(agreement_fingerprint(SCORING)),
