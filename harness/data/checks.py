"""Checks of the `data` section of an experiment."""

from pathlib import Path

from harness.config.schema import ExperimentFile, Names
from harness.data.prompt_tables import table_format
from harness.data.registry import data_source
from harness.errors import Problem, UserError
from harness.io.downloads import source_problems


def check(file: ExperimentFile, names: Names, files: bool) -> list[Problem]:
    """All errors in the section `data` (see `harness.validation.CHECKS`)."""
    section = file.data
    if section is None:
        return []
    try:
        problems = data_source(section).check()
    except UserError as error:
        return [Problem("data.name", error.code, str(error))]
    for key, (path, sha256) in section.prompt_files.items():
        problems += source_problems(f"data.{key}", path, sha256, required=files)
        if reason := table_format(path):
            message = f"{path} {reason}; expected one prompt per line, as plain text"
            problems.append(Problem(f"data.{key}", "table", message))
    if not section.labels and section.num_classes is not None:
        message = "not allowed together with labels: false"
        problems.append(Problem("data.num_classes", "not-allowed", message))
    if section.source is not None:
        where = {"sha256_key": "data.sha256", "required": files, "folder": True}
        problems += source_problems("data.source", section.source, section.sha256, **where)
        if section.sha256 and Path(section.source).expanduser().is_dir():
            problems.append(Problem("data.sha256", "not-allowed", "not allowed for a folder"))
    return problems
