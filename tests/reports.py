"""Synthetic scores and records, from which tests write tables and pages without a workflow."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from harness.evaluation.registry import METRICS, column_name
from harness.io.records import Samples, StudentRecord
from harness.reporting.collect import COLUMNS
from harness.reporting.figures import samples
from harness.reporting.figures.samples import ScoredSamples
from harness.reporting.manifest import manifest
from harness.reporting.page.page import write_page
from harness.reporting.tables import summarise

HELD_OUT = 359


def tidy_table(
    experiment,
    numbers: dict[tuple, dict],
    flags: dict | None = None,
    features: int = 64,
    devices: dict | None = None,
    curve: bool = False,
) -> pd.DataFrame:
    """`collect`'s table of last snapshots and, with `curve`, of one at half the images and compute,
    where all values of students are twice as large.

    numbers: (metric, extractor) -> row -> one value per training seed, or a status. flags: (row,
    extractor) -> flags. devices: row -> device, default "cpu". The sample count is the main one, HELD_OUT for the floor. features: the
    dimension of all extractors.
    """
    rows = []
    for (metric, extractor), values in numbers.items():
        for student, scores in values.items():
            text, is_reference = isinstance(scores, str), student in experiment.reference_rows
            count = HELD_OUT if student == "floor" else experiment.evaluation.num_samples
            column = column_name(metric, METRICS[metric].count(count), extractor)
            for seed, value in enumerate([math.nan] if text else scores):
                left = [value + 1e-6 * math.sin(g + len(student)) for g in range(10)]
                seeds = [None] if student == "floor" else experiment.evaluation.sampling_seeds
                for sample_seed in seeds:
                    row = dict.fromkeys([*COLUMNS, "grid", "selected"]) | {
                        "student": student, "method": None if is_reference else "sid",
                        "seed": None if is_reference else seed, "snapshot": "x",
                        "nfe": 35 if student == "teacher" else 1,
                        "images": None if is_reference else 160,
                        "flops": None if is_reference else 1e12,
                        "seconds": 1.0, "sample_seed": sample_seed, "metric": metric,
                        "extractor": extractor, "num_samples": METRICS[metric].count(count),
                        "reference": "digits", "value": value, "stderr": 0.1, "protocol": column,
                        "flag": (flags or {}).get((student, extractor), ""),
                        "status": scores if text else "ok", "final": True, "grid": "images flops",
                        "device": (devices or {}).get(student, "cpu"),
                        "leave_out": [] if text else left, "features": features, "column": column,
                    }  # fmt: skip
                    rows.append(row)
    integers = ("seed", "nfe", "images", "sample_seed", "num_samples", "selected")
    table = pd.DataFrame(rows).astype(dict.fromkeys(integers, "Int64"))
    if not curve:
        return table
    first = table[table.seed.notna() & (table.status == "ok")]
    first = first.drop_duplicates(["student", "seed", "column"])
    numbers = {"images": first.images // 2, "flops": first.flops / 2, "value": first.value * 2}
    first = first.assign(seconds=0.5, final=False, snapshot="half", **numbers)
    return pd.concat([table, first], ignore_index=True)


def write_run(experiment, student: str, seed: int, **fields) -> None:
    """Write student.json and train.csv of a finished run; `fields` override those of the record."""
    folder = experiment.paths.run(student, seed)
    ledger = {"images": 160, "flops": 10**12, "seconds": 1.0, "peak_memory": 2**30}
    record = {
        "harness": "0", "torch": "0", "run_id": "r", "sha256": "5" * 64, "fingerprint": "f",
        "stop": {"unit": "images", "amount": 160}, "skipped_steps": {}, "ledger": ledger,
        "experiment": experiment.name, "student": student, "seed": seed, "method": "sid",
        "paper": "p", "data_free": True, "deviations": [], "settings": {}, "changed_settings": {},
        "freeze": "none", "teacher": "edm", "trained_against": [], "pretraining": [],
        "device": "cpu", "device_name": "cpu", "processes": 1, "nfe": 1, "parameters": 1, "frozen_fraction": 0.0,
        "inputs": {}, "snapshots": [], "contended": False,
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    StudentRecord.model_validate(record | fields).write(folder / "student.json")
    log = {"images": [32, 64, 96], "images_per_second": [9.0, 10.0, 11.0]}
    log |= {"loss/generator": [3.0, 2.0, 1.0], "grad_norm/generator": [0.3, 0.2, 0.1]}
    pd.DataFrame(log | {"nonfinite/generator": [0, 0, 0]}).to_csv(folder / "train.csv", index=False)


def kept_samples(rows: list[str]) -> dict[str, ScoredSamples]:
    """Kept samples of some rows: 40 images of 10 classes, and 10 nearest neighbours."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (40, 1, 8, 8), dtype=np.uint8)
    tensors = {"pixels": pixels, "labels": np.arange(40) % 10}
    for prefix in ("", "floor_"):
        tensors[f"{prefix}closest"] = tensors[f"{prefix}closest_training"] = pixels[:10]
        tensors[f"{prefix}closest_distance"] = np.linspace(0.1, 0.9, 10)
    record = Samples.model_construct(
        neighbour_extractor="tiny-cnn", neighbour_rows=1438, neighbour_unit="median"
    )
    return {row: ScoredSamples(tensors, record) for row in rows}


class Page(HTMLParser):
    """The elements of a page with their attributes, its text, and the specifications of its
    charts."""

    VOID = ("meta", "link", "img", "br")

    def __init__(self, path: Path):
        super().__init__()
        self.elements, self.open, self.text, self.charts = [], [], "", []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert not self.open, f"unclosed elements: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        tag, attributes = self.open[-1] if self.open else ("", {})
        if attributes.get("type") == "application/json":
            self.charts.append(json.loads(data))
        elif tag not in ("style", "script"):
            self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def sections(self) -> list[str]:
        return [heading["id"] for heading in self.all("h2")]

    @property
    def words(self) -> str:
        """The text with single spaces."""
        return re.sub(r"\s+", " ", self.text)


def page(experiment, table: pd.DataFrame, kept: dict[str, ScoredSamples] | None = None) -> Page:
    """Write and read the page of a table, with `kept` samples instead of those of score files."""
    experiment.paths.tables.mkdir(parents=True, exist_ok=True)
    record = manifest(experiment, {}, [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "read_samples", lambda *_: kept or {})
        return Page(write_page(experiment, table, summarise(experiment, table), record))
