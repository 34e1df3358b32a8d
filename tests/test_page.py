"""report.html: complete, self-contained, escaped, and usable in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import zipfile

import pandas as pd
import pytest
import yaml

from harness.errors import UserError
from harness.io.artifacts import sha256_file
from harness.io.records import DataRecord
from harness.reporting.collect import collect
from harness.reporting.figures import charts, health, samples
from harness.reporting.page import lead
from harness.reporting.page.lead import data_text
from harness.reporting.page.parts import Content, is_numeric
from harness.reporting.tables import summarise
from harness.validation import load_experiment, parse_experiment
from tests.conftest import DATA
from tests.reports import Page, kept_samples, page, tidy_table, write_run

HOSTILE = 'Worse <script>alert("1")</script> & "quoted"'
COLUMN = "fd_n400_tiny-cnn"
STUDENTS = {"s1": [1.0, 1.1, 1.2], "s2": [2.0, 2.1, 2.2], "s3": [3.0, 3.1, 3.2]}
REFERENCE = {"teacher": [0.5], "teacher-1step": [9.0], "floor": [0.3]}
TABLES = {
    "claims": [
        {"claim": HOSTILE, "source": "Yin et al. 2024", "reported": "5.58 → 2.66", "better": "s1",
         "worse": "s2", "column": COLUMN, "difference": -0.5, "low": -0.9, "high": -0.1,
         "verdict": "supported"},
        {"claim": "A second", "source": "s", "reported": "–", "better": "s2", "worse": "s3",
         "column": COLUMN, "difference": None, "low": None, "high": None, "verdict": "undecided"},
    ],
    "pairwise": [
        {"column": COLUMN, "a": "s1", "b": "s2", "difference": -0.5, "low": -0.9, "high": -0.1,
         "level": 0.95, "sampling_se": 0.1, "training_se": 0.1, "training_seeds": 3,
         "verdict": "a better"},
        {"column": COLUMN, "a": "s1", "b": "s3", "difference": None, "low": None, "high": None,
         "level": 0.95, "sampling_se": None, "training_se": None, "training_seeds": 1,
         "verdict": "not ranked"},
    ],
    "agreement": [
        {"quantity": "fd", "extractor": "tiny-cnn", "ours": 1.0, "library": "clean-fid",
         "theirs": 1.00001, "relative_difference": 1e-5, "tolerance": 1e-4, "agrees": "yes"},
        {"quantity": None, "extractor": "inception", "ours": None, "library": None,
         "theirs": None, "relative_difference": None, "tolerance": 1e-4,
         "agrees": "unavailable (no weights)"},
    ],
    "paper": [
        {"paper": "SiD", "table": "Table 1", "method": "SiD", "metric": "FID", "reported": 1.923,
         "reproduced": "2.01 ± 0.02", "difference": 0.09, "setting_match": "toy", "note": "x" * 90},
    ],
}  # fmt: skip


def make_experiment(root, students=STUDENTS):
    config = yaml.safe_load((DATA / "tiny.yaml").read_text())
    config["students"] = {name: {"method": "sid"} for name in students}
    config["training"]["seeds"] = [0, 1, 2]
    return parse_experiment(config, "tiny.yaml", root)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """The path of a page with every section."""
    experiment = make_experiment(tmp_path_factory.mktemp("full"))
    for student, seed in experiment.runs:
        write_run(experiment, student, seed, skipped_steps={"generator": 2 * seed})
    experiment.paths.tables.mkdir()
    for name, rows in TABLES.items():
        pd.DataFrame(rows).to_csv(experiment.paths.tables / f"{name}.csv", index=False)
    scores = {key: REFERENCE | STUDENTS for key in (("fd", "tiny-cnn"), ("recall", "tiny-cnn"))}
    page(
        experiment, tidy_table(experiment, scores, curve=True), kept_samples(["teacher", *STUDENTS])
    )
    return experiment.paths.root / "report.html"


def test_the_file_is_self_contained(full):
    content = Page(full)
    for tag, attributes in content.elements:
        for name in ("src", "href", "srcset", "action"):
            address = attributes.get(name) or "#"
            assert address.startswith(("#", "data:")), (tag, address)
    policy = next(a["content"] for a in content.all("meta") if "http-equiv" in a)
    assert "default-src 'none'" in policy
    assert len(content.source) < 2_000_000
    assert content.source.count("window.vegaEmbed=") == 1


def test_ids_are_unique_and_links_have_targets(full):
    content = Page(full)
    ids = [attributes["id"] for _, attributes in content.elements if "id" in attributes]
    targets = [a["href"][1:] for a in content.all("a")]
    assert len(ids) == len(set(ids)) and set(targets) == set(content.sections) <= set(ids)


def test_charts_and_images_have_descriptions(full):
    content = Page(full)
    drawn = [a for a in content.all("div") if a.get("class") == "chart"]
    # Final scores; costs; curves of one metric; losses and gradient norms.
    assert len(drawn) == len(content.charts) == 1 + 3 + 2 + 2 * 3
    for a, chart in zip(drawn, content.charts, strict=True):
        assert a["aria-label"] == chart["description"] and len(a["aria-label"]) > 20
    label = next(
        a["aria-label"] for a in drawn if "against images that received" in a["aria-label"]
    )
    assert label.endswith(
        "at the end: s1 1.1, s2 2.1, s3 3.1, teacher, 35 NFE 0.5, teacher, 1 NFE 9"
    )
    assert all(len(a["alt"]) > 10 for a in content.all("img"))
    assert len(content.all("img")) == 4 + 2 * 5


def test_text_is_escaped(full):
    content = Page(full)
    assert "<script>alert" not in content.source and HOSTILE in content.text


def test_warnings_are_in_the_lead(tmp_path):
    experiment = make_experiment(tmp_path)
    table = tidy_table(experiment, {("fd", "tiny-cnn"): STUDENTS})
    with pytest.MonkeyPatch.context() as patch:
        line = "tiny-cnn is near chance: it recognises <30%"
        patch.setattr("harness.reporting.trust.warnings", lambda *_: [line])
        content = page(experiment, table)
    assert f"These limit what the numbers mean. {line}" in content.words
    assert content.words.index(line) < content.words.index("Which student is best?")
    assert "1 warning above" in content.words


@pytest.mark.parametrize("students", [["s1"], ["s1", "s2"]])
def test_the_lead_of_one_student_and_of_a_tie(tmp_path, students):
    experiment = make_experiment(tmp_path, students)
    table = tidy_table(
        experiment, {("fd", "tiny-cnn"): {name: [1.0, 1.1, 1.2] for name in students}}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "read_samples", lambda *_: {})
        content = Content(experiment, table, summarise(experiment, table), {})
    found = lead.leads(content)
    (margin,) = map(str, lead._margins(found))
    one = "The only student with scores."
    assert margin.startswith("<strong>0.0" if len(students) > 1 else one) and "−0.0" not in margin
    # Three training seeds are enough, also where there is nobody to rank against.
    assert "too few" not in " ".join(map(str, lead._trust(found, content)))


def test_images_and_their_resize_are_facts(tmp_path):
    experiment = make_experiment(tmp_path)
    assert data_text(experiment) is None
    facts = {"train_images": 1438, "held_out_images": 359, "image_shape": [3, 64, 64]}
    resize = "center crop and area resize to 64 px"
    record = DataRecord.model_construct(name="birds", resize=resize, **facts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DataRecord, "read_optional", lambda path: record)
        text = data_text(experiment)
    assert text == f"birds: 1,438 for training, 359 held out, 3 × 64 × 64, {resize}"


def test_columns_of_costs_are_numbers():
    table = pd.DataFrame({"a": ["not reached", "≤ 3"], "b": ["not reached", "x"], "c": ["–", "–"]})
    assert is_numeric(table) == [True, False, False]


def test_markup_survives_pandas_with_pyarrow(full):
    """pyarrow's strings would lose the markup, which would then be escaped."""
    source = Page(full).source
    assert "&lt;small" not in source and "&lt;span" not in source


