"""Prepare data sets, store them, and load them. Generators and feature networks train on the
training part, which is also the reference of all distances; the held-out part is for accuracies and
for the score of real images."""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from harness.config.schema import PROMPT_SETS, DataSection
from harness.data import registry
from harness.data.registry import DATASETS, DataSource, DescribedSet, Images, Prompts
from harness.errors import UserError
from harness.io.artifacts import digest, sha256_file, verify, write_text
from harness.io.downloads import fetch
from harness.io.records import DataRecord, PromptFile
from harness.io.shards import TensorShards
from harness.registry import plugin_errors

logger = logging.getLogger(__name__)
SHARD, HEADER = 60_000_000, 10_000  # maximum bytes of a file of images, and of its header
IMAGES = "images"  # their folder, below a data set's
ON_DEVICE = 4 << 30  # bytes of images up to which a run keeps all of them on its device


@dataclass(frozen=True)
class Dataset:
    """A prepared data set."""

    name: str
    train: Images
    held_out: Images
    class_names: tuple[str, ...]
    sha256: str  # of images and prompts
    attributes: registry.AttributeChecker | None = None
    prompts: Prompts | None = None  # the texts that labels number, in a text-to-image data set
    evaluation_prompts: Prompts | None = None  # for scoring
    images_sha256: str = ""
    label_counts: tuple[int, ...] | None = None  # training images of each condition
    caption_templates: tuple[str, ...] = DataSource.caption_templates
    resize: str | None = None  # how the source's images got their size

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return tuple(self.train.pixels.shape[1:])

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def num_conditions(self) -> int:
        """The number of conditions of a generator: prompts or classes."""
        return len(self.prompts or self.class_names)

    @property
    def num_evaluated(self) -> int:
        """The number of conditions for scoring."""
        return len(self.evaluation_prompts or self.class_names)

    def classes(self, labels: Tensor) -> Tensor:
        """The classes of labels; for captions, the classes that they name."""
        return self.attributes.classes(labels) if self.attributes else labels


def check_sizes(dataset: Dataset, minimum: tuple[int, int]) -> None:
    """Raise an error if the training or held-out part is smaller than the metrics need, but not
    empty."""
    hints = {"training": "", "held-out": "; data.held_out: 0 holds none out"}
    parts = zip(hints.items(), (dataset.train, dataset.held_out), minimum, strict=True)
    for (part, hint), images, least in parts:
        if 0 < len(images) < least:
            message = f"{len(images)} {part} images, but the metrics need at least {least}{hint}"
            raise UserError(f"data: {dataset.name} has {message}", "too-few-images")


def prepare(
    section: DataSection,
    folder: Path,
    minimum: tuple[int, int] = (1, 1),
    fingerprint: str | None = None,
) -> DataRecord:
    """Read a data set, split it and write it to `folder`; returns the content of `data.json`.
    minimum: see `check_sizes`. fingerprint: of the experiment's data, for the record."""
    source, prompts = registry.data_source(section), {}
    for key, (file, sha256) in section.prompt_files.items():
        texts, copy = registry.read_prompts(fetch(file, sha256)).texts, folder / f"{key}.txt"
        if repeated := len(texts) - len(set(texts)):
            message = "%s: %d of %d prompts repeat an earlier one; each line counts separately"
            logger.warning(message, file, repeated, len(texts))
        write_text(copy, "\n".join(texts) + "\n")
        prompts[key] = PromptFile(prompts=len(texts), sha256=sha256_file(copy))
    if section.has_images:
        file = DATASETS.plugin(section.name)
        with plugin_errors(file, f"data set {section.name!r}"):
            train, held, class_names = source.read()
            for part in (train, held) if file else ():
                _check_part(part, len(class_names))
        check_sizes(Dataset(section.name, train, held, class_names, ""), minimum)
        shape, sha256 = train.pixels.shape[1:], _write_images(folder, train, held)
        counts = _label_counts(train, source, class_names, prompts) if section.labels else None
        content = [sha256]
        if isinstance(source, DescribedSet) and class_names:
            largest = torch.cat([train.labels, held.labels]).max().item()
            if class_names != tuple(map(str, range(largest + 1))):
                content.append(class_names)  # the labels do not decide them; captions contain them
    else:
        train, held, counts = (), (), None
        class_names, shape = tuple(map(str, range(source.num_classes))), section.image_shape
        sha256 = digest([section.name, class_names, shape])
        content = [sha256]
    record = DataRecord(
        name=section.name,
        fingerprint=fingerprint,
        registered=section.name in DATASETS and DATASETS[section.name] is type(source),
        class_names=list(class_names),
        train_images=len(train),
        held_out_images=len(held),
        image_shape=list(shape),
        label_counts=counts,
        resize=str(section.resize) if section.resize else None,
        images_sha256=sha256,
        sha256=digest([*content, {key: copy.model_dump() for key, copy in prompts.items()}]),
        **prompts,
    )
    record.write(folder / "data.json")
    return record


