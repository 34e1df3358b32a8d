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
        command="data",
        spec=spec(
            E.data_fingerprint
            | {"prompts": E.data.prompt_files, "num_classes": E.data.num_classes}
        ),
    shell:
        "{HARNESS} {params.command} --configfile {CONFIG} > {log} 2>&1"


# All other rules run a command in the same way.
use rule data as features with:
    input:
        rules.data.output,
    output:
        f"{ROOT}/features/{{features}}/features.json",
    log:
        f"{ROOT}/logs/features/{{features}}.log",
    benchmark:
        f"{ROOT}/benchmarks/features/{{features}}.tsv"
    resources:
        gpu=GPU,
        gpu_percent=WHOLE_GPU,
    params:
        command="features {features}",
        spec=lambda w: spec(E.features_fingerprint(w.features)),


# All students wait for a teacher, and a teacher waits for its text encoder: train these first.
use rule features as text_encoder with:
    wildcard_constraints:
        features=one_of(filter(None, map(E.text_encoder_of, E.teachers))),
    priority: 20


ruleorder: text_encoder > features


def teacher_inputs(w):
    """Local files of an imported teacher; the text encoder of a teacher trained on captions."""
    encoder = E.text_encoder_of(w.teacher)
    return E.teacher_files(w.teacher) + expand(rules.features.output, features=encoder or [])


use rule features as teacher with:
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
    resources:
        gpu=GPU,
        gpu_percent=lambda w: gpu_percent("teacher", w.teacher),
    params:
        command="teacher {teacher}",
        spec=lambda w: spec(E.teacher_fingerprint(w.teacher)),


use rule data as pairs with:
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
        gpu_percent=WHOLE_GPU,
    params:
        command="pairs {pairs}",
        spec=lambda w: spec(E.pairs_fingerprint(w.pairs)),
