# One job per run: a student with one training seed.


def student_inputs(w):
    """The method's file, the teacher, and the pairs or features that the method requires."""
    needs, root = E.requirements(w.student), E.root
    inputs = {
        "method": f"methods/{E.students[w.student].method}.py",
        "teacher": f"{root}/teachers/{E.teacher_of(w.student)}/teacher.json",
    }
    if needs.pairs:
        inputs["pairs"] = f"{root}/pairs/{E.pairs_name(w.student)}/pairs.json"
    if needs.features:
        inputs["features"] = f"{root}/features/{needs.features}/features.json"
    return inputs


rule train:
    input:
        unpack(student_inputs),
    output:
        f"{E.root}/students/{{student}}/seed{{seed}}/student.json",
    log:
        f"{E.root}/logs/students/{{student}}/seed{{seed}}.log",
    benchmark:
        f"{E.root}/benchmarks/students/{{student}}/seed{{seed}}.tsv"
    threads: EXCLUSIVE_THREADS
    resources:
        **EXCLUSIVE,
        gpu=GPU,
    params:
        spec=lambda w: spec([E.run_spec(w.student, int(w.seed)), E.budget_spec(w.student)]),
    shell:
        "{HARNESS} train {wildcards.student} {wildcards.seed} --configfile {CONFIG} > {log} 2>&1"
