"""Image files as arrays, cropped and resized if the experiment says so."""

import contextlib
import io
import struct

import numpy as np

from harness.config.schema import ResizeSection
from harness.errors import UserError

MAX_SIDE = 2048
FORMATS = ("PNG", "JPEG", "WEBP")
ORIENTATION = 274  # the EXIF tag
_EXIF_ERRORS = (OSError, ValueError, SyntaxError, KeyError, TypeError, struct.error)


class Decoder:
    """Turns files into uint8 arrays `(H, H, C)`, C = 1 or 3. Threads may share one.

    Images are turned upright as their EXIF data say. Colours of a palette and opaque images
    with an alpha channel become RGB, which loses nothing. enlarged: the images that were smaller
    than `resize.size`.
    """

    def __init__(self, resize: ResizeSection | None = None):
        self.resize, self.enlarged = resize, list[str]()

    def __call__(self, content: bytes | np.ndarray, where: str) -> np.ndarray:
        """content: of a file, or pixels uint8 `(H, W, C)`. where: the file, for messages."""
        from PIL import Image, UnidentifiedImageError

        if isinstance(content, np.ndarray):
            if self.resize is None:
                return self._square(content, where)
            image = Image.fromarray(content[:, :, 0] if content.shape[2] == 1 else content)
            return self._resized(image, where)
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                kind = image.format
                # The depth in IHDR, the first chunk: PIL would truncate 16-bit RGB.
                depth = content[24] if kind == "PNG" and image.mode != "P" else 8
                if depth != 8:
                    message = f"{image.mode} with {depth} bits; expected 8-bit RGB or grey"
                    raise UserError(f"{where} is {message}", "image-format")
                if self.resize is None and max(image.size) > MAX_SIDE:
                    message = f"is {image.width} x {image.height} pixels; at most {MAX_SIDE} x"
                    message += f" {MAX_SIDE} are read without data.resize"
                    raise UserError(f"{where} {message}", "image-format")
                return self._resized(_plain(_upright(image), where), where)
        except UnidentifiedImageError:
            raise UserError(f"{where} is not a PNG, JPEG or WebP file", "image-format") from None
        except Image.DecompressionBombError:
            raise UserError(f"{where} has too many pixels to be read", "image-format") from None
        except (OSError, ValueError, SyntaxError, EOFError, struct.error) as error:
            raise UserError(f"{where} is a damaged image file ({error})", "damaged") from None

    def _resized(self, image, where: str) -> np.ndarray:
        from PIL.Image import Resampling

        resize, (width, height) = self.resize, image.size
        if resize is not None and resize.mode != "none":
            if min(width, height) < resize.size:
                self.enlarged.append(where)
            if resize.mode == "center-crop":
                side = min(width, height)
                left, top = (width - side) // 2, (height - side) // 2
                image = image.crop((left, top, left + side, top + side))
            image = image.resize((resize.size, resize.size), Resampling.LANCZOS)
        pixels = np.asarray(image)
        return self._square(pixels.reshape(*pixels.shape[:2], -1), where)

    def _square(self, pixels: np.ndarray, where: str) -> np.ndarray:
        height, width, _ = pixels.shape
        if height != width:
            message = f"{where} is {width} x {height} pixels; expected square images"
            raise UserError(message, "shape")
        if self.resize is not None and width != self.resize.size:
            message = f"is {width} x {height} pixels, not {self.resize.size} x {self.resize.size}"
            raise UserError(f"{where} {message} (data.resize)", "shape")
        return pixels


def _upright(image):
    """The image turned as its EXIF data say. Damaged EXIF data have no effect."""
    from PIL import ImageOps

    with contextlib.suppress(*_EXIF_ERRORS):
        if image.getexif().get(ORIENTATION, 1) != 1:
            return ImageOps.exif_transpose(image)
    return image


def _plain(image, where: str):
    """The image in RGB or grey, if that loses nothing."""
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image
    if image.mode in ("L", "RGB", "P", "RGBA", "LA", "PA"):
        grey = image.mode in ("L", "LA")
        colours = image.convert("LA" if grey else "RGBA")
        if colours.getextrema()[-1][0] == 255:
            return colours.convert("L" if grey else "RGB")
        message = "has transparent pixels; draw it on a background and save it without alpha"
        raise UserError(f"{where} {message}", "image-format")
    message = f"has the colour mode {image.mode}; convert it to 8-bit RGB or grey"
    raise UserError(f"{where} {message}", "image-format")
