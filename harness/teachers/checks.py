"""Checks of the section `teachers` of an experiment."""

from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from harness.config import schema
from harness.config.schema import ImportedTeacher, TrainedTeacher
from harness.data.registry import data_source, has_captions, has_texts
from harness.errors import Problem, UserError, did_you_mean
from harness.features.base import new_extractor
from harness.io.downloads import source_problems
from harness.io.hub import missing_path_hint, revision_problems
from harness.networks.arguments import argument_problems
from harness.networks.registry import BACKBONES, trainable_backbones
from harness.teachers import sources
from harness.teachers.facts import teacher_facts


def check(file: schema.ExperimentFile, names: schema.Names, files: bool) -> Iterator[Problem]:
    """All errors in the section `teachers` (see `harness.validation.CHECKS`)."""
    for name, teacher in file.teachers.items():
        key = f"teachers.{name}"
        yield from _check_arguments(key, teacher.network)
        if isinstance(teacher, ImportedTeacher):
            yield from _check_imported(key, teacher, file.data, files)
        else:
            yield from _check_trained(key, teacher, file.data)
            if file.data is not None and file.data.prompts is None:
                yield from _check_captions(key, teacher, file, names["features"])


def _check_type(key: str, kind: object, known: Collection[str]) -> Iterator[Problem]:
    if kind is None:
        message = f"missing; known: {', '.join(sorted(known))}"
        yield Problem(f"{key}.network.type", "missing-key", message)
    elif str(kind) not in known and str(kind) in BACKBONES:
        yield Problem(f"{key}.network.type", "not-trainable", f"{kind} can only be imported")
    elif str(kind) not in known:
        message = f"unknown network {str(kind)!r}{did_you_mean(str(kind), known)}"
        yield Problem(f"{key}.network.type", "unknown-name", message)


def _check_arguments(key: str, network: dict[str, Any] | None) -> Iterator[Problem]:
    if network and str(network.get("type")) in BACKBONES:
        for argument, code, message in argument_problems(network):
            yield Problem(f"{key}.network.{argument}", code, message)


def fetch_configs(file: schema.ExperimentFile) -> Iterator[Problem]:
    """Download the configs, a few kilobytes, of teachers in repositories. What the network can do
    is needed for defaults and checks."""
    for name, teacher in file.teachers.items():
        key = f"teachers.{name}"
        if not isinstance(teacher, ImportedTeacher):
            continue
        if revision_problems(key, teacher.source, teacher.revision):
            continue  # reported by `check`
        try:
            sources.download_configs(teacher)
        except UserError as error:
            yield Problem(f"{key}.source", error.code, str(error))


def _check_imported(
    key: str, teacher: ImportedTeacher, data: schema.DataSection | None, files: bool
) -> Iterator[Problem]:
    """Pipelines need prompts, and only pipelines read them."""
    if teacher.revision is not None:
        yield from revision_problems(key, teacher.source, teacher.revision)
        if teacher.sha256 is not None:
            message = "not allowed with revision, which identifies the files"
            yield Problem(f"{key}.sha256", "not-allowed", message)
    else:
        where = {"sha256_key": f"{key}.sha256", "required": files, "folder": True}
        problems = source_problems(f"{key}.source", teacher.source, teacher.sha256, **where)
        hint = missing_path_hint(teacher.source)
        for problem in problems:
            missing = problem.code == "missing-file"
            yield replace(problem, message=problem.message + hint) if missing else problem
    kind = sources.kind_of(teacher)
    if files and kind is not None:
        try:
            sources.check_files(teacher, kind)
        except UserError as error:
            yield Problem(f"{key}.source", error.code, str(error))
    if kind in ("text-to-image", "ddpm") and teacher.sha256 and teacher.revision is None:
        message = "not allowed for the folder of a pipeline"
        yield Problem(f"{key}.sha256", "not-allowed", message)
    text = sources.reads_text(teacher, files)
    if text and data is not None and data.prompts is None:
        yield Problem(key, "no-prompts", "a text-to-image pipeline needs data.prompts")
    if not text and data is not None and has_texts(data):
        message = "this data set has texts; only a text-to-image pipeline of diffusers reads them"
        yield Problem(key, "reads-no-text", message)
    if teacher.network is not None:
        known = sorted(BACKBONES) if text or sources.is_module(teacher) else trainable_backbones()
        yield from _check_type(key, teacher.network.get("type"), known)
    facts = teacher_facts(teacher, data)
    if teacher.sampler.guidance != 1 and not facts.unconditional:
        message = f"needs an unconditional score, which {facts.network} does not have"
        yield Problem(f"{key}.sampler.guidance", "unsupported", message)
    sampler, network = teacher.sampler, sources.network_of(teacher)
    if sampler.sigma_min >= sampler.sigma_max:  # one of them is a default, from the schedule
        message = f"sigma_min {sampler.sigma_min:g} must be below sigma_max {sampler.sigma_max:g}"
        yield Problem(f"{key}.sampler", "invalid-value", f"{message}; set both")
    from_files = kind is not None and not sources.is_module(teacher)
    if network and data is not None and from_files and not text:
        yield from _check_images(key, network, data)
    if network and network.levels and teacher.sampler.sigma_max > 1.01 * network.levels[1]:
        message = f"{teacher.sampler.sigma_max:g} exceeds the pipeline's largest noise level,"
        message += f" {network.levels[1]:.4g}, which is the default"
        yield Problem(f"{key}.sampler.sigma_max", "noise-level", message)


def _check_images(
    key: str, network: sources.Network, data: schema.DataSection
) -> Iterator[Problem]:
    """Compare an imported network's images and classes with what the data section declares. The
    stage compares them with the prepared data."""
    with suppress(UserError):  # reported by the checks of `data`
        source = data_source(data)
        size = source.image_shape[1] if source.image_shape else None
        if None not in (size, network.size) and size != network.size:
            message = f"generates images of {network.size} x {network.size} pixels, but data"
            message += f" {data.name} has {size} x {size}"
            remedy = f"; set data.resize.size: {network.size}" if data.resize is not None else ""
            yield Problem(f"{key}.source", "shape", message + remedy)
        if source.has_classes and network.conditional is False:
            message = "has no class labels, but the data has; set data.labels: false"
            yield Problem(f"{key}.source", "classes", message)


def _check_trained(
    key: str, teacher: TrainedTeacher, data: schema.DataSection | None
) -> Iterator[Problem]:
    yield from _check_type(key, teacher.network.get("type"), trainable_backbones())
    if teacher.augment and not (facts := teacher_facts(teacher, data)).augment_labels:
        message = f"{facts.network} takes no augmentation labels; a SongUNet with augment_dim: 9"
        yield Problem(f"{key}.augment", "augment-labels", f"{message} does")
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
    key: str, teacher: TrainedTeacher, file: schema.ExperimentFile, feature_names: list[str]
) -> Iterator[Problem]:
    """A teacher of captioned images, and no other, needs a network that reads text and a text
    encoder."""
    kind, encoder, features = str(teacher.network.get("type")), teacher.text_encoder, file.features
    readers = [name for name in trainable_backbones() if BACKBONES[name].reads_text]
    captioned = has_captions(file.data)
    if (kind in readers) != captioned and kind in trainable_backbones():
        message = f"{kind} reads captions, but this data set has none"
        if captioned:
            message = f"this data set has captions; use a network that reads text: {readers[0]}"
        yield Problem(f"{key}.network.type", "text", message)
    key = f"{key}.text_encoder"
    if not captioned:
        if encoder is not None and kind not in readers:
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
