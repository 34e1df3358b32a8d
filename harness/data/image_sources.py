"""Read images of any layout: find the layout, number the classes, decode the images in place."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from harness.config.schema import ResizeSection
from harness.data.decoding import Decoder
from harness.data.image_archive import IMAGES, INDEXES, PACKED, TABLES, Files
from harness.data.layouts.base import LAYOUTS, Layout, Listing, Parts, split_folders
from harness.data.layouts.class_folders import ClassFolders
from harness.errors import UserError
from harness.registry import plugin_errors

logger = logging.getLogger(__name__)
MAX_CLASSES = 1 << 16
BLOCK = 64  # images that are read at a time; parquet rows and .npz images wait in memory
SHOWN = 5  # names in a message


class ImageSource:
    """The images of a path, not yet decoded: a listing of each part, and the classes.

    path: a folder, a zip, a parquet or a .npz file. label_column: `data.label_column`.
    """

    def __init__(self, path: Path, label_column: str | None = None):
        self.path = path
        files = _unpacked(Files(path))
        self.layout, self.parts = _parts(without_top_folder(files), label_column)
        total = sum(len(listing.names) for listing in self.parts.values())
        if not total:
            raise UserError(f"{path} has no images", "no-images")
        _report_ignored(files)
        logger.info("%s: %s, %d images", path, self.layout.description, total)

    def single(self) -> Listing:
        """The only part; an error for a source with a split."""
        if len(self.parts) > 1:
            names = ", ".join(self.parts)
            raise UserError(f"{self.path} has the parts {names}; name the folder of one", "split")
        return self.parts["train"]

    def held_out(self) -> Listing | None:
        """The part that the source holds out: its test data, otherwise its validation data."""
        chosen = next((part for part in ("test", "validation") if part in self.parts), None)
        if chosen == "test" and "validation" in self.parts:
            unused = len(self.parts["validation"].names)
            logger.warning("%s: %d validation images are not used", self.path, unused)
        if chosen is not None:
            logger.info("%s: the %s images are held out", self.path, chosen)
        return self.parts.get(chosen)

    def class_names(self, num_classes: int | None = None) -> tuple[str, ...]:
        """The names of the classes: folders, names in a table, or numbers up to the largest label,
        or up to `num_classes`, which may exceed it."""
        listing = self.parts["train"]
        labels = _required_labels(self.path, listing)
        if isinstance(labels[0], int) and listing.class_names is None:
            _check_range(self.path, listing, num_classes or MAX_CLASSES)
            return tuple(map(str, range(num_classes or max(labels) + 1)))
        names = listing.class_names or tuple(sorted(set(labels), key=_name_order))
        if len(names) != (num_classes or len(names)):
            found = f"{self.path} has {len(names)} classes ({_shown(names)})"
            raise UserError(f"data.num_classes is {num_classes}, but {found}", "num-classes")
        if len(names) == 1:
            message = f"all images of {self.path} are in one class, {names[0]}"
            raise UserError(f"{message}; set data.labels: false", "one-class")
        logger.info("%s: %d classes: %s", self.path, len(names), _shown(names))
        return names

    def numbers(self, listing: Listing, names: Sequence[str]) -> Tensor:
        """The labels of a part as positions in `names`, int64 `(N,)`: class names or prompts, of
        which the first of equal ones counts."""
        labels = _required_labels(self.path, listing)
        if listing.class_names is not None and listing.class_names != tuple(names):
            labels = [listing.class_names[label] for label in labels]
        if isinstance(labels[0], int):
            _check_range(self.path, listing, min(len(names), MAX_CLASSES))
            return torch.tensor(labels)
        position = {name: i for i, name in reversed(list(enumerate(names)))}
        if unknown := sorted(set(labels) - position.keys()):
            message = f"{self.path}: unknown classes or texts: {_shown(unknown)}; known"
            raise UserError(f"{message}: {_shown(names)}", "unknown-class")
        return torch.tensor([position[label] for label in labels])


def without_top_folder(files: Files) -> Files:
    """The files below folders that hold all others, as in a zip of one folder. A folder with images
    in it is not left out: it may be a class."""
    relevant = [name for name in files.sizes if name.lower().endswith((*IMAGES, *PACKED))]
    known = {name for name in files.sizes if name.rpartition("/")[2] in (*INDEXES, *TABLES)}
    top = files.top_folders([*relevant, *known]) if relevant or known else []
    if len(top) != 1 or top == [""]:
        return files
    inner = files.below(top[0])
    direct = any("/" not in name for name in inner.sizes if name.lower().endswith(IMAGES))
    lists = any(name in inner.sizes for name in (*INDEXES, *TABLES))
    return files if direct and not lists else without_top_folder(inner)


def _unpacked(files: Files) -> Files:
    """The files of the only zip or .npz in a folder without images, as in some repositories."""
    packed = [name for name in files.sizes if name.lower().endswith((".zip", ".npz"))]
    others = any(name.lower().endswith((*IMAGES, ".parquet")) for name in files.sizes)
    alone = files.path.is_dir() and len(packed) == 1 and not others
    return Files(files.path / packed[0]) if alone else files


def _parts(files: Files, label_column: str | None) -> tuple[type[Layout], Parts]:
    """The layout, and the images by part. Folders for training and testing may each have any
    layout."""
    found = [name for name in LAYOUTS if _accepts(name, files)]
    if len(found) > 1:
        message = f"{files.path} has several layouts: {', '.join(found)}"
        raise UserError(message, "mixed-layouts")
    layout = LAYOUTS[found[0]] if found else ClassFolders
    if not found:
        images = files.images()
        folders = split_folders(files.top_folders(images)) if images else {}
        if folders:
            parts = {}
            for part, folder in folders.items():
                layout, inner = _parts(files.below(folder), label_column)
                parts[part] = inner["train"]
            return layout, parts
    if label_column is not None and not layout.has_columns:
        message = f"not allowed: {files.path} is in {layout.description}, without columns"
        raise UserError(f"data.label_column: {message}", "label-column")
    file = LAYOUTS.plugin(found[0]) if found else None
    with plugin_errors(file, f"layout {layout.__name__}"):
        return layout, layout().parts(files, label_column)


def _accepts(name: str, files: Files) -> bool:
    with plugin_errors(LAYOUTS.plugin(name), f"layout {name!r}"):
        return LAYOUTS[name].accepts(files)


def _report_ignored(files: Files) -> None:
    """Log how many files are not images, with examples."""
    used = (*IMAGES, *PACKED, ".npy")
    names = [name for name in sorted(files.sizes) if not name.lower().endswith(used)]
    names = [name for name in names if name.rpartition("/")[2] not in (*INDEXES, *TABLES)]
    ignored = len(names) + files.hidden
    if ignored:
        examples = ", ".join(names[:3]) or "hidden files"
        logger.info("%s: files that are not images: %d, such as %s", files.path, ignored, examples)


def _required_labels(path: Path, listing: Listing) -> Sequence[int] | Sequence[str]:
    if not listing.labels:
        message = f"{listing.unlabelled}; for data without classes set data.labels: false"
        start = "" if message.startswith(str(path)) else f"{path} "
        raise UserError(f"{start}{message}", "no-labels")
    return listing.labels


def _check_range(path: Path, listing: Listing, count: int) -> None:
    """Raise a `UserError` unless all labels, which are numbers, are below `count`."""
    for name, label in zip(listing.names, listing.labels, strict=True):
        if not 0 <= label < count:
            message = f"{path}: label {label} of {name} is not in 0..{count - 1}"
            raise UserError(message, "label-range")


def _name_order(name: str) -> tuple[int, int, str]:
    """The order of class names: numbers by value, then others as text."""
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def _shown(names: Sequence[str]) -> str:
    more = f", … ({len(names)} in all)" if len(names) > SHOWN else ""
    return ", ".join(map(str, names[:SHOWN])) + more


class PixelReader:
    """Decodes images into tensors of one shape. resolution: the required width."""

    def __init__(self, path: Path, resize: ResizeSection | None, resolution: int | None = None):
        self.path, self.resolution, self.decode = path, resolution, Decoder(resize)
        self.shape: tuple[int, int, int] | None = None  # (H, W, C)
        self.first = ""  # the image that has it

    def read(self, parts: Sequence[tuple[Listing, Tensor]]) -> list[Tensor]:
        """The images of listings at positions (int64), uint8 `(n, C, H, W)` each. All positions of
        a listing must occur, in one or several parts. Each image is decoded into its place, so that
        memory holds all images once. Grey images among RGB ones become RGB."""
        if self.shape is None:
            listing = parts[0][0]
            content, self.first = next(iter(listing.contents())), listing.names[0]
            self.shape = self.decode(content(), self._where(self.first)).shape
            if self.resolution not in (None, self.shape[0]):
                message = f"is {self.shape[0]} pixels wide, but data.resolution is"
                message = f"{self._where(self.first)} {message} {self.resolution}"
                raise UserError(message, "shape")
        height, width, channels = self.shape
        try:
            arrays = [np.empty((len(i), channels, height, width), np.uint8) for _, i in parts]
            for listing in {id(listing): listing for listing, _ in parts}.values():
                own = [n for n, (other, _) in enumerate(parts) if other is listing]
                self._fill(listing, [arrays[n] for n in own], [parts[n][1] for n in own])
        except _Colour as colour:  # the first image is grey, this one is not
            self.shape, self.first = (height, width, 3), colour.name
            return self.read(parts)
        return list(map(torch.from_numpy, arrays))

    def _where(self, name: str) -> str:
        return f"{self.path}" if self.path.name == name else f"{self.path}: {name}"

    def _fill(self, listing: Listing, arrays: list[np.ndarray], index: list[Tensor]) -> None:
        import joblib

        (height, width, channels), total, grey = self.shape, len(listing.names), []
        places = np.empty((total, 2), np.int64)  # array and row of each image
        for number, positions in enumerate(index):
            places[positions.numpy(), 0] = number
            places[positions.numpy(), 1] = np.arange(len(positions))
        self.decode.enlarged.clear()

        def place(item) -> None:
            i, content = item
            name = listing.names[i]
            image = self.decode(content(), self._where(name))
            if image.shape[:2] != (height, width):
                message = f"is {image.shape[1]} x {image.shape[0]} pixels, but {self.first}"
                raise UserError(f"{self._where(name)} {message} is {width} x {height}", "shape")
            if image.shape[2] > channels:
                raise _Colour(name)
            if image.shape[2] < channels:
                grey.append(name)
            array, row = places[i]
            arrays[array][row] = image.transpose(2, 0, 1)

        items, done, step = enumerate(listing.contents()), 0, max(1024, -(-total // 20))
        with ThreadPoolExecutor(joblib.cpu_count()) as pool:
            while block := list(islice(items, BLOCK)):
                list(pool.map(place, block))
                done += len(block)
                if done == total or done // step > (done - len(block)) // step:
                    logger.info("%s: %d of %d images", self.path, done, total)
        if grey:
            logger.info("%s: %d grey images became RGB", self.path, len(grey))
        if small := self.decode.enlarged:
            message = "%d images are smaller than data.resize.size and were enlarged, such as %s"
            logger.warning(message, len(small), min(small))


class _Colour(Exception):
    """An RGB image where the first one is grey."""

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name
