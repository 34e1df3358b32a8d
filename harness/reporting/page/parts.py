"""The parts of the page: the macros of parts.html.j2, and filters for data frames and images."""

import base64
import io
import re
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup

from harness.config.experiment import Experiment
from harness.reporting import collect, formatting
from harness.reporting.figures import charts, samples
from harness.reporting.figures.styles import student_styles
from harness.reporting.formatting import MISSING
from harness.reporting.tables import Summary

NUMBER = re.compile(r"((tie|≤) )?[-−+]?\d")
WITHOUT_NUMBER = (MISSING, "not reached")  # in columns of numbers
THUMBNAIL = 96  # pixels: larger sample images are scaled down


class Content:
    """The rows of `collect`'s table with numbers, and what follows from them."""

    def __init__(self, e: Experiment, table: pd.DataFrame, summary: Summary, manifest: dict):
        self.experiment, self.summary, self.manifest = e, summary, manifest
        self.table = table[~collect.is_unavailable(table.status)]
        self.final = self.table[self.table.final]
        self.main = {name: collect.main_column(e, name) for name in collect.ranking_extractors(e)}
        self.samples = samples.read_samples(e, self.table)
        self.is_ranked = summary.scores["rank"].astype(str).str.match(r"(tie )?\d").any()

    def legend(self) -> Markup:
        """A legend whose buttons highlight a student in all charts."""
        scored = set(self.table.student[self.table.status == "ok"])
        found = student_styles(self.experiment).items()
        marks = [(name, s.colour, s.glyph) for name, s in found if name in scored]
        return html.legend(marks, buttons=True)


def is_numeric(table: pd.DataFrame) -> list[bool]:
    """For each column whether its first known text is a number."""
    known = [[str(v) for v in values if v not in WITHOUT_NUMBER] for _, values in table.items()]
    first = [next(iter(texts), "") for texts in known]
    return [bool(NUMBER.match(text)) for text in first]


def png(images: np.ndarray) -> str:
    """Images `(N, C, H, W)` uint8 side by side as a data URL."""
    from PIL import Image

    picture = Image.fromarray(samples.tile([images]))
    picture.thumbnail((picture.width, THUMBNAIL), Image.Resampling.LANCZOS, reducing_gap=None)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


LOADER = jinja2.FileSystemLoader(Path(__file__).parent)
ENVIRONMENT = jinja2.Environment(loader=LOADER, autoescape=True, undefined=jinja2.StrictUndefined)
ENVIRONMENT.trim_blocks = ENVIRONMENT.lstrip_blocks = True
ENVIRONMENT.filters |= {"numeric": is_numeric, "png": png, "specification": charts.specification}
ENVIRONMENT.globals["missing"] = MISSING
html = ENVIRONMENT.get_template("parts.html.j2").module


def spaced(key: str) -> str:
    return key.replace("_", " ").replace(".", " ")


def csv_table(table: pd.DataFrame, caption: str = "") -> Markup:
    """All columns of a CSV table, without empty ones."""
    table = table.dropna(axis="columns", how="all").rename(columns=spaced)
    return html.datatable(formatting.as_text(table), caption)
