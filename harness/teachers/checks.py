"""Checks of the section `teachers` of an experiment."""

from collections.abc import Collection, Mapping
from typing import Any

from harness.config.schema import DataSection, ImportedTeacher, TrainedTeacher
from harness.data.registry import has_captions, has_texts
from harness.errors import Problem, did_you_mean
from harness.features.base import new_extractor
from harness.io.downloads import source_problems
from harness.networks.registry import BACKBONES, trainable_backbones
from harness.teachers.pipelines import is_pipeline


def check(
    teachers: Mapping[str, TrainedTeacher | ImportedTeacher],
    data: DataSection | None,
    features: Mapping[str, Any],
    feature_names: Collection[str],
    files: bool = True,
) -> list[Problem]:
    """All errors in the section `teachers` that its schema cannot express.

    data: None if its section has errors. features: settings of the valid feature networks;
    feature_names: of all. files: whether the files that it names must exist.
    """
    problems = []
    for name, teacher in teachers.items():
        key = f"teachers.{name}"
        if isinstance(teacher, ImportedTeacher):
            problems += _check_imported(key, teacher, data, files)
        else:
            problems += _check_trained(key, teacher, data)
            if data is not None and data.prompts is None:
                captioned = has_captions(data)
                problems += _check_captions(key, teacher, captioned, features, feature_names)
    return problems


def _check_type(key: str, network: dict[str, Any], known: Collection[str]) -> list[Problem]:
    kind = str(network.get("type"))
    if kind in known:
        return []
    message = f"unknown network {kind!r}{did_you_mean(kind, known)}"
    return [Problem(f"{key}.network.type", "unknown-name", message)]


def _check_imported(
    key: str, teacher: ImportedTeacher, data: DataSection | None, files: bool
) -> list[Problem]:
    """Pipelines need prompts, and only pipelines read them."""
    source, sha256 = teacher.source, teacher.sha256
    where = {"sha256_key": f"{key}.sha256", "required": files, "folder": True}
    problems = source_problems(f"{key}.source", source, sha256, **where)
    pipeline = is_pipeline(teacher)
    if pipeline and sha256 is not None:
        message = "not allowed for the folder of a pipeline"
        problems.append(Problem(f"{key}.sha256", "not-allowed", message))
    if pipeline and data is not None and data.prompts is None:
        problems.append(Problem(key, "no-prompts", "a text-to-image pipeline needs data.prompts"))
    if not pipeline and data is not None and has_texts(data):
        message = "this data set has texts; only a text-to-image pipeline of diffusers reads them"
        problems.append(Problem(key, "reads-no-text", message))
    if teacher.network is not None:
        known = BACKBONES.names() if pipeline else trainable_backbones()
        problems += _check_type(key, teacher.network, known)
    return problems


def _check_trained(key: str, teacher: TrainedTeacher, data: DataSection | None) -> list[Problem]:
    problems = _check_type(key, teacher.network, trainable_backbones())
    if teacher.sampler.guidance != 1 and not teacher.label_dropout:
        message = "needs an unconditional score; train the teacher with label_dropout"
        problems.append(Problem(f"{key}.sampler.guidance", "label-dropout", message))
    if data is not None and not data.has_images:
        message = "needs images for training; this data set has none"
        problems.append(Problem(key, "needs-images", message))
    elif data is not None and data.prompts is not None:
        message = "teachers of prompts cannot be trained here; import a pipeline"
        problems.append(Problem(key, "prompts", message))
    return problems


def _check_captions(
    key: str,
    teacher: TrainedTeacher,
    captioned: bool,
    features: Mapping[str, Any],
    feature_names: Collection[str],
) -> list[Problem]:
    """A teacher of captioned images, and no other, needs a network that reads text and a text
    encoder."""
    kind, encoder = str(teacher.network.get("type")), teacher.text_encoder
    reads_text = kind in BACKBONES and BACKBONES[kind].reads_text
    problems = []
    if reads_text != captioned and kind in trainable_backbones():
        message = f"{kind} reads captions, but this data set has none"
        if captioned:
            reader = next(name for name in trainable_backbones() if BACKBONES[name].reads_text)
            message = f"this data set has captions; use a network that reads text: {reader}"
        problems.append(Problem(f"{key}.network.type", "text", message))
    code = None
    if not captioned:
        if encoder is not None and not reads_text:
            code, message = "not-allowed", "has no effect: this data set has no captions"
    elif encoder is None:
        code = "missing"
        message = "required: the feature network that reads the captions, such as one of type clip"
    elif encoder not in feature_names:
        code = "unknown-name"
        message = f"{encoder!r} is not in features{did_you_mean(encoder, feature_names)}"
    elif encoder in features:
        settings = features[encoder]
        if new_extractor(encoder, settings).text_shape is None:
            code = "no-text-encoder"
            message = f"{encoder} (type {settings.type}) is not a text encoder"
    if code:
        problems.append(Problem(f"{key}.text_encoder", code, message))
    return problems
