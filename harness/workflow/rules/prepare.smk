# Inputs of students: data, feature networks, teachers, teacher pairs.


rule data:
    input:
        lambda w: E.data_files(),
    output:
        f"{ROOT}/data/data.json",
    log:
        f"{ROOT}/logs/data.log",
    threads: THREADS
    params:
        spec=spec(E.preparation_fingerprint),
    shell:
        "{HARNESS} data --configfile {CONFIG} > {log} 2>&1"


rule features:
    input:
        rules.data.output,
    output:
        f"{ROOT}/features/{{features}}/features.json",
    log:
        f"{ROOT}/logs/features/{{features}}.log",
    benchmark:
        f"{ROOT}/benchmarks/features/{{features}}.tsv"
    threads: THREADS
    resources:
        gpu=GPU,
    params:
        spec=lambda w: spec(E.features_fingerprint(w.features)),
    shell:
        "{HARNESS} features {wildcards.features} --configfile {CONFIG} > {log} 2>&1"


# All students wait for a teacher, and a teacher waits for its text encoder: train these first.
use rule features as text_encoder with:
    wildcard_constraints:
        features="|".join(map(re.escape, filter(None, map(E.text_encoder_of, E.teachers))))
        or "none",
    priority: 20


ruleorder: text_encoder > features


def teacher_inputs(w):
    """Local files of an imported teacher; the text encoder of a teacher trained on captions."""
    encoder = E.text_encoder_of(w.teacher)
    return E.teacher_files(w.teacher) + expand(rules.features.output, features=encoder or [])


rule teacher:
    input:
        rules.data.output,
        source=teacher_inputs,
    output:
        f"{ROOT}/teachers/{{teacher}}/teacher.json",
    log:
        f"{ROOT}/logs/teachers/{{teacher}}.log",
    benchmark:
        f"{ROOT}/benchmarks/teachers/{{teacher}}.tsv"
    priority: 10
    threads: THREADS
    resources:
        gpu=GPU,
    params:
        spec=lambda w: spec(E.teacher_fingerprint(w.teacher)),
    shell:
        "{HARNESS} teacher {wildcards.teacher} --configfile {CONFIG} > {log} 2>&1"


rule pairs:
    input:
        lambda w: E.pair_job(w.pairs).teacher / "teacher.json",
    output:
        f"{ROOT}/pairs/{{pairs}}/pairs.json",
    log:
        f"{ROOT}/logs/pairs/{{pairs}}.log",
    priority: 5
    # The seconds of a pair set are charged to the runs that use it.
    threads: EXCLUSIVE_THREADS
    resources:
        **EXCLUSIVE,
        gpu=GPU,
    params:
        spec=lambda w: spec(E.pairs_fingerprint(w.pairs)),
    shell:
        "{HARNESS} pairs {wildcards.pairs} --configfile {CONFIG} > {log} 2>&1"