def test_a_full_page_has_every_section(full):
    content = Page(full)
    assert content.sections == [
        *("scores", "costs", "curves", "claims", "pairwise", "paper", "sample_rows"),
        *("neighbours", "training", "agreement", "protocol", "provenance"),
    ]
    for text in (
        "1.10 ± 0.10", "1 of 1 quantities agree", "unavailable (no weights)", "▲ −0.5", "▼ +0.5",
        "s1 − s2", "−0.50 (−0.90 to −0.10)", "2.01 ± 0.02", "torch",
        "nearest of 1,438 training images in the features of tiny-cnn",
        # The lead: who, by how much, at what cost, how reliable.
        "ahead of s2, 95% interval +1.0e+00 to +1.0e+00. The interval excludes 0.",
        "s1: 160 images, 1 TFLOPs, 1 seconds At equal compute (1 TFLOPs) s1 leads: 1.10, then s2",
        "Cheapest to reach Fréchet distance 2.5: s1 (≤ 80 images, ≤ 0.5 TFLOPs",
        "3 training seeds; 2 sampling seeds", "Floor: 0.300 with 359 real held-out images",
        # The costs, and a student's own level.
        "No student reaches the teacher's 0.500.", "≤ 1.5", "not reached",
    ):  # fmt: skip
        assert text in content.words, text
    assert "Incomplete" not in content.text


