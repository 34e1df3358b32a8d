# What students need before they train: data, feature networks, teachers, teacher pairs.


rule data:
    output:
        f"{E.root}/data/data.json",
    log:
        f"{E.root}/logs/data.log",
    params:
        spec=spec(E.data_spec()),
    threads: THREADS
    shell:
        "{HARNESS} data --configfile {CONFIG} > {log} 2>&1"


rule features:
    input:
        rules.data.output,
    output:
        f"{E.root}/features/{{features}}/features.json",
    log:
        f"{E.root}/logs/features/{{features}}.log",
    benchmark:
        f"{E.root}/benchmarks/features/{{features}}.tsv"
    params:
        spec=lambda w: spec(E.features_spec(w.features)),
    threads: THREADS
    resources:
        gpu=1,
    shell:
        "{HARNESS} features {wildcards.features} --configfile {CONFIG} > {log} 2>&1"


rule teacher:
    input:
        rules.data.output,
    output:
        f"{E.root}/teachers/{{teacher}}/teacher.json",
    log:
        f"{E.root}/logs/teachers/{{teacher}}.log",
    benchmark:
        f"{E.root}/benchmarks/teachers/{{teacher}}.tsv"
    params:
        spec=lambda w: spec(E.teacher_spec(w.teacher)),
    threads: THREADS
    priority: 10
    resources:
        gpu=1,
    shell:
        "{HARNESS} teacher {wildcards.teacher} --configfile {CONFIG} > {log} 2>&1"


rule pairs:
    input:
        lambda w: f"{E.root}/teachers/{E.pair_sets[w.pairs][0]}/teacher.json",
    output:
        f"{E.root}/pairs/{{pairs}}/pairs.json",
    log:
        f"{E.root}/logs/pairs/{{pairs}}.log",
    params:
        spec=lambda w: spec(E.pairs_spec(w.pairs)),
    threads: THREADS
    priority: 5
    resources:
        gpu=1,
    shell:
        "{HARNESS} pairs {wildcards.pairs} --configfile {CONFIG} > {log} 2>&1"
