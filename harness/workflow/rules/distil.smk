# One job per run: a student with one training seed.


def student_inputs(w):
    """The method's files, the teacher, and the pairs or features that the method requires."""
    run = E.student_run(w.student, int(w.seed))
    inputs = {
        "method": list(map(os.path.relpath, run.method_source)),
        "teacher": run.teacher / "teacher.json",
    }
    if run.pairs:
        inputs["pairs"] = run.pairs / "pairs.json"
    if run.features:
        inputs["features"] = run.features / "features.json"
    return inputs


def student_spec(w):
    run = E.student_run(w.student, int(w.seed))
    return spec([run.fingerprint, run.budget])


rule train:
    input:
        unpack(student_inputs),
    output:
        f"{ROOT}/students/{{student}}/seed{{seed}}/student.json",
    log:
        f"{ROOT}/logs/students/{{student}}/seed{{seed}}.log",
    benchmark:
        f"{ROOT}/benchmarks/students/{{student}}/seed{{seed}}.tsv"
    threads: EXCLUSIVE_THREADS
    resources:
        **EXCLUSIVE,
        gpu=GPU,
    params:
        spec=student_spec,
    shell:
        "{HARNESS} train {wildcards.student} {wildcards.seed} --configfile {CONFIG} > {log} 2>&1"
