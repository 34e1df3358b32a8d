# Tables, figures, the page and the manifest: one job.
FIGURES = [
    "quality_vs_images",
    "quality_vs_compute",
    "samples",
    "nearest_neighbours",
    "training_health",
]
REPORT = [
    *(
        f"{E.paths.root}/tables/{table}"
        for table in (
            *("metrics.csv", "summary.csv", "headline.md"),
            *("comparison.csv", "comparison.md", "comparison.tex"),
        )
    ),
    *expand(f"{E.paths.root}/figures/{{figure}}.{{kind}}", figure=FIGURES, kind=("png", "pdf")),
    f"{E.paths.root}/report.html",
    f"{E.paths.root}/manifest.json",
]
REPORT += expand(f"{E.paths.root}/tables/pairwise.{{kind}}", kind=("csv", "md"))
if E.claims:
    REPORT += expand(f"{E.paths.root}/tables/claims.{{kind}}", kind=("csv", "md"))
if E.paper:
    REPORT += expand(f"{E.paths.root}/tables/paper.{{kind}}", kind=("csv", "md", "tex"))


def in_report(path):
    """Mark the page, tables and figures for `snakemake --report`."""
    category = {"tables": "Tables", "figures": "Figures"}.get(Path(path).parent.name, "Report")
    if category == "Report" and path.endswith(".json"):
        return path
    name = Path(path).stem.replace("_", " ")
    labels = {"content": name, "format": Path(path).suffix[1:]}
    caption = f"../../reporting/captions/{category.lower()}.rst"
    return report(path, category=category, labels=labels, caption=caption)


# Snakemake deletes the record of a failed job and remakes only inputs, so the records of runs,
# teachers and feature networks are inputs as well as the scores.
rule report:
    input:
        runs=[
            f"{E.paths.root}/students/{student}/seed{seed}/student.json"
            for student, seed in E.runs
        ],
        teachers=expand(f"{E.paths.root}/teachers/{{teacher}}/teacher.json", teacher=E.teachers),
        features=EXTRACTORS,
        scores=[f"{E.paths.root}/scores/{student}/seed{seed}.json" for student, seed in E.runs],
        references=expand(f"{E.paths.root}/scores/teachers/{{teacher}}.json", teacher=E.teachers),
        agreement=AGREEMENT,
    output:
        [in_report(path) for path in REPORT],
    log:
        f"{E.paths.root}/logs/report.log",
    threads: THREADS
    params:
        spec=spec(E.report_fingerprint()),
    shell:
        "{HARNESS} report --configfile {CONFIG} > {log} 2>&1"


onerror:
    # Report the finished runs; failed ones appear with their reason.
    shell(
        "{HARNESS} report --partial --configfile {CONFIG} >> {E.paths.root}/logs/report.log 2>&1"
    )
    print(
        f"\nSome jobs failed; the table with the reasons: {E.paths.root}/tables/comparison.md, and "
        f"{E.paths.root}/report.html",
        file=sys.stderr,
    )


onsuccess:
    shell("{HARNESS} summary --configfile {CONFIG}")