def test_sections_without_data_are_left_out(tmp_path):
    experiment = make_experiment(tmp_path, ["s1", "s2"])
    one = {"s1": [1.0], "s2": [2.0]}
    content = page(experiment, tidy_table(experiment, {("fd", "tiny-cnn"): one}))
    assert content.sections == ["scores", "protocol", "provenance"] and content.charts == []
    assert "too few for ranks (3 are needed)" in content.text
    assert "Scored at the end of training only" in content.text


def test_failed_runs_are_listed_at_the_top(tmp_path):
    experiment = make_experiment(tmp_path)
    table = tidy_table(experiment, {("fd", "tiny-cnn"): REFERENCE | {"s1": [1.0, 1.1, 1.2]}})
    failed = {"student": "s2", "seed": 0, "status": "failed (training: broke)", "final": True}
    failed |= {"column": "", "grid": "", "flag": None, "method": "sid"}
    content = page(experiment, pd.concat([table, pd.DataFrame([failed])]))
    assert "Incomplete. 1 of 5 rows" in content.words
    assert "s2: failed (training: broke)" in content.words


def test_an_experiment_without_scores_has_a_page(tmp_path):
    experiment = load_experiment(DATA / "tiny.yaml", results=tmp_path)
    content = page(experiment, collect(experiment, partial=True)[0])
    assert "Incomplete. 7 of 7 rows" in content.words
    assert content.sections == ["scores", "protocol", "provenance"]


def test_a_table_without_a_needed_column_is_rejected(tmp_path):
    experiment = make_experiment(tmp_path)
    experiment.paths.tables.mkdir(parents=True)
    (experiment.paths.tables / "agreement.csv").write_text("quantity,ours\nfd,1\n")
    with pytest.raises(UserError, match=r"agreement\.csv") as error:
        page(experiment, tidy_table(experiment, {("fd", "tiny-cnn"): STUDENTS}))
    assert error.value.code == "damaged"


def test_long_training_logs_are_thinned():
    log = pd.DataFrame({"images": range(9000), "seed": 0, "loss/p": 1.0})
    chart = health.chart("s1", log, ["p"], "loss/").to_dict()
    assert len(chart["data"]["values"]) == health.MAX_POINTS


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0.4, 3.0, [0.5, 1, 2]), (2.0, 5.0, [2, 5]), (0.001, 20.0, [0.001, 0.01, 0.1, 1, 10]),
     (6.0, 9.0, [6, 9])],
)  # fmt: skip
def test_logarithmic_axes_have_plain_ticks(low, high, expected):
    assert charts.log_ticks(low, high) == pytest.approx(expected)


# -- in a browser -----------------------------------------------------------------------------

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("no Chromium (set CHROMIUM to its path)")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def open_page(browser, path, **options):
    """Open a page and wait for its charts; `messages` has errors, warnings and requests."""
    view = browser.new_page(**options)
    view.messages = []
    view.on("pageerror", lambda error: view.messages.append(str(error)))
    view.on("console", lambda message: view.messages.append(message.text))
    view.on("request", lambda request: view.messages.append(request.url))
    view.goto(path.as_uri())
    view.wait_for_selector("body[data-ready]")
    view.messages = [m for m in view.messages if not m.startswith(("data:", path.as_uri()))]
    return view


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_its_window(full, browser, width, scheme):
    size = {"width": width, "height": 900}
    view = open_page(browser, full, viewport=size, color_scheme=scheme)
    view.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert view.evaluate("document.documentElement.scrollWidth") == width
    assert view.messages == []
    assert view.evaluate("[...document.images].every(i => i.naturalWidth > 0)")
    assert view.locator(".chart svg").count() == view.locator(".chart").count()
    colours = view.evaluate(
        "[document.body, document.querySelector('.chart svg text')].map(e => getComputedStyle(e))"
        ".map((s, i) => i ? s.fill : s.backgroundColor)"
    )
    background, text = (sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in colours)
    assert (background < text) == (scheme == "dark")


