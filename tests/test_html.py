"""report.html: one file that says what the tables say, and works in a browser, on a phone, in print."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import zipfile
from html.parser import HTMLParser

import pandas as pd
import pytest

from harness.errors import UserError
from harness.reporting.collect import collect
from harness.reporting.manifest import manifest
from harness.reporting.page.page import write_html
from harness.reporting.tables import compare
from harness.validation import load_experiment
from tests.browser import CHROMIUM, Browser
from tests.conftest import DATA

HOSTILE = 'Worse <script>alert("1")</script> & "quoted"'
COLUMN = "fd_n400_tiny-cnn"
OTHERS = {
    "claims": [
        {"claim": HOSTILE, "source": "Yin et al. 2024", "reported": "5.58 → 2.66", "better": "dmd",
         "worse": "dmd-noreg", "column": COLUMN, "difference": -0.5, "low": -0.9, "high": -0.1,
         "verdict": "supported"},
        {"claim": "A second", "source": "nobody", "reported": "–", "better": "sid", "worse": "sim",
         "column": COLUMN, "difference": None, "low": None, "high": None, "verdict": "undecided"},
    ],
    "pairwise": [
        {"column": COLUMN, "a": "dmd", "b": "sid", "difference": -0.5, "low": -0.9, "high": -0.1,
         "level": 0.95, "sampling_se": 0.1, "training_se": 0.1, "training_seeds": 3,
         "verdict": "a better"},
        {"column": COLUMN, "a": "dmd", "b": "sim", "difference": None, "low": None, "high": None,
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


def rendered(workspace, **columns):
    """The page of a workspace's scores and tables; `columns`: more columns of the comparison."""
    experiment = load_experiment(
        workspace.root / "configs" / "tiny.yaml", results=workspace.root / "results"
    )
    return written(experiment, **columns)


def written(experiment, **columns):
    table, protocols = collect(experiment, partial=True)
    comparison = compare(experiment, table)
    comparison.values = comparison.values.assign(**columns)
    return write_html(experiment, table, comparison, manifest(experiment, protocols, []))


def without_others(workspace):
    for name in OTHERS:
        (workspace.results / "tables" / f"{name}.csv").unlink(missing_ok=True)


@pytest.fixture(scope="module")
def full(finished, tmp_path_factory):
    """A page with every section."""
    workspace = finished.clone(tmp_path_factory.mktemp("full") / "project")
    for name, rows in OTHERS.items():
        pd.DataFrame(rows).to_csv(workspace.results / "tables" / f"{name}.csv", index=False)
    return rendered(workspace)


class Page(HTMLParser):
    """The elements of a page, each with its attributes and the names of those around it."""

    VOID = ("meta", "link", "img", "br", "path", "use")

    def __init__(self, path):
        super().__init__()
        self.elements, self.open, self.text = [], [], ""
        self.feed(path.read_text(encoding="utf-8"))
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), [name for name, _ in self.open]))
        if tag not in self.VOID:
            self.open.append((tag, dict(attributes)))

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes), [name for name, _ in self.open]))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if not self.open or self.open[-1][0] not in ("style", "script"):
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes, _ in self.elements if name == tag]

    @property
    def sections(self):
        return [section["id"] for section in self.all("section")]


def test_nothing_lies_outside_the_file(full):
    page, source = Page(full), full.read_text(encoding="utf-8")
    for tag, attributes, _ in page.elements:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data"):
            address = attributes.get(name) or "#"
            assert address.startswith(("#", "data:")), (tag, address)
    assert set(re.findall(r"url\((.)", source)) <= {"#"}
    assert "@import" not in source and "fetch(" not in source
    assert len(page.all("script")) == 1 and len(page.all("h1")) == 1
    assert len(source) < 3_000_000


def test_ids_are_unique_and_links_arrive(full):
    page, source = Page(full), full.read_text(encoding="utf-8")
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = re.findall(r'(?:href="|url\()#([^")]+)', source)
    targets += [i for _, a, _ in page.elements for i in (a.get("aria-labelledby") or "").split()]
    assert targets and set(targets) <= set(ids)


