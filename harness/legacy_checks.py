"""Load an experiment: parse the files, run every package's checks, report all errors together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.config.schema import (
    ImportedTeacher,
    TrainedTeacher,
)
from harness.data import checks as data_checks
from harness.data.registry import has_captions, has_texts
from harness.errors import Problem, did_you_mean
from harness.features.base import FEATURES
from harness.io.downloads import is_address


def _valid(items: dict) -> list[tuple[str, Any]]:
    """The named items of a section that are right by themselves."""
    return list(items.items())


def _check_file(
    place: str, source: str, sha256: tuple[str, str | None], files: bool, folder: bool = False
) -> list[str]:
    """What comes from elsewhere: it is there, or it can be downloaded and checked.

    `sha256`: its key and value; `folder`: it may be one.
    """
    if is_address(source):
        return [] if sha256[1] else [f"{sha256[0]}: missing; a download is checked by its hash"]
    path = Path(source).expanduser()
    if not path.exists():
        return [f"{place}: {source} does not exist"] if files else []
    return [f"{place}: {source} is a folder"] if path.is_dir() and not folder else []


def _captioned(model: Any) -> bool:
    return model.data is not None and has_captions(model.data)


def _check_trained_here(model: Any) -> list[str]:
    """Teachers that cannot be trained on such data."""
    if model.data is None:
        return []
    lines = []
    for name, item in _valid(model.teachers):
        if isinstance(item, ImportedTeacher):
            continue
        if not model.data.has_images:
            lines.append(f"teachers.{name}: needs images to train on; data has none")
        elif model.data.prompts is not None:
            lines.append(f"teachers.{name}: cannot be trained on prompts; import one")
    return lines


def _check_text(name: str, teacher: TrainedTeacher, model: Any) -> list[str]:
    """A teacher trained here takes captions exactly where the data have some."""
    where, kind = f"teachers.{name}", str(teacher.network.get("type"))
    captioned = _captioned(model)
    if model.data is not None and model.data.prompts is not None:
        return []  # told already
    if not captioned and kind == "UNet2DConditionModel":
        return [f"{where}.network.type: {kind} reads captions; data has none"]
    if not captioned:
        given = teacher.text_encoder is not None
        return [f"{where}.text_encoder: means nothing; data has no captions"] * given
    lines = []
    if kind != "UNet2DConditionModel":
        lines.append(f"{where}.network.type: data has captions; UNet2DConditionModel reads them")
    encoder = model.features.get(teacher.text_encoder)
    if teacher.text_encoder is None:
        lines.append(f"{where}.text_encoder: missing; data has captions, and a clip reads them")
    elif teacher.text_encoder not in model.features:
        hint = did_you_mean(teacher.text_encoder, model.features)
        lines.append(f"{where}.text_encoder: {teacher.text_encoder!r} is not under features{hint}")
    elif encoder is not None and FEATURES[encoder.type].text_shape(encoder) is None:
        lines.append(f"{where}.text_encoder: {encoder.type} is no text encoder")
    return lines


def _check_imported(name: str, teacher: ImportedTeacher, model: Any) -> list[str]:
    """A teacher from elsewhere reads prompts exactly where the data are some."""
    from harness.networks import ARCHITECTURES, IMPORTED

    where, lines = f"teachers.{name}", []
    if teacher.pipeline:
        if teacher.sha256 is not None:
            lines.append(f"{where}.sha256: means nothing for a pipeline's folder")
        if model.data is not None and model.data.prompts is None:
            lines.append(f"{where}: a text-to-image pipeline; data.prompts: missing")
    elif model.data is not None and has_texts(model.data):
        lines.append(f"{where}: data has texts; a text-to-image pipeline of diffusers reads them")
    if teacher.network is not None:
        kind = str(teacher.network.get("type"))
        known = IMPORTED if teacher.pipeline else ARCHITECTURES
        if kind not in known:
            hint = did_you_mean(kind, known)
            lines.append(f"{where}.network.type: unknown network {kind!r}{hint}")
    return lines


def problems(model: Any, files: bool) -> list[Problem]:
    lines = []
    model.students_names = model.names["students"]
    lines += _check_trained_here(model)
    from harness.networks import ARCHITECTURES

    for name, teacher in model.teachers.items():
        if isinstance(teacher, ImportedTeacher):
            place, sha256 = f"teachers.{name}.source", (f"teachers.{name}.sha256", teacher.sha256)
            lines += _check_file(place, teacher.source, sha256, files, folder=True)
            lines += _check_imported(name, teacher, model)
            continue
        lines += _check_text(name, teacher, model)
        kind = str(teacher.network.get("type"))
        if kind not in ARCHITECTURES:
            hint = did_you_mean(kind, ARCHITECTURES)
            lines.append(f"teachers.{name}.network.type: unknown network {kind!r}{hint}")
    lines += _check_guidance(model)
    found = data_checks.check(model.data, files) if model.data else []
    return found + [
        Problem(*line.split(": ", 1)[:1], "invalid", line.split(": ", 1)[1]) for line in lines
    ]


def _check_guidance(model: Any) -> list[str]:
    blind = {
        name
        for name, teacher in model.teachers.items()
        if isinstance(teacher, TrainedTeacher) and not teacher.label_dropout
    }
    why = "needs an unconditional score; train the teacher with label_dropout"
    return [
        f"teachers.{name}.sampler.guidance: {why}"
        for name in sorted(blind)
        if model.teachers[name].sampler.guidance != 1
    ]
