"""Image files in the layout that EDM's dataset tool writes (Karras et al. 2022, arXiv 2206.00364).

A zip or a folder of PNG files such as `00000/img00000000.png`, grey or RGB, square and all of one
size, and `dataset.json`, which holds `{"labels": [["00000/img00000000.png", 6], ...]}` or null for
labels. It may also be called `labels`. Images come in the order of their names; hidden files do not
count. Nothing is extracted to disk.
"""

from __future__ import annotations

import io
import json
import struct
import sys
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import joblib
import numpy as np
import torch
from torch import Tensor

from harness.errors import UserError

INDEXES = ("dataset.json", "labels")
# Bounds on what one file may make of itself when it is unpacked.
MAX_SIDE = 2048
MAX_IMAGE_BYTES = 1 << 25
MAX_INDEX_BYTES = 1 << 30
MAX_CLASSES = 1 << 16


class Files:
    """The files of a zip or a folder by name; threads may read them at the same time."""

    def __init__(self, path: Path):
        self.path, self._zip = path, None
        if path.is_dir():
            files = [p for p in path.rglob("*") if p.is_file()]
            found = [(p.relative_to(path).as_posix(), p.stat().st_size) for p in files]
        else:
            try:
                self._zip = zipfile.ZipFile(path)
            except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
                raise UserError(f"{path} is no zip file, or was cut off ({error})") from None
            found = [(i.filename, i.file_size) for i in self._zip.infolist() if not i.is_dir()]
        self.sizes = {n: size for n, size in found if not any(p[:1] == "." for p in n.split("/"))}

    def read(self, name: str, limit: int) -> bytes:
        """The content of a file of at most `limit` bytes."""
        if self.sizes[name] > limit:
            raise UserError(f"{self.path}: {name} has {self.sizes[name]} bytes, more than {limit}")
        try:
            return self._zip.read(name) if self._zip else (self.path / name).read_bytes()
        except (OSError, EOFError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
            raise UserError(f"{self.path}: {name} cannot be read ({error})") from None


def has_labels(path: Path) -> bool:
    """Whether a list of labels lies beside the images."""
    return any(name in Files(path).sizes for name in INDEXES)


def _labels(files: Files, names: list[str], num_classes: int) -> Tensor:
    """The label of each image, int64 `(N,)`, below `num_classes`."""
    index = next((name for name in INDEXES if name in files.sizes), None)
    if index is None:
        raise UserError(f"{files.path} has no {INDEXES[0]} with labels; without any: labels: false")
    where = f"{files.path}: {index}"
    form = f'{where} is not of the form {{"labels": [[file name, class], ...]}}'
    try:
        entries = json.loads(files.read(index, MAX_INDEX_BYTES))["labels"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(form) from None
    if entries is None:
        raise UserError(f"{where} says that the images have no labels; set labels: false")
    labels = {}
    for entry in entries if isinstance(entries, list) else [entries]:
        match entry:
            case [str(name), int(label)] if not isinstance(label, bool):
                if not 0 <= label < num_classes:
                    raise UserError(
                        f"{where}: label {label} of {name} is not in 0..{num_classes - 1}"
                    )
                labels[name] = label
            case _:
                raise UserError(f"{form}: {str(entry)[:80]}")
    if len(entries) != len(names):
        raise UserError(f"{where} has {len(entries)} labels for {len(names)} images")
    for name in names:
        if name not in labels:
            raise UserError(f"{where} has no label for {name}")
    return torch.tensor([labels[name] for name in names])


def _decode(files: Files, name: str) -> np.ndarray:
    """A PNG as uint8 `(H, H, C)`, C being 1 or 3. Its header is checked before it is unpacked."""
    from PIL import Image, UnidentifiedImageError

    where, data = f"{files.path}: {name}", files.read(name, MAX_IMAGE_BYTES)
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            depth = data[24]  # of IHDR, always the first chunk: 16-bit RGB would lose its low bits
            if image.mode not in ("L", "RGB") or depth != 8:
                raise UserError(
                    f"{where} is {image.mode}, {depth} bits; images are 8-bit RGB or grey"
                )
            if image.width != image.height:
                raise UserError(f"{where} is {image.width} x {image.height}; images are square")
            if image.width > MAX_SIDE:
                raise UserError(f"{where} is {image.width} wide; images are at most {MAX_SIDE}")
            return np.asarray(image).reshape(image.height, image.width, -1)
    except UnidentifiedImageError:
        raise UserError(f"{where} is no PNG file") from None
    except (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"{where} is a damaged PNG file ({error})") from None


def read_images(
    path: Path, labelled: bool = True, num_classes: int | None = None, resolution: int | None = None
) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Images uint8 `(N, C, H, H)`, labels int64 `(N,)` and class names "0", "1", ... of a zip or a
    folder.

    With `labelled` false labels are not looked at: all are 0, and there are no class names.
    `num_classes` defaults to the largest label + 1; `resolution` is the H that images must have.
    A mistake in the files is a `UserError` that names the file.
    """
    files = Files(path)
    names = sorted(name for name in files.sizes if name not in INDEXES)
    if not names:
        raise UserError(f"{path} has no images")
    if labelled:
        labels = _labels(files, names, num_classes or MAX_CLASSES)
        class_names = tuple(str(i) for i in range(num_classes or int(labels.max()) + 1))
    else:
        labels, class_names = torch.zeros(len(names), dtype=torch.int64), ()
    first = _decode(files, names[0]).shape
    if resolution is not None and first[0] != resolution:
        raise UserError(f"{path}: {names[0]} is {first[0]} wide; data.resolution is {resolution}")
    pixels = np.empty((len(names), first[2], *first[:2]), np.uint8)

    def place(i: int) -> None:
        image = _decode(files, names[i])
        if image.shape != first:
            raise UserError(
                f"{path}: {names[i]} is {_size(image.shape)}, but {names[0]} is {_size(first)}"
            )
        pixels[i] = image.transpose(2, 0, 1)

    step = max(1024, -(-len(names) // 20))
    with ThreadPoolExecutor(joblib.cpu_count()) as pool:
        for start in range(0, len(names), step):
            stop = min(start + step, len(names))
            list(pool.map(place, range(start, stop)))
            print(f"{path}: {stop} of {len(names)} images", file=sys.stderr, flush=True)
    return torch.from_numpy(pixels), labels, class_names


def _size(shape: tuple[int, int, int]) -> str:
    return f"{shape[0]} x {shape[1]} {'RGB' if shape[2] == 3 else 'grey'}"
