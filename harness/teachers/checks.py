"""Checks of the section `teachers` of an experiment."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from harness.config.schema import (
    DataSection,
    ExperimentFile,
    ImportedTeacher,
    Names,
    TrainedTeacher,
)
from harness.data.registry import has_captions, has_texts
from harness.errors import Problem, did_you_mean
from harness.features.base import new_extractor
from harness.io.downloads import source_problems
from harness.networks.registry import BACKBONES, trainable_backbones
from harness.teachers.pipelines import is_pipeline


def check(file: ExperimentFile, names: Names, files: bool) -> Iterator[Problem]:
    """All errors in the section `teachers` (see `harness.validation.CHECKS`)."""
    data = file.data
    for name, teacher in file.teachers.items():
        key = f"teachers.{name}"
        if isinstance(teacher, ImportedTeacher):
            yield from _check_imported(key, teacher, data, files)
        else:
            yield from _check_trained(key, teacher, data)
            if data is not None and data.prompts is None:
                captioned = has_captions(data)
                yield from _check_captions(
                    key, teacher, captioned, file.features, names["features"]
                )


def _check_type(key: str, network: dict[str, Any], known: Collection[str]) -> Iterator[Problem]:
    kind = str(network.get("type"))
    if kind not in known:
        message = f"unknown network {kind!r}{did_you_mean(kind, known)}"
        yield Problem(f"{key}.network.type", "unknown-name", message)


def _check_imported(
    key: str, teacher: ImportedTeacher, data: DataSection | None, files: bool
) -> Iterator[Problem]:
    """Pipelines need prompts, and only pipelines read them."""
    source, sha256 = teacher.source, teacher.sha256
    where = {"sha256_key": f"{key}.sha256", "required": files, "folder": True}
    yield from source_problems(f"{key}.source", source, sha256, **where)
    pipeline = is_pipeline(teacher)
    if pipeline and sha256 is not None:
        message = "not allowed for the folder of a pipeline"
        yield Problem(f"{key}.sha256", "not-allowed", message)
    if pipeline and data is not None and data.prompts is None:
        yield Problem(key, "no-prompts", "a text-to-image pipeline needs data.prompts")
    if not pipeline and data is not None and has_texts(data):
        message = "this data set has texts; only a text-to-image pipeline of diffusers reads them"
        yield Problem(key, "reads-no-text", message)
    if teacher.network is not None:
        known = sorted(BACKBONES) if pipeline else trainable_backbones()
        yield from _check_type(key, teacher.network, known)


def _check_trained(
    key: str, teacher: TrainedTeacher, data: DataSection | None
) -> Iterator[Problem]:
    yield from _check_type(key, teacher.network, trainable_backbones())
    if teacher.sampler.guidance != 1 and not teacher.label_dropout:
        message = "needs an unconditional score; train the teacher with label_dropout"
        yield Problem(f"{key}.sampler.guidance", "label-dropout", message)
    if data is not None and not data.has_images:
        message = "needs images for training; this data set has none"
        yield Problem(key, "needs-images", message)
    elif data is not None and data.prompts is not None:
        message = "teachers of prompts cannot be trained here; import a pipeline"
        yield Problem(key, "prompts", message)


def _check_captions(
    key: str,
    teacher: TrainedTeacher,
    captioned: bool,
    features: Mapping[str, Any],
    feature_names: Collection[str],
) -> Iterator[Problem]:
    """A teacher of captioned images, and no other, needs a network that reads text and a text
    encoder."""
    kind, encoder = str(teacher.network.get("type")), teacher.text_encoder
    reads_text = kind in BACKBONES and BACKBONES[kind].reads_text
    if reads_text != captioned and kind in trainable_backbones():
        message = f"{kind} reads captions, but this data set has none"
        if captioned:
            reader = next(name for name in trainable_backbones() if BACKBONES[name].reads_text)
            message = f"this data set has captions; use a network that reads text: {reader}"
        yield Problem(f"{key}.network.type", "text", message)
    key = f"{key}.text_encoder"
    if not captioned:
        if encoder is not None and not reads_text:
            yield Problem(key, "not-allowed", "has no effect: this data set has no captions")
    elif encoder is None:
        message = "required: the feature network that reads the captions, such as one of type clip"
        yield Problem(key, "missing", message)
    elif encoder not in feature_names:
        message = f"{encoder!r} is not in features{did_you_mean(encoder, feature_names)}"
        yield Problem(key, "unknown-name", message)
    elif encoder in features and new_extractor(encoder, features[encoder]).text_shape is None:
        message = f"{encoder} (type {features[encoder].type}) is not a text encoder"
        yield Problem(key, "no-text-encoder", message)