@pytest.mark.slow
def test_headings_sort_the_students(full, browser):
    view = open_page(browser, full)
    table = view.locator("table").first
    heading = table.locator("th.number").filter(has_text="Fréchet distance").first
    column = heading.evaluate("h => h.cellIndex") + 1
    cells = table.locator(f"tbody:last-of-type tr :nth-child({column})")
    for order in ("ascending", "descending"):
        heading.click()
        assert heading.get_attribute("aria-sort") == order
        values = [float(text.split()[0]) for text in cells.all_inner_texts()]
        assert values == sorted(values, reverse=order == "descending") and len(values) == 3
    cells.first.evaluate("cell => cell.textContent = '–'")
    for _ in range(2):  # missing values are last in both orders
        heading.click()
        assert cells.last.inner_text() == "–"
    names = table.locator("tbody.fixed th")
    assert [n.split("\n")[0] for n in names.all_inner_texts()] == list(REFERENCE)
    assert table.locator("[aria-sort]").count() == 1


@pytest.mark.slow
def test_the_legend_highlights_a_student_in_all_charts(full, browser):
    view = open_page(browser, full)
    faded = "[...document.querySelectorAll('.chart .mark-line path')].filter(p => p.getAttribute('opacity') < 0.2 && p.getAttribute('stroke') !== null).length"
    before = view.evaluate(faded)
    button = view.locator("#curves ~ .legend [data-student=s2]").first
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    assert view.evaluate(faded) == before + 2 * 2  # two other students in two charts
    button.click()
    assert view.evaluate(faded) == before


@pytest.mark.slow
def test_the_page_prints(full, browser, tmp_path):
    content = open_page(browser, full).pdf(prefer_css_page_size=True, print_background=True)
    assert content.startswith(b"%PDF")


# -- after a workflow -------------------------------------------------------------------------


def test_the_manifest_lists_the_page(finished):
    outputs = json.loads((finished.results / "manifest.json").read_text())["outputs"]
    assert outputs["report.html"] == sha256_file(finished.results / "report.html")
    content = Page(finished.results / "report.html")
    assert {"scores", "curves", "sample_rows", "neighbours", "training"} <= set(content.sections)
    table = pd.read_csv(finished.results / "tables" / "comparison.csv").set_index("student")
    assert f"{table[COLUMN]['dmd']:.3g}" in content.text


def test_the_report_after_a_failure_shows_it(broken):
    content = Page(broken.results / "report.html")
    assert "Incomplete. 1 of 9 rows" in content.words
    assert re.search(r"sim: failed \(.*the generator broke", content.words)


def test_latex_rows_have_as_many_cells_as_columns(finished):
    text = (finished.results / "tables" / "comparison.tex").read_text()
    columns = len(re.search(r"\\begin\{tabular\}\{(\w+)\}", text)[1])
    rows = re.findall(r"^(.*) \\\\$", text, re.MULTILINE)
    assert len(rows) >= 10
    assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {columns}
    assert text.isascii()


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no pdflatex")
def test_latex_compiles_with_booktabs(finished, tmp_path):
    table = (finished.results / "tables" / "comparison.tex").read_text()
    (tmp_path / "paper.tex").write_text(
        "\\documentclass{article}\\usepackage[a0paper,landscape]{geometry}\\usepackage{booktabs}\n"
        f"\\begin{{document}}\n{table}\\end{{document}}\n"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "paper.pdf").exists() and "Overfull" not in done.stdout


def test_snakemake_report_contains_page_tables_and_figures(workspace):
    done = workspace.snakemake("--report", "report.zip")
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(workspace.root / "report.zip") as files:
        names = {name.rsplit("/", 1)[-1] for name in files.namelist()}
    assert {"report.html", "comparison.csv", "samples.png"} <= names
