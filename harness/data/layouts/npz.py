"""Samples as ADM's code writes them (also improved-diffusion and DiT): a .npz file with `arr_0`,
images uint8 `(N, H, W, C)`, and optionally `arr_1`, their classes `(N,)`. Other arrays, such as
`mu` and `sigma` of reference batches, are ignored."""

import math
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import BinaryIO

import numpy as np

from harness.data.image_archive import Files
from harness.data.layouts.base import LAYOUTS, Layout, Listing
from harness.errors import UserError

IMAGES, CLASSES = "arr_0.npy", "arr_1.npy"


@LAYOUTS.register("npz")
class NpzLayout(Layout):
    description = "a .npz file of samples"

    @classmethod
    def accepts(cls, files):
        return IMAGES in files.sizes or (files.path.suffix == ".npz" and files.path.is_file())

    def parts(self, files, label_column):
        if IMAGES not in files.sizes:
            arrays = ", ".join(sorted(files.sizes))
            message = f"{files.path} has no array arr_0 with images, but {arrays}"
            raise UserError(message, "no-images")
        with files.open(IMAGES) as file:
            shape, kind = _header(files, file)
        if len(shape) != 4 or shape[3] not in (1, 3) or kind != np.uint8:
            message = f"{files.path}: arr_0 is {kind} {list(shape)}; expected uint8 (N, H, W, 3)"
            raise UserError(message, "image-format")
        if math.prod(shape) > files.sizes[IMAGES]:  # before memory is reserved for them
            raise UserError(f"{files.path} is damaged (it ends too early)", "damaged")
        labels = self._labels(files, shape[0]) if CLASSES in files.sizes else None
        names = [f"image {i}" for i in range(shape[0])]
        reason = f"{files.path} has no labels (arr_1)"
        return {"train": Listing(names, partial(_images, files, shape), labels, reason)}

    def _labels(self, files: Files, count: int) -> list[int]:
        with files.open(CLASSES) as file:
            shape, kind = _header(files, file)
            if shape != (count,) or kind.kind not in "iu":
                message = f"arr_1 is {kind} {list(shape)}; expected {count} classes as numbers"
                raise UserError(f"{files.path}: {message}", "labels")
            content = _read(files, file, count * kind.itemsize)
            return np.frombuffer(content, kind).tolist()


def _header(files: Files, file: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an array, whose data follow in the stream. Objects are not read."""
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        version = np.lib.format.read_magic(file)
        shape, columns_first, kind = read[version](file)
    except (ValueError, KeyError, EOFError, zlib.error) as error:
        raise UserError(f"{files.path} is damaged ({error})", "damaged") from None
    if kind.hasobject or columns_first:
        message = "contains objects" if kind.hasobject else "has columns first; use C order"
        raise UserError(f"{files.path} {message}", "image-format")
    return shape, kind


def _read(files: Files, file: BinaryIO, size: int) -> bytes:
    """The next bytes of an array."""
    try:
        content = file.read(size)
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{files.path} is damaged ({error})", "damaged") from None
    if len(content) < size:
        raise UserError(f"{files.path} is damaged (it ends too early)", "damaged")
    return content


def _images(files: Files, shape: tuple[int, ...]) -> Iterator[Callable[[], np.ndarray]]:
    """One image after another, so that the array is never in memory as a whole."""
    with files.open(IMAGES) as file:
        _header(files, file)
        for _ in range(shape[0]):
            image = np.frombuffer(_read(files, file, int(np.prod(shape[1:]))), np.uint8)
            yield partial(image.reshape, shape[1:])
