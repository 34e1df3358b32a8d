"""Texts and HTML of table cells."""

from __future__ import annotations

import base64
import io
import math
import re

import numpy as np
import pandas as pd
from markupsafe import Markup, escape

from harness.reporting.formatting import MISSING, flagged, is_known, spread_text

NUMBER = re.compile(r"(tie )?[-−+]?\d")
THUMBNAIL = 96  # pixels: larger sample images are scaled down


def score_cell(row) -> str:
    """A row of `Summary.scores`: mean ± std over training seeds, below it the sampling error."""
    if row.status != "ok":
        return row.status
    text = flagged(minus(spread_text(row.mean, row.std)), row.flag)
    error = row.sampling_std if is_known(row.sampling_std) else row.stderr
    if text == MISSING or not is_known(error):
        return text
    error = format(error, ".1g" if error < 1 else ".3g")
    return Markup("{}<small>± {}</small>").format(text, minus(error))


def minus(text: str) -> str:
    """A number's text with a typographic minus sign."""
    return text.replace("-", "−")


def code_spans(text: str) -> Markup:
    """A note with its `code` marked up and all else escaped."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def cells(table: pd.DataFrame) -> list[list]:
    return table.astype(object).to_numpy().tolist()


def is_numeric(table: pd.DataFrame) -> list[bool]:
    """For each column whether its first known text is a number."""
    texts = [[str(v) for v in table.iloc[:, i] if v != MISSING] for i in range(table.shape[1])]
    return [bool(column and NUMBER.match(column[0])) for column in texts]


def text_frame(table: pd.DataFrame) -> pd.DataFrame:
    """A CSV table as texts; empty columns are dropped."""

    def text(value) -> str:
        if not is_known(value):
            return MISSING
        return f"{value:.6g}" if isinstance(value, float) else str(value)

    table = table.dropna(axis="columns", how="all").rename(columns=spaced)
    return table.astype(object).map(text)


def interval_texts(row) -> tuple[str, str]:
    """A difference and its interval, rounded to the decimals that the interval's width supports."""
    if not is_known(row.difference):
        return "", ""
    bounded = is_known(row.low) and is_known(row.high) and row.high > row.low
    size = (row.high - row.low) / 2 if bounded else abs(row.difference) / 10
    decimals = max(0, 1 - math.floor(math.log10(size))) if size else 2
    form = f"+.{decimals}f" if decimals <= 6 else "+.1e"
    bounds = [minus(format(bound, form)) for bound in (row.low, row.high) if is_known(bound)]
    return minus(format(row.difference, form)), f"({' to '.join(bounds)})" if bounds else ""


def difference_cell(row, a_is_better: bool | None, swap: bool = False) -> Markup:
    """A difference with its interval and a mark, if the pair is decided; swap: the row is b."""
    difference, bounds = interval_texts(row)
    kind, mark = "", ""
    if a_is_better is not None:
        kind, mark = ("better", "▲ ") if a_is_better != swap else ("worse", "▼ ")
    text = Markup('<span class="{}">{}{}<small>{}</small></span>')
    return text.format(kind, mark, difference, bounds)


def verdict_badge(verdict: str) -> Markup:
    mark = {"supported": "✓ ", "contradicted": "✗ "}.get(verdict, "? ")
    return Markup('<span class="{}">{}{}</span>').format(verdict, mark, verdict)


def strip(images: np.ndarray) -> str:
    """Images `(N, C, H, W)` uint8 side by side as the data URL of a PNG with transparent gaps."""
    from PIL import Image

    count, _, height, width = images.shape
    gap = max(1, width // 12)
    canvas = np.zeros((height, count * (width + gap) - gap, 4), np.uint8)
    for i, image in enumerate(images):
        left = i * (width + gap)
        canvas[:, left : left + width, :3] = image.transpose(1, 2, 0)  # grey fills three channels
        canvas[:, left : left + width, 3] = 255
    picture = Image.fromarray(canvas)
    if height > THUMBNAIL:
        size = (round(picture.width * THUMBNAIL / height), THUMBNAIL)
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def spaced(key: str) -> str:
    return str(key).replace("_", " ").replace(".", " ")


def shortened(text: str) -> str:
    """A sha256 by its first digits, other texts in full."""
    return text[:12] if re.fullmatch("[0-9a-f]{64}", text) else text


def hash_code(value: str | None) -> Markup:
    return Markup("<code>{}</code>").format(value[:12]) if value else Markup(MISSING)


def warning(text: str) -> Markup:
    return Markup('<span class="warning">{}</span>').format(text)
