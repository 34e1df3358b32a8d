# Tables, figures, the page and the manifest, in one job; and what is written when a run failed.
FIGURES = [
    "quality_vs_images",
    "quality_vs_compute",
    "samples",
    "nearest_neighbours",
    "training_health",
]
REPORT = [
    *(
        f"{E.root}/tables/{table}"
        for table in ("metrics.csv", "comparison.csv", "comparison.md", "comparison.tex")
    ),
    *expand(f"{E.root}/figures/{{figure}}.{{kind}}", figure=FIGURES, kind=("png", "pdf")),
    f"{E.root}/report.html",
    f"{E.root}/manifest.json",
]
REPORT += expand(f"{E.root}/tables/pairwise.{{kind}}", kind=("csv", "md"))
if E.claims:
    REPORT += expand(f"{E.root}/tables/claims.{{kind}}", kind=("csv", "md"))
if E.paper:
    REPORT += expand(f"{E.root}/tables/paper.{{kind}}", kind=("csv", "md", "tex"))


def shown(path):
    """An output as `snakemake --report` files it: the page, the tables and the figures."""
    category = {"tables": "Tables", "figures": "Figures"}.get(Path(path).parent.name, "Report")
    if category == "Report" and path.endswith(".json"):
        return path
    name = Path(path).stem.replace("_", " ")
    labels = {"content": name, "format": Path(path).suffix[1:]}
    caption = f"../../reporting/captions/{category.lower()}.rst"
    return report(path, category=category, labels=labels, caption=caption)


# The records stand among the inputs beside the scores: a failed job's record is deleted, and only
# what is an input is made again.
rule report:
    input:
        runs=[f"{E.root}/students/{student}/seed{seed}/student.json" for student, seed in E.runs],
        teachers=expand(f"{E.root}/teachers/{{teacher}}/teacher.json", teacher=E.teachers),
        features=EXTRACTORS,
        scores=[f"{E.root}/scores/{student}/seed{seed}.json" for student, seed in E.runs],
        references=expand(f"{E.root}/scores/teachers/{{teacher}}.json", teacher=E.teachers),
        shown=AGREEMENT,  # a table that the page shows too
    output:
        [shown(path) for path in REPORT],
    log:
        f"{E.root}/logs/report.log",
    threads: THREADS
    resources:
        **asked("report"),
    params:
        spec=spec(E.report_spec()),
    shell:
        "{HARNESS} report --configfile {CONFIG} > {log} 2>&1"


onerror:
    # One failed run must not hide the others: the table is written with a row that says why.
    shell("{HARNESS} report --partial --configfile {CONFIG} >> {E.root}/logs/report.log 2>&1")
    print(
        f"\nSome jobs failed; the table with the reasons: {E.root}/tables/comparison.md, and "
        f"{E.root}/report.html",
        file=sys.stderr,
    )


onsuccess:
    shell("{HARNESS} summary --configfile {CONFIG}")
