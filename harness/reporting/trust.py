"""Warnings that limit how far a ranking can be trusted, for the log, the tables' notes and the
page: feature networks and teachers near chance, and what the import of a teacher found."""

import pandas as pd

from harness.config.experiment import Experiment
from harness.data import datasets
from harness.features.chance import network_warnings, teacher_warnings
from harness.io.records import DataRecord, TeacherRecord
from harness.reporting.collect import collect


def warnings(experiment: Experiment, table: pd.DataFrame | None = None) -> list[str]:
    """The warnings of an experiment, one line each. table: of `collect`, if it is known."""
    table = collect(experiment, partial=True)[0] if table is None else table
    data = DataRecord.read_optional(experiment.paths.data / "data.json")
    if data is None:
        return []
    dataset = datasets.load(experiment.paths.data, images=False)
    folders = {
        name: (s, experiment.paths.features(name)) for name, s in experiment.features.items()
    }
    networks = network_warnings(folders, dataset, data.held_out_images)
    lines, numbers = list(networks.values()), table[table.value.notna()]
    for name in experiment.teachers:
        record = TeacherRecord.read_optional(experiment.paths.teacher(name) / "teacher.json")
        lines += [f"teacher {name}: {text}" for text in getattr(record, "warnings", ())]
        rows = numbers[numbers.student == experiment.teacher_row(name)].itertuples()
        lines += teacher_warnings(name, rows, dataset, networks)
    return lines
