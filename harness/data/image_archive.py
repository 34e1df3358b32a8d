"""Image files in the layout of EDM's dataset tool (Karras et al. 2022, arXiv 2206.00364).

A zip or a folder of square PNG files of one size, grey or RGB, and `dataset.json` or `labels` with
`{"labels": [["00000/img00000000.png", 6], ...]}`, or null. Images are sorted by name; hidden files
are ignored. Nothing is extracted to disk.
"""

import io
import logging
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

logger = logging.getLogger(__name__)
INDEXES = ("dataset.json", "labels")
MAX_SIDE = 2048
MAX_IMAGE_BYTES, MAX_INDEX_BYTES = 1 << 25, 1 << 30  # unpacked
MAX_CLASSES = 1 << 16


class _Index(BaseModel):
    labels: list[tuple[str, int]] | None


class Files:
    """The files in a zip or a folder, by name. Threads may read at the same time."""

    def __init__(self, path: Path):
        self.path, self._zip = path, None
        if path.is_dir():
            files = [p for p in path.rglob("*") if p.is_file()]
            sizes = {p.relative_to(path).as_posix(): p.stat().st_size for p in files}
        else:
            try:
                self._zip = zipfile.ZipFile(path)
            except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
                message = f"{path} is not a zip file, or is incomplete ({error})"
                raise UserError(message, "damaged") from None
            sizes = {i.filename: i.file_size for i in self._zip.infolist() if not i.is_dir()}
        self.sizes = {name: size for name, size in sizes.items() if "/." not in f"/{name}"}

    def read(self, name: str, limit: int) -> bytes:
        """The content of a file of at most `limit` bytes."""
        where, size = f"{self.path}: {name}", self.sizes[name]
        if size > limit:
            raise UserError(f"{where} has {size} bytes, more than {limit}", "too-large")
        try:
            return self._zip.read(name) if self._zip else (self.path / name).read_bytes()
        except (OSError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
            raise UserError(f"{where} could not be read ({error})", "damaged") from None


def has_labels(path: Path) -> bool:
    """Whether a zip or a folder has a list of labels."""
    return any(name in Files(path).sizes for name in INDEXES)


def _labels(files: Files, names: list[str], num_classes: int) -> Tensor:
    """The label of each image: int64 `(N,)`, below `num_classes`."""
    index = next((name for name in INDEXES if name in files.sizes), None)
    where = f"{files.path}: {index}"
    try:
        content = files.read(index, MAX_INDEX_BYTES) if index else b'{"labels": null}'
        entries = _Index.model_validate_json(content, strict=True).labels
    except ValidationError as error:
        form = '{"labels": [[file name, class], ...]}'
        raise UserError(f"{where}: expected {form}; {error.errors()[0]['msg']}", "labels") from None
    if entries is None:
        message = f"{files.path} has no labels in {INDEXES[0]}; set data.labels: false"
        raise UserError(message, "no-labels")
    for name, label in entries:
        if not 0 <= label < num_classes:
            message = f"{where}: label {label} of {name} is not in 0..{num_classes - 1}"
            raise UserError(message, "label-range")
    if len(entries) != len(names):
        raise UserError(f"{where} has {len(entries)} labels for {len(names)} images", "labels")
    labels = dict(entries)
    if missing := sorted(set(names) - labels.keys()):
        raise UserError(f"{where} has no label for {missing[0]}", "labels")
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
