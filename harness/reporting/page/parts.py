"""What the page's sections use to make their parts: the templates and texts for table cells."""

import base64
import io
import re
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup

from harness.reporting.figures import charts, samples
from harness.reporting.formatting import MISSING, as_text

NUMBER = re.compile(r"(tie )?[-−+]?\d")
THUMBNAIL = 96  # pixels: larger sample images are scaled down


def is_numeric(table: pd.DataFrame) -> list[bool]:
    """For each column whether its first known text is a number."""
    first = [next((str(v) for v in values if v != MISSING), "") for _, values in table.items()]
    return [bool(NUMBER.match(text)) for text in first]


def png(images: np.ndarray) -> str:
    """Images `(N, C, H, W)` uint8 side by side as a data URL."""
    from PIL import Image

    picture = Image.fromarray(samples.tile([images]))
    picture.thumbnail((picture.width, THUMBNAIL), Image.Resampling.LANCZOS, reducing_gap=None)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


ENVIRONMENT = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
ENVIRONMENT.filters |= {"numeric": is_numeric, "png": png, "specification": charts.specification}
html = ENVIRONMENT.get_template("parts.html.j2").module


def hash_code(value: str | None) -> Markup:
    return Markup("<code>{}</code>").format(value[:12]) if value else Markup(MISSING)


def spaced(key: str) -> str:
    return key.replace("_", " ").replace(".", " ")


def csv_text(table: pd.DataFrame) -> pd.DataFrame:
    """A CSV table as texts; empty columns are dropped."""
    return as_text(table.dropna(axis="columns", how="all").rename(columns=spaced))
