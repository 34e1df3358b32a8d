# Tables, figures, the page and the manifest: one job.
FIGURES = "quality_vs_images quality_vs_compute cost_to_reach samples".split()
FIGURES += ["nearest_neighbours", "training_health"]
TABLES = ["metrics.csv", "summary.csv", "headline.md", "pairwise.csv", "pairwise.md"]
TABLES += ["cost_to_reach.csv", "cost_to_reach.md"]
TABLES += expand("comparison.{kind}", kind=("csv", "md", "tex"))
TABLES += ["claims.csv", "claims.md"] if E.claims else []
TABLES += expand("paper.{kind}", kind=("csv", "md", "tex")) if E.paper else []
REPORT = [
    *expand(f"{ROOT}/tables/{{table}}", table=TABLES),
    *expand(f"{ROOT}/figures/{{figure}}.{{kind}}", figure=FIGURES, kind=("png", "pdf")),
    f"{ROOT}/report.html",
    f"{ROOT}/manifest.json",
]


def in_report(path):
    """Mark the page, tables and figures for `snakemake --report`."""
    file = Path(path)
    if file.suffix == ".json":
        return path
    category = {"tables": "Tables", "figures": "Figures"}.get(file.parent.name, "Report")
    labels = {"content": file.stem.replace("_", " "), "format": file.suffix[1:]}
    caption = f"../../reporting/captions/{category.lower()}.rst"
    return report(path, category=category, labels=labels, caption=caption)


# Snakemake deletes the record of a failed job and remakes only inputs, so the records of runs,
# teachers and feature networks are inputs as well as the scores.
use rule data as report with:
    input:
        runs=[E.paths.run(*run) / "student.json" for run in E.runs],
        teachers=expand(rules.teacher.output, teacher=E.teachers),
        features=EXTRACTORS,
        scores=[E.paths.scores(*run) for run in E.runs],
        references=expand(rules.score_references.output, teacher=E.teachers),
        agreement=AGREEMENT,
    output:
        [in_report(path) for path in REPORT],
    log:
        f"{ROOT}/logs/report.log",
    params:
        command="report",
        spec=spec(E.report_fingerprint()),


onerror:
    # Report the finished runs; failed ones appear with their reason.
    REPORT_LOG = f"{ROOT}/logs/report.log"
    try:
        shell("{HARNESS} report --partial --configfile {CONFIG} >> {REPORT_LOG} 2>&1")
        tables = f"{ROOT}/tables/comparison.md, and {ROOT}/report.html"
    except Exception:
        tables = f"none; the reason is in {REPORT_LOG}"
    if INTERRUPTION.interrupted:
        print(f"The partial report: {tables}", file=sys.stderr)
        raise SystemExit(INTERRUPTED)
    print(f"\nSome jobs failed; the table with the reasons: {tables}", file=sys.stderr)


onsuccess:
    shell("{HARNESS} summary --configfile {CONFIG}")
