# One job per run: a student with one training seed.


def student_inputs(w):
    """The method's files, the teacher, and the pairs, features or class table that the method
    requires."""
    run = E.student_run(w.student, int(w.seed))
    folders = {"teacher": run.teacher, "pairs": run.pairs, "features": run.features}
    inputs = {kind: folder / f"{kind}.json" for kind, folder in folders.items() if folder}
    inputs["class_table"] = E.class_table_files(w.student)
    return inputs | {"method": list(map(os.path.relpath, run.method_source))}


def student_spec(w):
    run = E.student_run(w.student, int(w.seed))
    return spec([run.fingerprint, run.budget])


# Released weights are imported instead.
use rule data as import_student with:
    input:
        rules.data.output,
        source=lambda w: E.released_files(w.student),
    output:
        f"{ROOT}/students/{{student}}/seed{{seed}}/student.json",
    log:
        f"{ROOT}/logs/students/{{student}}/seed{{seed}}.log",
    wildcard_constraints:
        student=one_of(E.released),
    params:
        command="import-student {student} {seed}",
        spec=student_spec,


use rule data as train with:
    input:
        unpack(student_inputs),
    output:
        f"{ROOT}/students/{{student}}/seed{{seed}}/student.json",
    log:
        f"{ROOT}/logs/students/{{student}}/seed{{seed}}.log",
    benchmark:
        f"{ROOT}/benchmarks/students/{{student}}/seed{{seed}}.tsv"
    wildcard_constraints:
        student=one_of(name for name in E.students if name not in E.released),
    threads: EXCLUSIVE_THREADS
    resources:
        **EXCLUSIVE,
        gpu=GPU,
        gpu_percent=lambda w: gpu_percent("run", w.student),
    params:
        command="train {student} {seed}",
        spec=student_spec,
