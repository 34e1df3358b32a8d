"""The registry of data sets, and their base classes.

A data set is a subclass of `DataSource` in this package or a plug-in, registered as `data.name`.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from harness.config.schema import PROMPT_KEYS, DataSection
from harness.data.image_archive import IMAGES, INDEXES, OTHER_IMAGES, PACKED, TABLES
from harness.data.image_sources import ImageSource, PixelReader
from harness.data.layouts.base import Listing
from harness.data.order import mixed_order
from harness.data.prompt_tables import table_format
from harness.errors import Problem, UserError, did_you_mean
from harness.io.artifacts import read_text, sha256_file
from harness.io.downloads import expand, fetch
from harness.io.hub import snapshot
from harness.registry import Registry
from harness.streams import Stream

FILE_KEYS = frozenset({"source", "sha256", "labels"})
IMAGE_KEYS = frozenset({"held_out", "label_column", "resize", "resolution", "revision"})
# What is downloaded of a repository; formats that cannot be read are reported by their name.
HUB_FILES = [f"*{name}" for name in (*IMAGES, *OTHER_IMAGES, *PACKED, ".zip")]
HUB_FILES += [name.upper() for name in HUB_FILES] + [f"*{name}" for name in (*INDEXES, *TABLES)]
Part = tuple[Tensor, Tensor]  # images uint8 (N, C, H, W) and labels uint8 (N,) of an official set


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


@dataclass(frozen=True)
class Prompts:
    """Texts by number, which is the line; `sha256` of their file, or of themselves."""

    texts: tuple[str, ...]
    sha256: str

    def __len__(self) -> int:
        return len(self.texts)


def read_prompts(path: Path) -> Prompts:
    """Read a prompt file. Empty lines and tables are errors; prompts may repeat, as COCO's captions
    do."""
    try:
        # Not splitlines: captions from the web contain other characters that it splits at.
        lines = read_text(path).removesuffix("\n").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist", "missing-file") from None
    if reason := table_format(path, lines):
        raise UserError(f"{path} {reason}; expected one prompt per line, as plain text", "table")
    texts = tuple(line.strip() for line in lines)
    if texts == ("",):
        raise UserError(f"{path} is empty; expected one prompt per line", "no-prompts")
    if empty := [number for number, text in enumerate(texts, 1) if not text]:
        more = f" (and {len(empty) - 1} more)" if len(empty) > 1 else ""
        raise UserError(f"{path}: line {empty[0]}{more} is empty", "empty-prompt")
    return Prompts(texts, sha256_file(path))


class DataSource:
    """A data set as configured by the `data` section.

    Subclasses set `image_shape` and `class_names` and implement `read`.
    """

    description: str = "an embedded data set"  # for "data.x: not allowed for ..."
    keys: frozenset[str] = frozenset({"held_out"})  # those of the section that apply, and `name`
    image_shape: tuple[int, int, int] | None = None  # (C, H, W); None if unknown before reading
    class_names: tuple[str, ...] = ()
    # Captions of a class, for networks that compare images with texts; the first is for scoring.
    caption_templates = ("a photo of a {}", "a {}", "a small picture of the {}")

    def __init__(self, section: DataSection):
        self.section = section
        # 0 without classes, or if unknown before reading.
        self.num_classes = len(self.class_names) if section.labels else 0

    @classmethod
    def accepts(cls, path: Path) -> bool:
        """Whether a `data.source` holds this data set; otherwise it is read as image files."""
        return False

    @property
    def has_classes(self) -> bool:
        """Whether images have classes, even if their number is unknown before reading."""
        return self.num_classes > 0

    @classmethod
    def captions(cls) -> tuple[tuple[str, ...], AttributeChecker] | None:
        """All captions, and their checker, of a text-to-image data set."""
        return None

    def local_source(self) -> Path:
        """The path of `data.source`; a URL and a repository of the hub are downloaded."""
        if self.section.revision is not None:
            return snapshot(self.section.source, self.section.revision, "dataset", HUB_FILES)
        path = expand(self.section.source)
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


class OfficialSet(DataSource):
    """Base class of data sets with official files: their test set is the held-out part. hashes: of
    labels and pixels of both parts, verified so that every source gives the same data."""

    description, keys = "a data set with a test set", FILE_KEYS
    hashes: ClassVar[tuple[str, str]]

    def read_parts(self, path: Path | None) -> tuple[Part, Part]:
        """The training and the test part from a `data.source`; None: download it."""
        raise NotImplementedError

    def read(self):
        path = self.local_source() if self.section.source else None
        try:
            parts = self.read_parts(path)
        except UserError as error:
            hint = "" if path else "; or set data.source to a local copy"
            raise UserError(f"{self.section.name}: {error}{hint}", error.code) from None
        except Exception as error:  # of any of the libraries that read the files
            reason = str(error) or type(error).__name__
            message = f"{path}: {self.section.name} could not be read ({reason})"
            raise UserError(message, "damaged") from None
        self.verify(path, parts)
        labelled = self.section.labels
        train, test = (Images(pixels, labels.long() * labelled) for pixels, labels in parts)
        return train, test, self.class_names if labelled else ()

    @classmethod
    def verify(cls, path: Path | None, parts: tuple[Part, Part]) -> None:
        """Raise an error if images or labels differ from the official ones."""
        names = ("training", "test")
        for part, (pixels, labels), sha256 in zip(names, parts, cls.hashes, strict=True):
            found = hashlib.sha256(labels.numpy())
            found.update(pixels.contiguous().numpy())
            if found.hexdigest() != sha256:
                message = f"{path}: these are not the {part} images of {cls.__name__}"
                raise UserError(message, "checksum")


class DescribedSet(DataSource):
    """A data set that is not registered: image files, or only the shape of images. With prompts,
    labels are line numbers of prompts, or their texts. Test images of a source are held out."""

    def __init__(self, section: DataSection):
        self.section, side, texts = section, section.size, section.prompts is not None
        if section.source is not None:
            self.description = "prompts with a source" if texts else "a source of image files"
            self.keys = FILE_KEYS | IMAGE_KEYS
        else:
            self.description = "prompts without images" if texts else "a data set without images"
            self.keys = frozenset({"image_shape"})
        self.keys |= PROMPT_KEYS if texts else {"num_classes"}
        self.image_shape = section.image_shape or ((3, side, side) if side else None)
        self.num_classes = (section.num_classes or 0) if section.labels else 0

    @property
    def has_classes(self) -> bool:
        of_source = self.section.source is not None and self.section.prompts is None
        return self.num_classes > 0 or (self.section.labels and of_source)

    def read(self):
        section, names, texts = self.section, (), None
        if section.prompts is not None:
            texts = read_prompts(fetch(section.prompts, section.prompts_sha256)).texts
        source = ImageSource(self.local_source(), section.label_column)
        if section.labels and texts is None:
            names = source.class_names(section.num_classes)
        train, test = source.parts["train"], source.held_out()
        listings = (train, test or train)
        labels = [self._labels(source, listing, texts or names) for listing in listings]
        classes = [torch.zeros_like(own) if texts else own for own in labels]
        if test is None:  # the split and the order ignore prompts
            rows = stratified_split(classes[0], section.held_out)
        else:
            self._check_held_out(source)
            rows = [torch.arange(len(own)) for own in labels]
        rows = [
            index if listing.mixed else index[mixed_order(own[index])]
            for listing, own, index in zip(listings, classes, rows, strict=True)
        ]
        pixels = self._pixels(source, list(zip(listings, rows, strict=True)))
        labels = [own[index] for own, index in zip(labels, rows, strict=True)]
        return *map(Images, pixels, labels), names

    def _pixels(self, source: ImageSource, parts: list[tuple[Listing, Tensor]]) -> list[Tensor]:
        reader = PixelReader(source.path, self.section.resize, self.section.resolution)
        try:
            return reader.read(parts)
        except UserError as error:
            if error.code != "shape":
                raise
            size = self.section.size or 64
            hint = f"set data.resize: {{mode: center-crop, size: {size}}} to crop and resize images"
            raise UserError(f"{error}; {hint}", "shape") from None

    def _labels(self, source: ImageSource, listing: Listing, names: Sequence[str]) -> Tensor:
        """The labels of a part, int64 `(N,)`; all 0 without labels."""
        if not self.section.labels:
            return torch.zeros(len(listing.names), dtype=torch.int64)
        return source.numbers(listing, names)

    def _check_held_out(self, source: ImageSource) -> None:
        if "held_out" in self.section.model_fields_set:
            message = f"not allowed: {source.path} has test images, which are held out"
            message += "; remove the key, or use the training folder as data.source"
            raise UserError(f"data.held_out: {message}", "split")

    def check(self) -> list[Problem]:
        problems, key, shape = super().check(), "data.image_shape", self.section.image_shape
        if self.section.source is None and shape is None:
            problems.append(Problem(key, "missing-key", "required for prompts without a source"))
        elif self.section.source is None and shape[1] != shape[2]:
            message = f"expected (channels, height, width) of square images, got {list(shape)}"
            problems.append(Problem(key, "invalid-value", message))
        return problems


DATASETS: Registry[type[DataSource]] = Registry("data set", "harness.data", DataSource)


def data_source(section: DataSection) -> DataSource:
    """The data set that a `data` section describes.

    A registered name wins, unless the section gives a source of another form, or only a shape for a
    data set that would have to be downloaded.
    """
    if section.name in DATASETS:
        known = DATASETS[section.name]
        fits = section.image_shape is None or "source" not in known.keys
        if section.source is not None:
            fits = known.accepts(expand(section.source))
        if fits:
            return known(section)
    if section.source is section.image_shape is section.prompts is None:
        hint = did_you_mean(section.name, DATASETS)
        raise UserError(f"unknown data set {section.name!r} without a source{hint}", "unknown-name")
    return DescribedSet(section)


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
    order = Stream(0, "split").uniform(torch.arange(len(labels))).argsort(stable=True)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = order[labels[order] == label]
        mask[members[: round(held_out * len(members))]] = True
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
