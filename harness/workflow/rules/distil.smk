# One job per run: a student with one training seed.


def student_inputs(w):
    """The method's files, the teacher, and the pairs or features that the method requires."""
    student = E.students[w.student]
    inputs = {
        "method": [os.path.relpath(path) for path in method_source(student.method)],
        "teacher": E.paths.teacher(student.teacher) / "teacher.json",
    }
    if student.pairs:
        inputs["pairs"] = E.paths.pairs(student.pairs.name) / "pairs.json"
    if features := student.requirements.features:
        inputs["features"] = E.paths.features(features) / "features.json"
    return inputs


rule train:
    input:
        unpack(student_inputs),
    output:
        f"{E.paths.root}/students/{{student}}/seed{{seed}}/student.json",
    log:
        f"{E.paths.root}/logs/students/{{student}}/seed{{seed}}.log",
    benchmark:
        f"{E.paths.root}/benchmarks/students/{{student}}/seed{{seed}}.tsv"
    threads: EXCLUSIVE_THREADS
    resources:
        **EXCLUSIVE,
        gpu=GPU,
    params:
        spec=lambda w: spec(
            [
                E.run_fingerprint(w.student, int(w.seed)),
                [limit.model_dump() for limit in E.students[w.student].budget],
            ]
        ),
    shell:
        "{HARNESS} train {wildcards.student} {wildcards.seed} --configfile {CONFIG} > {log} 2>&1"
