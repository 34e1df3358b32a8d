"""Images as lossless WebP mosaics: about half of the size of the pixels of photographs."""

import io
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from harness.errors import UserError
from tools.container import PART

SIDE = 16_383  # pixels: the largest side of a WebP picture


def encode(pixels: np.ndarray, limit: int = PART) -> Iterator[tuple[int, int, bytes]]:
    """Mosaics of uint8 images `(N, C, H, W)`, C = 1 or 3, of at most `limit` bytes each: the first
    image, the number of images, and the file. Decoding gives the same bytes."""
    first, count = 0, max(1, limit // max(1, pixels[0].size))
    while first < len(pixels):
        images = pixels[first : first + count]
        content = _picture(images)
        if len(content) > limit and len(images) > 1:
            count = len(images) // 2
            continue
        if not np.array_equal(decode(content, images.shape), images):
            raise RuntimeError("the WebP encoder of this installation is not lossless")
        yield first, len(images), content
        first += len(images)


def _grid(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a mosaic."""
    count, _, height, width = shape
    columns = min(SIDE // width, math.ceil(math.sqrt(count)))
    rows = -(-count // columns) if columns else 0
    if not columns or rows * height > SIDE:
        raise UserError(f"{count} images of {height} x {width} do not fit into a mosaic", "shape")
    return rows, columns


def _picture(images: np.ndarray) -> bytes:
    from PIL import Image

    (count, channels, height, width), (rows, columns) = images.shape, _grid(images.shape)
    tiles = np.zeros((rows * columns, channels, height, width), np.uint8)
    tiles[:count] = images
    tiles = tiles.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    mosaic = np.broadcast_to(tiles, (*tiles.shape[:-1], 3))  # grey pixels have three equal channels
    buffer = io.BytesIO()
    picture = Image.fromarray(np.ascontiguousarray(mosaic).reshape(rows * height, -1, 3))
    picture.save(buffer, "WEBP", lossless=True, quality=50, method=4)
    return buffer.getvalue()


def decode(content: bytes, shape: tuple[int, ...], source: Path | str = "mosaic") -> np.ndarray:
    """The images `(N, C, H, W)` of a mosaic. Its size is checked before it is decompressed."""
    from PIL import Image, UnidentifiedImageError

    (count, channels, height, width), (rows, columns) = shape, _grid(tuple(shape))
    try:
        with Image.open(io.BytesIO(content), formats=["WEBP"]) as picture:
            if picture.size != (columns * width, rows * height):
                raise UserError(f"{source}: the mosaic has another size", "damaged")
            mosaic = np.asarray(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{source}: not a WebP mosaic ({error})", "damaged") from None
    tiles = mosaic.reshape(rows, height, columns, width, 3).transpose(0, 2, 4, 1, 3)
    return np.ascontiguousarray(tiles.reshape(-1, 3, height, width)[:count, :channels])
