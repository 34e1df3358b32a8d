"""Checks of the `data` section of an experiment."""

import os
from dataclasses import replace
from pathlib import Path

from harness.config.schema import DataSection, ExperimentFile, Names
from harness.data.image_archive import IMAGES, INDEXES, PACKED, TABLES
from harness.data.layouts.base import plugin_layouts
from harness.data.prompt_tables import table_format
from harness.data.registry import data_source
from harness.errors import Problem, UserError
from harness.io.downloads import expand, is_address, source_problems
from harness.io.hub import missing_path_hint, revision_problems


def check(file: ExperimentFile, names: Names, files: bool) -> list[Problem]:
    """All errors in the section `data` (see `harness.validation.CHECKS`)."""
    section = file.data
    if section is None:
        return []
    try:
        problems = data_source(section).check()
    except UserError as error:
        key = "data.source" if error.code == "unknown-user" else "data.name"
        return [Problem(key, error.code, str(error))]
    for key, (path, sha256) in section.prompt_files.items():
        problems += source_problems(f"data.{key}", path, sha256, required=files)
        if reason := table_format(path):
            message = f"{path} {reason}; expected one prompt per line, as plain text"
            problems.append(Problem(f"data.{key}", "table", message))
    if not section.labels and section.num_classes is not None:
        message = "not allowed together with labels: false"
        problems.append(Problem("data.num_classes", "not-allowed", message))
    if section.source is not None:
        problems += _check_source(section, files)
    resize, resolution = section.resize, section.resolution
    if resize is not None and resolution not in (None, resize.size):
        message = f"{resolution} contradicts data.resize.size {resize.size}; remove the key"
        problems.append(Problem("data.resolution", "conflict", message))
    return problems


def _check_source(section: DataSection, files: bool) -> list[Problem]:
    if section.revision is not None:
        if section.sha256:
            message = "not allowed together with data.revision"
            return [Problem("data.sha256", "not-allowed", message)]
        return revision_problems("data", section.source, section.revision)
    where = {"sha256_key": "data.sha256", "required": files, "folder": True}
    problems = [
        replace(problem, message=problem.message + missing_path_hint(section.source))
        if problem.code == "missing-file"
        else problem
        for problem in source_problems("data.source", section.source, section.sha256, **where)
    ]
    if problems or is_address(section.source):
        return problems
    path = expand(section.source)
    if section.sha256 and path.is_dir():
        problems.append(Problem("data.sha256", "not-allowed", "not allowed for a folder"))
    known = section.prompts is None and not plugin_layouts()
    if section.labels and known and _has_images_only(path):
        message = f"{section.source} has no class folders and no list of labels"
        message += "; set data.labels: false for data without classes"
        problems.append(Problem("data.labels", "no-labels", message))
    return problems


def _has_images_only(path: Path) -> bool:
    """Whether a folder holds images, but no folders, and no file that may have labels. Larger
    layouts are read by the data stage."""
    if not path.is_dir():
        return False
    found = False
    for entry in os.scandir(path):
        if entry.name.startswith("."):
            continue
        labels = entry.name in (*INDEXES, *TABLES) or entry.name.lower().endswith(PACKED)
        if labels or entry.is_dir() or entry.name.lower().endswith(".zip"):
            return False
        found = found or entry.name.lower().endswith(IMAGES)
    return found