def test_every_figure_and_table_can_be_read_aloud(full):
    page = Page(full)
    drawings = [a for a in page.all("svg") if a.get("aria-hidden") != "true"]
    assert len(drawings) >= 12
    assert all(a["role"] == "img" and len(a["aria-label"]) > 20 for a in drawings)
    assert len(page.all("figure")) == len(page.all("figcaption")) == len(drawings)
    assert all(len(a["alt"]) > 20 for a in page.all("img")) and len(page.all("img")) == 7 + 16
    assert {a.get("scope") for a in page.all("th")} == {"col", "row"}
    scrolled = [around for tag, _, around in page.elements if tag == "table"]
    assert scrolled and all(around[-1] == "div" for around in scrolled)
    regions = [a for a in page.all("div") if a.get("class") == "scroll"]
    assert len(regions) == len(scrolled)
    assert all(a["tabindex"] == "0" for a in regions)
    label = next(
        a["aria-label"] for a in drawings if "against images that received" in a["aria-label"]
    )
    assert re.search(r"at the end: dmd \d", label) and "teacher" in label


def test_text_is_escaped(full):
    source, page = full.read_text(encoding="utf-8"), Page(full)
    assert "<script>alert" not in source
    assert HOSTILE in page.text


def test_the_page_says_what_the_tables_say(full, finished):
    page = Page(full)
    assert page.sections == [
        *(
            "summary",
            "curves",
            "samples",
            "neighbours",
            "health",
            "claims",
            "pairwise",
            "agreement",
            "paper",
        ),
        *("protocol", "provenance"),
    ]
    table = pd.read_csv(finished.results / "tables" / "comparison.csv").set_index("student")
    values = [float(a["data-value"]) for a in page.all("td") if re.fullmatch(r"-?\d[\d.e-]*", a.get("data-value", ""))]  # fmt: skip
    for student in ("teacher", "dmd", "gdd-i"):
        assert min(abs(v - table[COLUMN][student]) for v in values) < 1e-9
    assert "1 of 1 quantities agree" in page.text and "unavailable (no weights)" in page.text
    assert "▲ −0.5" in page.text and "▼ +0.5" in page.text  # both triangles of the matrix
    assert "dmd minus dmd-noreg" in page.text and "−0.50 (−0.90 to −0.10)" in page.text
    assert "Incomplete" not in page.text
    for note in ("regression in L2 instead of LPIPS", "digits-train1438", "torch 2."):
        assert note in page.text


def test_sections_without_a_table_are_left_out(workspace):
    without_others(workspace)
    page = Page(rendered(workspace))
    assert page.sections == [
        *("summary", "curves", "samples", "neighbours", "health", "protocol", "provenance")
    ]  # fmt: skip
    assert "No ranks are given" in page.text


def test_columns_of_other_versions_are_shown(workspace):
    count = len(pd.read_csv(workspace.results / "tables" / "comparison.csv"))
    page = Page(
        rendered(
            workspace,
            **{
                f"{COLUMN}_rank": [None] * (count - 2) + ["1", "tie 2–3"],
                f"{COLUMN}_sampling_std": [0.25] * count,
                f"{COLUMN}_best_of_3": [0.125] * count,
                "quite_unknown": ["something"] * count,
            },
        )
    )
    for text in ("tie 2–3", "± 0.2", "best of 3", "0.125", "quite unknown", "something"):
        assert text in page.text
    assert "No ranks are given" not in page.text


def test_a_failed_run_is_said_at_the_top(broken):
    page = Page(broken.results / "report.html")
    assert "Incomplete." in page.text and "1 of 9 rows" in page.text
    assert re.search(r"sim: failed \(.*the generator broke", page.text)
    assert page.sections[0] == "summary" and "curves" in page.sections


def test_an_experiment_without_any_score_has_a_page(tmp_path):
    page = Page(written(load_experiment(DATA / "tiny.yaml", results=tmp_path)))
    assert "Incomplete." in page.text and "7 of 7 rows" in page.text
    assert page.sections == ["summary", "protocol", "provenance"]


def test_a_table_of_another_version_is_one_clear_line(workspace):
    path = workspace.results / "tables" / "agreement.csv"
    path.write_text("quantity,ours\nfd,1\n")
    with pytest.raises(UserError, match=r"agreement.csv has no column 'extractor'"):
        rendered(workspace)


def test_the_manifest_vouches_for_the_page(finished):
    from harness.io.artifacts import sha256_file

    outputs = json.loads((finished.results / "manifest.json").read_text())["outputs"]
    assert outputs["report.html"] == sha256_file(finished.results / "report.html")


