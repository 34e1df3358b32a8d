"""In which ways a run differs from the run behind a published number; without any it is `exact`.

settings.yaml: the settings of the papers' students. The networks, samplers and reference statistics
are EDM's (NVlabs/edm), which all papers here use. Each difference is one phrase, which names the
key of the experiment.
"""

import inspect
from collections.abc import Mapping
from contextlib import suppress
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from harness.config.experiment import Experiment
from harness.config.schema import ImportedTeacher, Sampler
from harness.data.registry import DATASETS, data_source
from harness.discriminators.class_table import CLASS_TABLE_SHA256
from harness.errors import UserError
from harness.io.records import DataRecord
from harness.networks.registry import BACKBONES
from harness.reporting.collect import training_record
from harness.reporting.published.match import (
    is_stochastic,
    name_conditions,
    network,
    network_config,
    read_lines,
)

# Arguments of EDM's published networks that do not depend on the data set.
_SONG = {
    **{"model_channels": 128, "channel_mult_emb": 4, "num_blocks": 4, "attn_resolutions": [16]},
    **{"augment_dim": 9, "label_dropout": 0.0, "decoder_type": "standard"},
}
NETWORKS = {
    "vp": _SONG
    | {"embedding_type": "positional", "encoder_type": "standard"}
    | {"channel_mult_noise": 1, "resample_filter": [1, 1]},
    "ve": _SONG
    | {"embedding_type": "fourier", "encoder_type": "residual"}
    | {"channel_mult_noise": 2, "resample_filter": [1, 3, 3, 1]},
    "adm": {
        **{"model_channels": 192, "channel_mult_emb": 4, "num_blocks": 3},
        **{"attn_resolutions": [32, 16, 8], "augment_dim": 0, "label_dropout": 0.0},
    },
}
CHURN = {"s_churn": 40.0, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003}  # stochastic sampler
# FID -> one that is the same number on 8-bit images.
EQUAL = {"fid-legacy-tensorflow": "fid-edm"}


class Published(NamedTuple):
    """The published protocol of a data set, and EDM's networks for it.

    metric: the FID, by its name here. statistics: the file of reference statistics; None: the
    reference is real images. network: arguments that all networks for the data set share. classes:
    of the conditional ones. kinds: which of NETWORKS there are. steps: of the teacher's sampler.
    """

    metric: str
    statistics: str | None
    network: Mapping[str, Any] = {}
    classes: int = 0
    kinds: tuple[str, ...] = ()
    steps: int | None = None


def _edm(name: str, multiples: list[int], dropout: float, steps: int, **facts: Any) -> Published:
    size = int(name.rpartition("x")[2])
    network = {"img_resolution": size, "channel_mult": multiples, "dropout": dropout}
    return Published("fid-edm", f"{name}.npz", network, steps=steps, **facts)


_BOTH = ("vp", "ve")
PUBLISHED = {
    "CIFAR-10": _edm("cifar10-32x32", [2, 2, 2], 0.13, 18, classes=10, kinds=_BOTH),
    "FFHQ-64": _edm("ffhq-64x64", [1, 2, 2, 2], 0.05, 40, kinds=_BOTH),
    "AFHQv2-64": _edm("afhqv2-64x64", [1, 2, 2, 2], 0.25, 40, kinds=_BOTH),
    "ImageNet-64": _edm("imagenet-64x64", [1, 2, 3, 4], 0.1, 256, classes=1000, kinds=("adm",)),
    "COCO-2014-30k (zero-shot)": Published("fid-coco", None),
}


def _instead(found: Any, expected: Any) -> str:
    texts = (f"{x:g}" if isinstance(x, float) else f"{x}" for x in (found, expected))
    return " instead of ".join(texts)


def _changes(found: Mapping, expected: Mapping) -> str:
    """The differing values of two mappings, as one phrase; empty if all are equal."""
    pairs = {key: (found.get(key), value) for key, value in expected.items()}
    texts = [f"{key} {_instead(*pair)}" for key, pair in pairs.items() if pair[0] != pair[1]]
    return ", ".join(texts)


# -- training -----------------------------------------------------------------------------------


def training_differences(experiment: Experiment, name: str, entry: dict) -> list[str] | None:
    """How a student's training differs from that of an entry, or a teacher's network and sampler
    from EDM's. None if the published settings are unknown."""
    if teacher := experiment.reference_rows.get(name):
        return _of_teacher_row(experiment, teacher, entry)
    student = experiment.students[name]
    wanted = {"method": student.method} | {k: entry[k] for k in ("dataset", "conditioning")}
    lines = [line for line in read_lines("settings.yaml") if wanted.items() <= line.items()]
    by_variant = {line["variant"]: line for line in lines}
    original = by_variant.get(entry["variant"]) or by_variant.get(None)
    conditions, settings = name_conditions(student, entry), student.settings
    if conditions is None or original is None:
        return None
    expected = type(settings)(**original["settings"])
    # The file of a class table has any name; random embeddings are a deviation of the method.
    other = {*conditions, "class_table"}
    changed = [k for k, v in settings if k not in other and v != getattr(expected, k)]
    changed += _of_class_table(experiment, name)
    limit, *more = student.budget
    excess = limit.amount - original["images"]
    # Budgets are whole batches, so up to one batch more than published.
    if more or limit.unit != "images" or not 0 <= excess < settings.batch:
        changed.append("budget")
    changed += teacher_differences(experiment, student.teacher, original["teacher"], entry)
    if student.pairs and original["teacher"] in NETWORKS:
        sampler = student.pairs.sampler  # its steps are a setting
        changed += _of_sampler("sampler of the pairs", sampler, Sampler(steps=sampler.steps))
    precision = experiment.student_training(name).precision
    if original["precision"] not in (None, precision):
        changed.append(f"precision ({_instead(precision, original['precision'])})")
    if experiment.student_training(name).tf32 or experiment.evaluation.tf32:
        changed.append("tf32")
    return changed + _of_sampling(experiment) + _of_data(experiment)


