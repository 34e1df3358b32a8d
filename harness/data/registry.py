"""The registry of data sets, and their base class.

A data set is a subclass of `DataSource` in this package or a plug-in, registered as `data.name`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from harness.config.schema import PROMPT_KEYS, DataSection
from harness.data.image_archive import read_images
from harness.data.prompts import read_prompts
from harness.errors import Problem, UserError, did_you_mean
from harness.io.downloads import fetch
from harness.registry import Registry
from harness.streams import Stream

FILE_KEYS = frozenset({"source", "sha256", "labels"})


@dataclass(frozen=True)
class Images:
    """`pixels` uint8 `(N, C, H, W)`; `labels` int64 `(N,)`, all 0 in a data set without classes."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def blocks(self, size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels and labels of at most `size` images at a time."""
        return zip(self.pixels.split(size), self.labels.split(size), strict=True)


@dataclass(frozen=True)
class AttributeChecker:
    """A program that checks images against captions; a label is the number of a caption.

    values: int64 `(captions, 1 + len(names))`, the class and the attributes in each caption.
    measure: the attributes in uint8 images `(B, C, H, W)`, int64 `(B, len(names))`.
    """

    values: Tensor
    names: tuple[str, ...]  # of the attributes
    measure: Callable[[Tensor], Tensor]

    def check(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Whether images have each attribute of their captions: bool `(B, len(names))`."""
        return self.measure(pixels) == self.values[labels, 1:]

    def classes(self, labels: Tensor) -> Tensor:
        """The class in each caption: int64 `(B,)`."""
        return self.values[labels, 0]

    def meanings(self) -> Tensor:
        """int64 `(captions,)`, equal for captions that differ in wording only."""
        return self.values.unique(dim=0, return_inverse=True)[1]


class DataSource:
    """A data set as configured by the `data` section.

    Subclasses set `image_shape` and `class_names` and implement `read`.
    """

    description: str = "an embedded data set"  # for "data.x: not allowed for ..."
    keys: frozenset[str] = frozenset({"held_out"})  # those of the section that apply, and `name`
    image_shape: tuple[int, int, int] | None = None  # (C, H, W); None if unknown before reading
    class_names: tuple[str, ...] = ()
    # Captions of a class, for networks that compare images with texts; the first is for scoring.
    caption_templates: ClassVar[tuple[str, ...]] = (
        *("a photo of a {}", "a {}", "a small picture of the {}"),
    )

    def __init__(self, section: DataSection):
        self.section = section
        # 0 without classes, or if unknown before reading.
        self.num_classes = len(self.class_names) if section.labels else 0

    @classmethod
    def accepts(cls, path: Path) -> bool:
        """Whether a `data.source` holds this data set; otherwise it is read as image files."""
        return False

    @classmethod
    def captions(cls) -> tuple[tuple[str, ...], AttributeChecker] | None:
        """All captions, and their checker, of a text-to-image data set."""
        return None

    def local_source(self) -> Path:
        """The path of `data.source`; a URL is downloaded."""
        path = Path(self.section.source).expanduser()
        return path if path.is_dir() else fetch(self.section.source, self.section.sha256)

    def read(self) -> tuple[Images, Images, tuple[str, ...]]:
        """The training part, the held-out part and the class names."""
        raise NotImplementedError

    def check(self) -> list[Problem]:
        """Errors in the `data` section, apart from its files."""
        return [
            Problem(f"data.{key}", "not-allowed", f"not allowed for {self.description}")
            for key in sorted(self.section.model_fields_set - self.keys - {"name"})
        ]


class ImageArchive(DataSource):
    """A `data.source` of image files. With prompts, labels are line numbers of prompts."""

    def __init__(self, section: DataSection):
        self.section, texts, side = section, section.prompts is not None, section.resolution
        self.description = "prompts with a source" if texts else "a source of image files"
        self.keys = FILE_KEYS | {"held_out", "resolution"}
        self.keys |= PROMPT_KEYS if texts else {"num_classes"}
        self.image_shape = (3, side, side) if side else None
        self.num_classes = (section.num_classes or 0) if section.labels else 0

    def read(self):
        section, count = self.section, self.section.num_classes
        if section.prompts is not None:
            count = len(read_prompts(fetch(section.prompts, section.prompts_sha256)))
        pixels, labels, names = read_images(
            self.local_source(), section.labels, count, section.resolution
        )
        if section.prompts is not None:  # the split ignores them
            return *split(pixels, labels, section.held_out, torch.zeros_like(labels)), ()
        return *split(pixels, labels, section.held_out), names


class NoImages(DataSource):
    """A data set without images: their shape, and classes or prompts."""

    def __init__(self, section: DataSection):
        self.section, texts = section, section.prompts is not None
        self.description = "prompts without images" if texts else "a data set without images"
        self.keys = {"image_shape"} | (PROMPT_KEYS if texts else {"num_classes"})
        self.image_shape, self.num_classes = section.image_shape, section.num_classes or 0

    def check(self) -> list[Problem]:
        key, shape = "data.image_shape", self.image_shape
        if shape is None:
            return [Problem(key, "missing-key", "required for prompts without a source")]
        if shape[1] == shape[2]:
            return super().check()
        message = f"expected (channels, height, width) of square images, got {list(shape)}"
        return [*super().check(), Problem(key, "invalid-value", message)]


DATASETS: Registry[type[DataSource]] = Registry("data set", "harness.data")


def data_source(section: DataSection) -> DataSource:
    """The data set that a `data` section describes.

    A registered name wins, unless the section gives a source of another form, or only a shape for a
    data set that would have to be downloaded.
    """
    if section.name in DATASETS:
        known = DATASETS[section.name]
        if section.source is not None:
            fits = known.accepts(Path(section.source).expanduser())
        else:
            fits = section.image_shape is None or "source" not in known.keys
        if fits:
            return known(section)
    if section.source is not None:
        return ImageArchive(section)
    if section.image_shape is not None or section.prompts is not None:
        return NoImages(section)
    hint = did_you_mean(section.name, DATASETS)
    raise UserError(f"unknown data set {section.name!r} without a source{hint}", "unknown-name")


def has_captions(section: DataSection) -> bool:
    """Whether a program can check images of the data set against captions."""
    try:
        return data_source(section).captions() is not None
    except UserError:
        return False


def has_texts(section: DataSection) -> bool:
    """Whether the conditions of the data set are texts: captions or prompts."""
    return section.prompts is not None or has_captions(section)


def attribute_names() -> list[str]:
    """The names of the attributes that registered data sets can check."""
    captions = [DATASETS[name].captions() for name in DATASETS]
    return [name for found in captions if found for name in found[1].names]


def stratified_split(labels: Tensor, held_out: float) -> tuple[Tensor, Tensor]:
    """Indices of the training and the held-out part, which is a fraction of each class. They depend
    on the labels only."""
    rank = Stream(0, "split").uniform(torch.arange(len(labels)))
    chosen = []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        order = members[rank[members].argsort()]
        chosen.append(order[: round(held_out * len(order))])
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[torch.cat(chosen)] = True
    if mask.all():
        raise UserError(f"data.held_out: {held_out} leaves no image for training", "too-few-images")
    return (~mask).nonzero().flatten(), mask.nonzero().flatten()


def split(
    pixels: Tensor, labels: Tensor, held_out: float, classes: Tensor | None = None
) -> tuple[Images, Images]:
    """Split images by `stratified_split`. `classes`: for the split; default `labels`."""
    train, held = stratified_split(labels if classes is None else classes, held_out)
    train_pixels = pixels[train] if len(held) else pixels  # avoid a copy of possibly gigabytes
    return Images(train_pixels, labels[train]), Images(pixels[held], labels[held])