# -- in a browser -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine (or name one by CHROMIUM=/path/to/chromium)")
    with Browser() as browser:
        yield browser


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 390])
def test_in_a_browser(full, browser, width, dark):
    browser.open(full, width, dark=dark)
    # Everything opened: what is hidden must fit, too.
    browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.run("document.documentElement.scrollWidth") == width
    assert browser.run("getComputedStyle(document.body).backgroundColor") == (
        "rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)"
    )
    said = browser.said("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    assert not said
    asked = [p["request"]["url"] for p in browser.said("Network.requestWillBeSent")]
    assert [url for url in asked if not url.startswith("data:")] == [full.as_uri()]
    # On a phone the wide table scrolls inside its own container.
    inner, outer = browser.run(
        "[...document.querySelectorAll('#all-metrics')].flatMap("
        "t => [t.offsetWidth, t.parentNode.offsetWidth])"
    )
    assert inner > outer and outer <= width
    assert browser.run("[...document.images].every(i => i.naturalWidth > 0)")


def test_headings_sort(full, browser):
    browser.open(full, 1280)
    column = "[...document.querySelectorAll('#summary-table tbody.rows tr')].map(r => r.cells[1].dataset.value)"
    heading = "document.querySelectorAll('#summary-table thead th')[1]"
    for order in ("ascending", "descending"):
        browser.run(f"{heading}.querySelector('button').click()")
        assert browser.run(f"{heading}.ariaSort") == order
        shown = [float(v) for v in browser.run(column)]
        assert shown == sorted(shown, reverse=order == "descending") and len(shown) == 6
    scale = "[...document.querySelectorAll('#summary-table tbody.scale th')].map(t => t.innerText)"
    assert browser.run(scale) == ["teacher", "teacher-1step", "floor"]
    # What has no value comes last, whichever way.
    browser.run(
        "delete document.querySelector('#summary-table tbody.rows').rows[2].cells[1].dataset.value"
    )
    for _ in range(2):
        browser.run(f"{heading}.querySelector('button').click()")
        assert browser.run(column)[-1] is None
    # Text sorts as text.
    browser.run("document.querySelector('#summary-table thead button').click()")
    names = browser.run(
        "[...document.querySelectorAll('#summary-table tbody.rows tr')].map(r => r.cells[0].dataset.value)"
    )
    assert names == sorted(names)
    assert browser.run("document.querySelectorAll('#summary-table [aria-sort]').length") == 1


def test_the_legend_singles_out_a_student(full, browser):
    browser.open(full, 1280)
    opacity = "getComputedStyle(document.querySelector('#curves figure .series-{}')).opacity"
    browser.run("document.querySelector('[data-series=\"2\"]').click()")
    assert browser.run(opacity.format(2)) == "1" and browser.run(opacity.format(0)) == "0.1"
    browser.run("document.querySelector('[data-series=\"2\"]').click()")
    assert browser.run(opacity.format(0)) == "1"


def test_it_prints(full, browser, tmp_path):
    browser.open(full, 1280)
    browser.pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")


# -- LaTeX, and Snakemake's own report --------------------------------------------------------


def test_latex_rows_have_as_many_cells_as_columns(finished):
    text = (finished.results / "tables" / "comparison.tex").read_text()
    columns = len(re.search(r"\\begin\{tabular\}\{(\w+)\}", text)[1])
    rows = re.findall(r"^(.*) \\\\$", text, re.MULTILINE)
    assert len(rows) >= 10
    assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {columns}
    assert text.isascii()


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no pdflatex on this machine")
def test_latex_compiles_with_booktabs(finished, tmp_path):
    table = (finished.results / "tables" / "comparison.tex").read_text()
    (tmp_path / "paper.tex").write_text(
        "\\documentclass{article}\\usepackage[a0paper,landscape]{geometry}\\usepackage{booktabs}\n"
        f"\\begin{{document}}\n{table}\\end{{document}}\n"
    )
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "paper.pdf").exists()
    assert "Overfull" not in done.stdout


def test_snakemake_report_holds_page_tables_and_figures(workspace):
    done = workspace.snakemake("--report", "report.zip")
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(workspace.root / "report.zip") as files:
        names = {name.rsplit("/", 1)[-1] for name in files.namelist()}
    assert {"report.html", "comparison.csv", "samples.png"} <= names