def _of_teacher_row(experiment: Experiment, teacher: str, entry: dict) -> list[str] | None:
    """The differences of a teacher's row. None for teachers that are not EDM's."""
    protocol, sampler = PUBLISHED.get(entry["dataset"]), experiment.teachers[teacher].sampler
    if protocol is None or not protocol.kinds:
        return None
    found = network(experiment, teacher)
    kind = found if found in protocol.kinds else protocol.kinds[0]
    changed = teacher_differences(experiment, teacher, kind, entry)
    # DMD counts 512 evaluations of 256 steps.
    steps = (entry["nfe"] + 1) // 2 if entry["nfe"] else protocol.steps
    expected = Sampler(steps=steps, **(CHURN if is_stochastic(entry) else {}))
    changed += _of_sampler("sampler", sampler, expected)
    return changed + (["tf32"] if experiment.evaluation.tf32 else []) + _of_sampling(experiment)


def teacher_differences(experiment: Experiment, teacher: str, kind: str, entry: dict) -> list[str]:
    """How a teacher differs from the published network `kind` (a key of NETWORKS, or as `network`
    returns it) for an entry's data set."""
    section, found = experiment.teachers[teacher], network(experiment, teacher)
    changed = [] if isinstance(section, ImportedTeacher) else ["teacher (trained here)"]
    if found != kind:
        return [*changed, f"network ({_instead(found or 'another', kind)})"]
    protocol = PUBLISHED.get(entry["dataset"])
    if kind not in NETWORKS or protocol is None:
        return changed
    config, conditional = _arguments(experiment, teacher), entry["conditioning"] == "cond"
    expected = NETWORKS[kind] | protocol.network
    expected |= {"label_dim": protocol.classes if conditional else 0}
    # Before there is a config.json, the data decide `img_resolution` and `label_dim`.
    text = _changes(config, {k: v for k, v in expected.items() if k in config})
    return [*changed, f"network ({text})"] if text else changed


def _arguments(experiment: Experiment, teacher: str) -> dict[str, Any]:
    """All arguments of a teacher's network, with lists as in JSON."""
    config = network_config(experiment, teacher)
    if "_class_name" not in config:  # from the experiment, without defaults
        model = BACKBONES[config["type"]].model_class()
        signature = inspect.signature(model.__init__).parameters
        own = {name: p.default for name, p in signature.items() if p.default is not p.empty}
        config = {k: v for k, v in own.items() if k != "label_dim"} | config
    return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}


def _of_sampler(what: str, sampler: Sampler, expected: Sampler) -> list[str]:
    """The differing keys of two samplers. Without churn the keys of the noise have no effect."""
    found = sampler.model_dump()
    if not sampler.s_churn and not expected.s_churn:
        found |= Sampler().model_dump(include={*CHURN})
    text = _changes(found, expected.model_dump())
    return [f"{what} ({text})"] if text else []


def _of_sampling(experiment: Experiment) -> list[str]:
    """Whether networks sample in another precision than float32."""
    precision = experiment.evaluation.precision
    return [] if precision == "fp32" else [f"evaluation.precision ({_instead(precision, 'fp32')})"]


def _of_class_table(experiment: Experiment, name: str) -> list[str]:
    """Whether a run of a student read another class table than the authors'."""
    hashes = set()
    for seed in (seed for student, seed in experiment.runs if student == name):
        with suppress(UserError):  # a damaged record has no scores either
            record = training_record(experiment, name, seed)
            hashes.add(record and record.inputs.get("class_table"))
    return ["class_table (not the authors' table)"] if hashes - {None, CLASS_TABLE_SHA256} else []


def _of_data(experiment: Experiment) -> list[str]:
    """Papers train on all images of a data set that `data.held_out` divides."""
    data, path = experiment.data, experiment.paths.data / "data.json"
    record = DataRecord.read_optional(path)  # the source may be gone
    source = DATASETS[data.name] if record and record.registered else data_source(data)
    if data.has_images and "held_out" in source.keys and data.held_out:
        return [f"held_out ({_instead(data.held_out, 0)})"]
    return []


# -- evaluation ---------------------------------------------------------------------------------


def is_published_fid(metric: str, entry: dict) -> bool:
    """Whether an entry's FID has the detector's resize of `metric`."""
    protocol = PUBLISHED.get(entry["dataset"])
    return protocol is not None and EQUAL.get(metric, metric) == protocol.metric


def evaluation_differences(experiment: Experiment, entry: dict, metric: str) -> list[str]:
    """How the FID `metric` of an experiment differs from an entry's in its detector's resize and
    its reference. Published statistics are identified by the name of their file; that the content
    fits images and detector is what `verify-data` checks."""
    protocol = PUBLISHED.get(entry["dataset"])
    if protocol is None:
        return ["metric (the published protocol is unknown)"]
    changed = []
    if not is_published_fid(metric, entry):
        changed.append(f"metric ({_instead(metric, protocol.metric)})")
    file = experiment.evaluation.statistics
    found = PurePosixPath(file).name if file else None
    if found != protocol.statistics:
        images = "those of the images"
        text = _instead(found or images, protocol.statistics or images)
        changed.append(f"statistics ({text})")
    return changed