def _check_part(part: Images, num_classes: int) -> None:
    """Raise a `ValueError` if a plug-in's images or labels have the wrong type."""
    pixels, labels = part.pixels, part.labels
    if pixels.dtype != torch.uint8 or pixels.ndim != 4:
        found = f"{pixels.dtype} {tuple(pixels.shape)}"
        raise ValueError(f"read returned pixels {found}, not torch.uint8 (N, C, H, W)")
    if labels.dtype != torch.int64 or labels.shape != pixels.shape[:1]:
        found = f"{labels.dtype} {tuple(labels.shape)}"
        raise ValueError(f"read returned labels {found}, not torch.int64 ({len(pixels)},)")
    low, high = (labels.min().item(), labels.max().item()) if len(labels) else (0, 0)
    if low < 0 or high >= max(num_classes, 1):
        raise ValueError(f"read returned labels {low} to {high} for {num_classes} class names")


def _label_counts(train: Images, source, class_names, prompts: dict) -> list[int]:
    """The number of training images of each class or, for captions, of each prompt."""
    texts, _ = source.captions() or ((), None)
    count = prompts["prompts"].prompts if "prompts" in prompts else len(texts or class_names)
    return torch.bincount(train.labels, minlength=count).tolist()


def _write_images(folder: Path, train: Images, held: Images) -> str:
    """Write the images, in files of at most `SHARD` bytes; returns their sha256."""
    shards = TensorShards(folder / IMAGES)
    shutil.rmtree(shards.folder, ignore_errors=True)
    per_image = train.pixels[0].numel() + train.labels.element_size()
    size = max(1, (SHARD - HEADER) // per_image)
    for start in range(0, len(train) + len(held), size):
        tensors = {}
        for name, part, before in (("train", train, 0), ("held_out", held, len(train))):
            rows = slice(max(0, start - before), max(0, start + size - before))
            tensors |= {f"{name}_pixels": part.pixels[rows], f"{name}_labels": part.labels[rows]}
        shards.write(start // size, tensors)
    return shards.finish()["sha256"]


def load(folder: Path, images: bool = True) -> Dataset:
    """Load what `prepare` wrote. Both parts are empty without images, or if `images` is False."""
    record = DataRecord.read(folder / "data.json")
    source = DATASETS[record.name] if record.registered else DataSource
    if record.train_images and images:
        stored = TensorShards(folder / IMAGES, owner=folder).load()
        parts = [(stored[f"{p}_pixels"], stored[f"{p}_labels"]) for p in ("train", "held_out")]
    else:
        empty = torch.empty(0, *record.image_shape, dtype=torch.uint8)
        parts = [(empty, torch.empty(0, dtype=torch.int64))] * 2
    texts, attributes = source.captions() or (None, None)
    prompts = {"prompts": Prompts(texts, digest(texts))} if texts else {}
    for key in PROMPT_SETS:
        if file := getattr(record, key):
            verify(folder / f"{key}.txt", file.sha256, owner=folder)
            prompts[key] = registry.read_prompts(folder / f"{key}.txt")
    if prompts:
        prompts.setdefault("evaluation_prompts", prompts["prompts"])
    return Dataset(
        record.name,
        *(Images(*part) for part in parts),
        tuple(record.class_names),
        record.sha256,
        attributes=attributes,
        images_sha256=record.images_sha256,
        label_counts=record.label_counts and tuple(record.label_counts),
        caption_templates=source.caption_templates,
        resize=record.resize,
        **prompts,
    )


def first_images(folder: Path) -> Images:
    """The training images in the first file of what `prepare` wrote; none without images."""
    record = DataRecord.read(folder / "data.json")
    if not record.train_images:
        return load(folder, images=False).train
    tensors = next(iter(TensorShards(folder / IMAGES, owner=folder)))
    return Images(tensors["train_pixels"], tensors["train_labels"])


def placement(data: Tensor, device: str) -> torch.device:
    """Where a run keeps images: on the device, or on the host if larger than `ON_DEVICE`."""
    return torch.device(device) if data.nbytes <= ON_DEVICE else data.device


def placed(images: Images, device: str) -> dict[str, Tensor]:
    """Pixels and labels at their placement, as `TrainingData` takes them."""
    place = placement(images.pixels, device)
    return {"pixels": images.pixels.to(place), "labels": images.labels.to(place)}
