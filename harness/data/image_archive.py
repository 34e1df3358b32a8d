"""Image files in the layout of EDM's dataset tool (Karras et al. 2022, arXiv 2206.00364).

A zip or a folder of square PNG files of one size, grey or RGB, and `dataset.json` or `labels` with
`{"labels": [["00000/img00000000.png", 6], ...]}`, or null. Images are sorted by name; hidden files
are ignored; links to files and folders are followed. A folder in which two names lead to one image
is rejected: such an image would have twice the weight of others. Nothing is extracted to disk.
"""

import codecs
import io
import logging
import os
import stat
import struct
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from pydantic import BaseModel, ValidationError
from torch import Tensor

from harness.errors import UserError
from harness.io.artifacts import LFS_POINTER

logger = logging.getLogger(__name__)
INDEXES = ("dataset.json", "labels")
MAX_SIDE = 2048
MAX_IMAGE_BYTES, MAX_INDEX_BYTES = 1 << 25, 1 << 30  # unpacked
MAX_CLASSES = 1 << 16


class _Index(BaseModel):
    labels: list[tuple[str, int]] | None


def _files_below(root: Path) -> dict[str, int]:
    """Sizes of the files in a folder and in folders that it links to, by name relative to it. Every
    folder and every file counts once: a link to another part of `root`, or to the target of another
    link, is an error, as is a link without a target, and a folder that cannot be read. The index
    may be a link to any file."""

    def unreadable(error: OSError) -> None:
        raise UserError(f"{error.filename} could not be read ({error.strerror})", "unreadable")

    sizes, links, visited = {}, [], {}
    for name, folders, files in os.walk(root, onerror=unreadable, followlinks=True):
        folder = Path(name)
        folders[:] = [name for name in sorted(folders) if not name.startswith(".")]
        first = visited.setdefault(folder.resolve(), folder)
        if first is not folder:
            message = f"{folder} and {first} are the same folder, by a symbolic link"
            raise UserError(f"{message}; the data set would contain its files twice", "link")
        for path in (folder / name for name in files if not name.startswith(".")):
            try:
                status = path.stat()
            except OSError as error:
                target = f" (a link to {os.readlink(path)})" if path.is_symlink() else ""
                message = f"{path}{target} could not be read ({error.strerror})"
                raise UserError(message, "dangling-link" if target else "unreadable") from None
            if stat.S_ISREG(status.st_mode):
                sizes[path.relative_to(root).as_posix()] = status.st_size
                index = folder == root and path.name in INDEXES
                links += [path] if path.is_symlink() and not index else []
    remedy = "pack the folder as a zip, where every name counts, or remove one of the names"
    targets: dict[Path, Path] = {}
    for path in sorted(links):
        target = path.resolve()
        first = targets.setdefault(target, path)
        if target.parent in visited and not target.name.startswith("."):
            message = f"{path} is a link to {target}, which is in the data set itself"
            raise UserError(f"{message}; {remedy}", "link")
        if first is not path:
            message = f"{path} and {first} are links to the same file, {target}"
            raise UserError(f"{message}; {remedy}", "link")
    return sizes


class Files:
    """The files in a zip or a folder, by name. Threads may read at the same time."""

    def __init__(self, path: Path):
        self.path, self._zip = path, None
        if path.is_dir():
            sizes = _files_below(path)
        else:
            try:
                self._zip = zipfile.ZipFile(path)
            except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
                message = f"{path} is not a zip file, or is incomplete ({error})"
                raise UserError(message, "damaged") from None
            entries = [entry for entry in self._zip.infolist() if not entry.is_dir()]
            links = {e.filename for e in entries if stat.S_ISLNK(e.external_attr >> 16)}
            if others := sorted(links.difference(INDEXES)):
                message = (
                    f"{path}: {others[0]} is a symbolic link; pack the files, without zip's -y"
                )
                raise UserError(message, "link")
            entries = [entry for entry in entries if entry.filename not in links]
            sizes = {entry.filename: entry.file_size for entry in entries}
            if twice := [e.filename for e in entries if self._zip.getinfo(e.filename) is not e]:
                raise UserError(f"{path} contains {twice[0]} more than once", "duplicate-name")
        self.sizes = {name: size for name, size in sizes.items() if "/." not in f"/{name}"}

    def read(self, name: str, limit: int) -> bytes:
        """The content of a file of at most `limit` bytes."""
        where, size = f"{self.path}: {name}", self.sizes[name]
        if size > limit:
            raise UserError(f"{where} has {size} bytes, more than {limit}", "too-large")
        try:
            content = self._zip.read(name) if self._zip else (self.path / name).read_bytes()
        except (OSError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
            raise UserError(f"{where} could not be read ({error})", "damaged") from None
        if content.startswith(LFS_POINTER):
            message = f"{where} is a pointer of Git LFS, not the file; run git lfs pull"
            raise UserError(message, "lfs-pointer")
        return content


def has_labels(path: Path) -> bool:
    """Whether a zip or a folder has a list of labels."""
    return any(name in Files(path).sizes for name in INDEXES)


def _labels(files: Files, names: list[str], num_classes: int) -> Tensor:
    """The label of each image: int64 `(N,)`, below `num_classes`."""
    index = next((name for name in INDEXES if name in files.sizes), None)
    where = f"{files.path}: {index}"
    try:
        content = files.read(index, MAX_INDEX_BYTES) if index else b'{"labels": null}'
        content = content.removeprefix(codecs.BOM_UTF8)
        entries = _Index.model_validate_json(content, strict=True).labels
    except ValidationError as error:
        form = '{"labels": [[file name, class], ...]}'
        raise UserError(f"{where}: expected {form}; {error.errors()[0]['msg']}", "labels") from None
    if entries is None:
        message = f"{files.path} has no labels in {INDEXES[0]}; set data.labels: false"
        if inner := [name for name in names if name.rpartition("/")[2] in INDEXES]:
            message += f", or use the folder that contains {inner[0]} as data.source"
        raise UserError(message, "no-labels")
    for name, label in entries:
        if not 0 <= label < num_classes:
            message = f"{where}: label {label} of {name} is not in 0..{num_classes - 1}"
            raise UserError(message, "label-range")
    # As in EDM's reader: Windows writes backslashes.
    names = [name.replace("\\", "/") for name in names]
    labels = {name.replace("\\", "/"): label for name, label in entries}
    if missing := sorted(set(names) - labels.keys()):
        found = f"{len(entries)} labels for {len(names)} images"
        raise UserError(f"{where} has {found}, and none for {missing[0]}", "labels")
    if len(entries) != len(names):
        unused = sorted(labels.keys() - set(names)) or ["an image that has another"]
        message = f"has {len(entries)} labels for {len(names)} images, and one for {unused[0]}"
        raise UserError(f"{where} {message}", "labels")
    return torch.tensor([labels[name] for name in names])


def _decode(files: Files, name: str) -> np.ndarray:
    """A PNG file as uint8 `(H, H, C)`, C = 1 or 3. The header is checked before unpacking."""
    from PIL import Image, UnidentifiedImageError

    where, data = f"{files.path}: {name}", files.read(name, MAX_IMAGE_BYTES)
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            # The depth in IHDR, the first chunk: PIL would truncate 16-bit RGB.
            (width, height), mode, depth = image.size, image.mode, data[24]
            if mode in ("L", "RGB") and depth == 8 and width == height <= MAX_SIDE:
                return np.asarray(image).reshape(height, width, -1)
    except UnidentifiedImageError:
        raise UserError(f"{where} is not a PNG file", "image-format") from None
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"{where} is a damaged PNG file ({error})", "damaged") from None
    expected = f"expected 8-bit RGB or grey, square, at most {MAX_SIDE} pixels wide"
    found = f"{width} x {height}, {mode} with {depth} bits"
    raise UserError(f"{where} is {found}; {expected}", "image-format")


def read_images(
    path: Path, labelled: bool = True, num_classes: int | None = None, resolution: int | None = None
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Images uint8 `(N, C, H, H)`, labels int64 `(N,)` and class names ("0", "1", ...).

    labelled: False ignores labels: all are 0, without class names. num_classes: default: the
    largest label + 1. resolution: the required H. Errors name the file.
    """
    import joblib

    files = Files(path)
    names = sorted(name for name in files.sizes if name not in INDEXES)
    if not names:
        raise UserError(f"{path} has no images", "no-images")
    labels, class_names = torch.zeros(len(names), dtype=torch.int64), ()
    if labelled:
        labels = _labels(files, names, num_classes or MAX_CLASSES)
        class_names = tuple(map(str, range(num_classes or int(labels.max()) + 1)))
    side, _, channels = _decode(files, names[0]).shape
    if resolution not in (None, side):
        message = f"{path}: {names[0]} is {side} pixels wide, but data.resolution is {resolution}"
        raise UserError(message, "shape")
    pixels = np.empty((len(names), channels, side, side), np.uint8)

    def read_into_place(i: int) -> None:
        image = _decode(files, names[i])
        if image.shape != (side, side, channels):
            message = f"has the shape {image.shape}, but {names[0]} has {(side, side, channels)}"
            raise UserError(f"{path}: {names[i]} {message} (height, width, channels)", "shape")
        pixels[i] = image.transpose(2, 0, 1)

    step = max(1024, -(-len(names) // 20))
    with ThreadPoolExecutor(joblib.cpu_count()) as pool:
        for start in range(0, len(names), step):
            stop = min(start + step, len(names))
            list(pool.map(read_into_place, range(start, stop)))
            logger.info("%s: %d of %d images", path, stop, len(names))
    return torch.from_numpy(pixels), labels, class_names
